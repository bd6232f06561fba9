"""One page about a run, the most important last: terminals and tools cut pages at their beginning."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bench.gpu.cases import BAD, NOT_RUN, NOT_THERE, OK
from bench.gpu.records import Record
from bench.results import BOTH, COMPILED, NO_LOSS, ON_BACKEND, OURS

REHEARSAL = "rehearsal, no GPU"
MOST_CHARACTERS = 11_500
BACKENDS = ("cuda", "triton", "reference")
SO_FAR = "so far"


def page(records: Sequence[Record], full: Sequence[str] = ()) -> str:
    """All sections; each of them stands alone, so that a record that is odd costs one of them."""
    rehearsed = any(record.get("rehearsal") for record in records)
    parts = []
    for title, section in SECTIONS.items():
        try:
            lines = section.lines(records)
        except Exception as problem:
            lines = [f"this section failed: {type(problem).__name__}: {problem}"]
        if lines:
            heading = f"== {title}{f' ({REHEARSAL})' if rehearsed else ''}"
            more = [f"... and {len(lines) - section.most} lines more"] if len(lines) > section.most else []
            parts.append("\n".join([heading, *(line[: section.width] for line in lines[: section.most]), *more]))
    if full:
        parts.append(f"== records are missing in full files: {', '.join(full)}")
    if rehearsed:
        parts.append(f"== {REHEARSAL.upper()}: nothing above was measured on a GPU, and failures were put in")
    text = "\n".join(parts)
    if len(text) > MOST_CHARACTERS:
        text = "[the beginning is left out]\n" + text[len(text) - MOST_CHARACTERS + 40 :]
    return text + "\n"


def _cases(records: Iterable[Record], *stages: str) -> list[Record]:
    """Ended cases, of one that ran again the last; where one ended badly, with what it had found until then."""
    kept: dict[tuple[str, str], Record] = {}
    found: dict[tuple[str, str], Any] = {}
    for record in records:
        if record.get("stage") not in stages or "case" not in record:
            continue
        key = (record["stage"], record["case"])
        if record.get("status") == SO_FAR:
            found[key] = record["facts"]
        else:
            kept[key] = {"facts": found.get(key, {}), **record}
    return list(kept.values())


def _facts(records: Iterable[Record], case: str) -> dict[str, Any]:
    """What a case of the environment found, as far as it came."""
    found: dict[str, Any] = {}
    for record in records:
        if record.get("stage") == "environment" and record.get("case") == case:
            found = record.get("facts") or found
    return found


def _told(cases: Iterable[Record], good: str = OK) -> str:
    """How many cases ended how."""
    counts = Counter(record["status"] for record in cases)
    parts = [f"{counts[OK]} {good}"] if counts[OK] else []
    return ", ".join(parts + [f"{counts[status]} {status}" for status in (*BAD, NOT_RUN) if counts[status]])


def _environment(records: Sequence[Record]) -> list[str]:
    smi, machine, library = (_facts(records, case) for case in ("nvidia-smi", "machine", "library"))
    lines = [
        f"{smi.get('name', 'device unknown')}, driver {smi.get('driver_version', '?')}, SM {smi.get('clocks.sm', '?')}"
        f" of {smi.get('clocks.max.sm', '?')}, memory {smi.get('clocks.mem', '?')}, {smi.get('memory.total', '?')}"
    ]
    packages = machine.get("packages", {})
    versions = ", ".join(f"{name} {packages.get(name, '?')}" for name in ("torch", "triton", "numpy"))
    lines.append(f"Python {machine.get('python', '?')}, {versions}, {machine.get('cores', '?')} cores")
    for key in ("as_found", "as_built"):
        if key in library:
            probe = library[key]
            missing = probe.get("does_not_load") or probe.get("unavailable") or "all backends available"
            lines.append(f"library {key.replace('_', ' ')}: {missing}".replace("\n", " "))
    if "build" in library:
        lines.append(f"build from source: {library['build']['seconds']} s, {library['build']['ended']}")
    return lines


def _stages(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records:
        if "case" in record or "test" in record or record.get("stage") in (None, "run"):
            continue
        counts = [f"{key} {record[key]}" for key in (OK, *BAD, NOT_RUN, NOT_THERE) if key in record]
        told = record.get("error", ", ".join(counts))
        lines.append(f"{record['stage']:12}{record['seconds']:6.1f} s  {record['status']}: {told}")
    return lines


def _counters(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in _cases(records, "sanitizer"):
        if not record["case"].startswith("ncu"):
            continue
        # Launches of the same kernel are alike: the longest stands for them.
        longest: dict[str, dict[str, Any]] = {}
        for kernel in record.get("facts", {}).get("kernels", []):
            if kernel.get("us", 0) >= longest.get(kernel["kernel"], {}).get("us", 0):
                longest[kernel["kernel"]] = kernel
        for kernel in sorted(longest.values(), key=lambda kernel: -kernel.get("us", 0))[:8]:
            values = ", ".join(f"{value:g} {key}" for key, value in kernel.items() if isinstance(value, float))
            lines.append(f"{record['tags']['backend']} {kernel['kernel'][-40:]}: {values}")
    return lines


def _overhead(records: Sequence[Record]) -> list[str]:
    rows: dict[str, list[str]] = {}
    for record in _cases(records, "overhead"):
        name, _, backend = record["case"].rpartition(": ")
        facts = record.get("facts")
        if record["status"] == OK and facts:
            rows.setdefault(name, []).append(f"{backend} {facts['host_us']:.0f} ({facts['launches']} launches)")
        elif record["status"] in BAD:
            rows.setdefault(name, []).append(f"{backend} {record['status']}")
    return [f"{name}: {'; '.join(cells)}" for name, cells in rows.items()]


def _agreement(records: Sequence[Record]) -> list[str]:
    """A line per family and backend: cases, and the worst error of float32 over its bound."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in _cases(records, "smoke"):
        if "backend" in record.get("tags", {}):
            groups.setdefault((record["tags"]["family"], record["tags"]["backend"]), []).append(record)
    families: dict[str, list[str]] = {}
    for (family, backend), cases in groups.items():
        if not any(record["status"] in (OK, *BAD, NOT_RUN) for record in cases):
            continue
        right = [r["facts"] for r in cases if r["status"] == OK and r["tags"]["dtype"] == "float32"]
        worst = f", worst {max(facts['worst'] for facts in right):.2f}" if right else ""
        families.setdefault(family, []).append(f"{backend} {_told(cases)}{worst}")
    return [f"{family:15} {' | '.join(cells)}" for family, cells in families.items()]


