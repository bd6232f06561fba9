"""`python -m bench.report`: results as markdown tables and plots, also into the README."""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import environment, results
from bench.results import BOTH, COMPILED, EXTRACTOR, FORWARD, GENERATOR, NO_LOSS, OPTIMIZER, OURS

# Operators that do little else than move bytes; the others multiply matrices, or whole networks.
MEMORY_BOUND = ("moments", "match")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

SQUARES_NOTE = "Sums of squares lose the variance's digits where |mean| >> std; the other ways do not."


def ours_agrees(result: dict[str, Any]) -> bool:
    return result["contestants"][OURS]["agrees"]


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f}" if size < 1e7 else f"{size / 1e6:.0f}"


def median(result: dict[str, Any], contestant: str, direction: str = BOTH) -> float:
    return result["directions"][direction]["contestants"][contestant]["median_ms"]


def time_over_ours(result: dict[str, Any], contestant: str, direction: str = BOTH) -> str:
    """How many times as long as ours it takes; only between results that are both right."""
    facts = result["contestants"]
    if not (ours_agrees(result) and facts[contestant]["agrees"]):
        return "not exact"
    return f"{median(result, contestant, direction) / median(result, OURS, direction):.2f}x"


def order(result: dict[str, Any]) -> list[str]:
    """Contestants, ours first, then the fastest first."""
    return sorted(result["contestants"], key=lambda name: (name != OURS, median(result, name)))


def title(result: dict[str, Any]) -> str:
    return (
        f"`{result['operator']}`, {result['title']}: {result['layers']} layers, {result['columns']:,} columns,"
        f" batch {result['batch']}, {result['dtype']}"
    )


def _time(entry: dict[str, Any]) -> str:
    low, middle, high = (milliseconds(entry[key]) for key in ("q20_ms", "median_ms", "q80_ms"))
    return f"**{middle}** ({low} to {high})"


def _rows(cells: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *body])


def table(result: dict[str, Any]) -> str:
    """Everything about one case."""
    forward, both = (result["directions"][direction] for direction in (FORWARD, BOTH))
    # Devices that capture have no page faults to tell of.
    captured = any("replayed" in entry for entry in both["contestants"].values())
    cells = [
        [
            "",
            "forward, ms",
            "forward + backward, ms",
            "time over ours",
            "GB/s",
            "of the bandwidth (forward)",
            "peak MB",
            *(["as a graph, ms", "time over ours"] if captured else ["page faults"]),
            "PyTorch calls",
        ]
    ]
    for name in order(result):
        first, second = forward["contestants"][name], both["contestants"][name]
        shares = [f"{100 * entry['share_of_bandwidth']:.0f} %" for entry in (second, first)]
        cells.append(
            [
                name,
                _time(first),
                _time(second),
                "" if name == OURS else time_over_ours(result, name),
                f"{second['gb_per_s']:.1f}",
                f"{shares[0]} ({shares[1]})",
                megabytes(second["peak_bytes"]),
                *(_graph(result, name) if captured else [f"{second['page_faults']:.0f}"]),
                str(second["pytorch_calls"]),
            ]
        )
    parts = _parts(result)
    read, read_write = (both["bandwidth"][probe]["gb_per_s"] for probe in ("read", "read_write"))
    note = (
        f"The bytes that have to move take {milliseconds(forward['floor_ms'])} ms forward and"
        f" {milliseconds(both['floor_ms'])} ms forward + backward at the bandwidth of the same run"
        f" (reading {read:.1f} GB/s; reading and writing {read_write:.1f} GB/s)."
    )
    if not ours_agrees(result):
        note += " **moment_ops is not exact here: no speed-ups.**"
    return "\n\n".join([f"**{title(result)}**", _rows(cells), *parts, note])


def _graph(result: dict[str, Any], contestant: str) -> list[str]:
    """Time as a captured graph, and over ours; empty for what cannot be captured."""
    entries = [result["directions"][BOTH]["contestants"][name].get("replayed", {}) for name in (contestant, OURS)]
    if any("median_ms" not in entry or "not_captured" in entry for entry in entries):
        return ["", ""]
    right = ours_agrees(result) and result["contestants"][contestant]["agrees"]
    factor = f"{entries[0]['median_ms'] / entries[1]['median_ms']:.2f}x" if right else "not exact"
    return [_time(entries[0]), "" if contestant == OURS else factor]


def _parts(result: dict[str, Any]) -> list[str]:
    """A table of the parts of a call, where they were timed one by one."""
    parts = [direction for direction in result["directions"] if direction not in (FORWARD, BOTH)]
    if not parts:
        return []
    names = [name for name in order(result) if name in result["directions"][parts[0]]["contestants"]]
    cells = [["parts, ms", *names]]
    for part in parts:
        contestants = result["directions"][part]["contestants"]
        found = (contestants.get(name) for name in names)
        cells.append([part, *(milliseconds(entry["median_ms"]) if entry else "" for entry in found)])
    return [_rows(cells), *([_split(result)] if result["operator"] == "step" else [])]


def _split(result: dict[str, Any]) -> str:
    """Where the time of a training step goes, and how many images it makes. Networks alone ran in the same rounds."""
    whole = median(result, OURS)

    def beyond_networks(direction: str) -> float:
        contestants = result["directions"][direction]["contestants"]
        pairs = zip(*(contestants[name]["samples_ms"] for name in (OURS, NO_LOSS)), strict=True)
        return statistics.median(ours - networks for ours, networks in pairs)

    generator, optimizer = (median(result, OURS, part) for part in (GENERATOR, OPTIMIZER))
    extractor, loss = median(result, NO_LOSS, EXTRACTOR), beyond_networks(EXTRACTOR)
    shares = {
        "generator": generator,
        "extractor": extractor,
        "moments and loss": loss,
        "optimizer": optimizer,
        "rest": whole - generator - extractor - loss - optimizer,
    }
    split = ", ".join(f"{name} {100 * share / whole:.1f} %" for name, share in shares.items())
    rates = ", ".join(
        f"{name} {1e3 * result['batch'] / median(result, name):.1f}" for name in order(result) if name != NO_LOSS
    )
    return (
        f"Of a step of ours: {split}; all beyond the networks alone {100 * beyond_networks(BOTH) / whole:.1f} %."
        f" Images per second: {rates}."
    )


def fastest(result: dict[str, Any], names: Sequence[str]) -> str | None:
    """The fastest of the contestants named that is right."""
    right = [name for name in names if result["contestants"].get(name, {}).get("agrees")]
    return min(right, key=lambda name: median(result, name), default=None)


def _against(result: dict[str, Any], names: Sequence[str]) -> str:
    name = fastest(result, names)
    if name is None:
        return ""
    label = name.removeprefix(COMPILED).removeprefix("eager: ")
    return f"{milliseconds(median(result, name))} ({label}): **{time_over_ours(result, name)}**"


def overview(all_results: Sequence[dict[str, Any]]) -> str:
    """One row per case: ours, the best torch.compile, the best and the other eager code."""
    cells = [["forward + backward", "moment_ops, ms", "best torch.compile", "best without it", "slowest", NO_LOSS]]
    for result in all_results:
        compiled = [name for name in result["contestants"] if name.startswith(COMPILED)]
        ours = [name for name in result["contestants"] if name.startswith(OURS)]
        eager = [name for name in result["contestants"] if name not in (*compiled, *ours, NO_LOSS)]
        share = result["directions"][BOTH]["contestants"][OURS]["share_of_bandwidth"]
        reached = f" ({100 * share:.0f} % of the bandwidth)" if result["operator"] in MEMORY_BOUND else ""
        slowest = max(eager, key=lambda name: median(result, name), default=None)
        cells.append(
            [
                f"`{result['operator']}`, {result['workload']}, {result['dtype']}",
                f"**{milliseconds(median(result, OURS))}**{reached}",
                _against(result, compiled),
                _against(result, eager),
                _against(result, [slowest] if slowest else []),
                _over_no_loss(result),
            ]
        )
    return _rows(cells)


def _over_no_loss(result: dict[str, Any]) -> str:
    """What the loss adds to the network."""
    if NO_LOSS not in result["contestants"]:
        return ""
    alone = median(result, NO_LOSS)
    return f"{milliseconds(alone)}: ours takes {median(result, OURS) / alone:.2f}x of it"


def environments(all_results: Sequence[dict[str, Any]]) -> str:
    lines = environment.lines([result["environment"] for result in all_results])
    return "\n".join(f"Measured on: {line}." for line in lines)


def full(all_results: Sequence[dict[str, Any]], plots: Sequence[str] = ()) -> str:
    """The page of one device."""
    parts = [
        f"# {all_results[0]['environment']['device']}",
        environments(all_results),
        "Medians of interleaved runs in one process, 20 and 80 % quantiles in brackets. Peak memory is what forward and"
        " backward need over rest, the gradients included. PyTorch calls are operators and compiled graphs entered."
        f" A factor is given only where both results are within the tolerance of float64. {SQUARES_NOTE}",
        *(f"![{Path(plot).stem}]({plot})" for plot in plots),
        overview(all_results),
        *(table(result) for result in all_results),
    ]
    return "\n\n".join(parts) + "\n"


def section(all_results: Sequence[dict[str, Any]], plots: Sequence[str], details: str) -> str:
    """What the README shows."""
    images = [f"![{Path(plot).stem}]({plot})" for plot in plots[:1]]
    note = (
        "Times in ms, medians of interleaved runs in one process; a factor is a time over ours."
        f" {SQUARES_NOTE} [All tables]({details})."
    )
    return "\n\n".join([*images, overview(all_results), note, environments(all_results)])


def replace_section(path: Path, text: str) -> str | None:
    """Put `text` between the markers of a file; the reason if that cannot be done."""
    if not path.is_file():
        return f"{path} does not exist"
    content = path.read_text()
    start, end = content.find(BEGIN), content.find(END)
    if start < 0 or end < start:
        return f"{path} has no {BEGIN} ... {END}"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f"{content[: start + len(BEGIN)]}\n{text}\n{content[end:]}")
    os.replace(temporary, path)
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="*", help="folders with results (default: all in bench/results)")
    parser.add_argument("--readme", type=Path, help=f"file whose part between {BEGIN} and {END} is written anew")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    folders = options.folder or sorted(path for path in results.FOLDER.glob("*") if path.is_dir())
    sections = []
    for folder in folders:
        all_results = results.load(folder)
        if not all_results:
            print(f"no results in {folder}", file=sys.stderr)
            continue
        plots = []
        if not options.no_plots:
            from bench.plot import save_plots

            plots = [path.name for path in save_plots(all_results, folder)]
        page = folder / "README.md"
        page.write_text(full(all_results, plots))
        print(page.read_text())
        if options.readme:
            base = os.path.relpath(folder, options.readme.resolve().parent)
            sections.append(section(all_results, [f"{base}/{plot}" for plot in plots], f"{base}/README.md"))
    if not sections and not folders:
        sys.exit("no results yet: `make bench` makes them")
    if options.readme and sections:
        problem = replace_section(options.readme, "\n\n".join(sections))
        if problem is not None:
            sys.exit(f"README not written: {problem}")


if __name__ == "__main__":
    main()