def _question(stage: str, good: str) -> Callable[[Sequence[Record]], list[str]]:
    """A line per backend."""

    def section(records: Sequence[Record]) -> list[str]:
        cases = _cases(records, stage)
        lines = []
        for backend in BACKENDS:
            mine = [r for r in cases if r["tags"]["backend"] == backend and r["status"] != NOT_THERE]
            if mine:
                bad = ", ".join(r["case"].partition(": ")[0] for r in mine if r["status"] in BAD)
                lines.append(f"{backend}: {_told(mine, good)}" + (f": {bad}" if bad else ""))
        return lines

    return section


def _sanitizer(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in _cases(records, "sanitizer"):
        facts = record.get("facts", {})
        if not record["case"].startswith("ncu"):
            told = "; ".join(str(facts[key]) for key in ("verdict", "program") if key in facts)
            lines.append(f"{record['case']}: {record['status']}: {told or record.get('error', '')}")
    return lines


def _tests(records: Sequence[Record]) -> list[str]:
    tests = {record["test"]: record for record in records if "test" in record}
    if not tests:
        return []
    left = [r["facts"]["not_run"] for r in _cases(records, "tests") if "not_run" in r.get("facts", {})]
    skipped = sum(record["status"] == "skipped" for record in tests.values())
    told = ", ".join(part for part in (_told(tests.values()), f"{skipped} skipped" if skipped else "") if part)
    bad: dict[str, list[str]] = {}
    for name, record in tests.items():
        if record["status"] in BAD:
            test = name.rpartition("/")[2].partition("[")[0]
            bad.setdefault(f"{test}: {record['status']}: {record.get('error', '')}", []).append(name)
    most_first = sorted(bad.items(), key=lambda item: -len(item[1]))
    return [f"{told}; {left[-1] if left else '?'} not run", *(f"{len(names)} x {what}" for what, names in most_first)]


def _failures(records: Sequence[Record]) -> list[str]:
    """Cases by their error: one cause makes many of them."""
    groups: dict[str, list[Record]] = {}
    for record in _cases(records, *dict.fromkeys(r.get("stage", "") for r in records)):
        if record["status"] in BAD:
            # Wrong numbers differ from case to case.
            error = "" if "bound" in record.get("error", "") else record.get("error", "")
            groups.setdefault(f"{record['stage']}: {record['status']}: {error[:70]}", []).append(record)
    lines = []
    for what, cases in groups.items():
        lines.append(f"{len(cases)} x {what} | {cases[0]['case']} | {_where(cases[0])}")
    return lines


def _where(record: Record) -> str:
    """The innermost frame that a record knows of."""
    lines = record.get("traceback") or record.get("log") or [record.get("error", "")]
    frames = [line.strip() for line in lines if line.strip().startswith("File ")]
    return (frames or lines)[0]


def _kernels(records: Sequence[Record]) -> list[str]:
    rows: dict[str, list[str]] = {}
    targets: dict[str, str] = {}
    bandwidths = []
    for record in _cases(records, "kernels"):
        name, _, rest = record["case"].partition(": ")
        backend, _, workload = rest.partition(", ")
        facts, row = record.get("facts", {}), rows.setdefault(f"{name}, {workload}", [])
        if "us" in facts:
            bandwidths.append(facts["copy_gb_per_s"])
            rivals = "".join(f", {factor:.2f}x {rival}" for rival, factor in facts["factors"].items())
            row.append(f"{backend} {facts['us']:.1f} us {100 * facts['share_of_copy']:.0f} %{rivals}")
            targets[f"{name}, {workload}"] = facts.get("target", "")
        elif record["status"] != NOT_THERE:
            row.append(f"{backend} {record['status']}")
        else:
            row.append(f"{backend} -")
    lines = [
        f"{name}: {' | '.join(row)}" + (f"  [{targets[name]}]" if targets.get(name) else "")
        for name, row in rows.items()
        if any(not cell.endswith(" -") for cell in row)
    ]
    if bandwidths:
        lines.append(f"copy in the same turns: {statistics.median(bandwidths):,.0f} GB/s, read and written")
    return lines


def _comparisons(records: Sequence[Record]) -> list[str]:
    """The best rival of each kind: as called, then as a graph where both are captured."""
    lines = []
    for record in _cases(records, "comparisons"):
        facts = record.get("facts", {})
        if "result" not in facts:
            lines.append(f"{record['case']}: {record['status']}: {record.get('error', '')}")
            continue
        ours = facts["result"]["directions"][BOTH]["contestants"][OURS]
        replayed = ours.get("replayed", {}).get("median_ms", math.nan)
        line = f"{record['case']} on {facts['backends'][OURS]}: {ours['median_ms']:.3f} ms, graph {replayed:.3f}; "
        cells = []
        for kind, rivals in _kinds(facts["factors"]).items():
            name = min(rivals, key=lambda name: rivals[name]["called"])
            times = "/".join(f"{rivals[name][how]:.2f}x" for how in ("called", "replayed") if how in rivals[name])
            cells.append(f"{kind} {times}")
        target = f"  [{facts['target']}]" if "target" in facts else ""
        lines.append(line + (", ".join(cells) or "ours is not exact: no factors") + target)
    return lines


def _kinds(factors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rivals as compiled, eager and others by their names."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, factor in factors.items():
        kind = "compiled" if name.startswith(COMPILED) else name.partition(":")[0].removeprefix(ON_BACKEND)
        kinds.setdefault(kind.replace(NO_LOSS, "without"), {})[name] = factor
    return kinds


class Section(NamedTuple):
    """A part of the page, with the most lines that it may have, and the most characters of a line."""

    lines: Callable[[Sequence[Record]], list[str]]
    most: int
    width: int = 140


SECTIONS: dict[str, Section] = {
    "counters of ncu": Section(_counters, 12),
    "host time per call, us": Section(_overhead, 10),
    "stages": Section(_stages, 20),
    "environment": Section(_environment, 8, 180),
    "failures": Section(_failures, 18),
    "tests/gpu": Section(_tests, 10),
    "compute-sanitizer": Section(_sanitizer, 8),
    "host syncs": Section(_question("syncs", "do not wait"), 3, 200),
    "CUDA graphs": Section(_question("graphs", "captured, replays equal"), 3, 200),
    "agreement with float64 in units of the bound": Section(_agreement, 8),
    "against eager and torch.compile, forward + backward: time over ours, called/as a graph": Section(
        _comparisons, 12, 190
    ),
    "kernels as graphs, inputs not in the cache, share of copy bandwidth": Section(_kernels, 22, 160),
}
