"""Ours on every backend against eager PyTorch and torch.compile: as called, and as a graph without the host."""

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import report
from bench.gpu.cases import Case, Context, Emit, NotThere
from bench.gpu.device import BACKENDS, Device, first_line
from bench.gpu.targets import COMPARISONS
from bench.harness import Bench, Entry, measure
from bench.machine import Traffic
from bench.results import BOTH, COMPILED, FORWARD, ON_BACKEND, OURS

SECONDS = 1.5
# Contestants that read results on the host, which no graph can hold.
NOT_CAPTURED = ("original",)


class OnBackends(Bench):
    """A bench with one contestant of ours per backend; the fastest of them that is trusted bears the name of ours."""

    def __init__(self, bench: Bench, device: Device, names: list[str]) -> None:
        self.bench, self.gpu = bench, device
        self.operator, self.workload, self.dtype_name = bench.operator, bench.workload, bench.dtype_name
        self.dtype, self.device = bench.dtype, bench.device
        self.backends = {OURS if i == 0 else f"{ON_BACKEND}{name}": name for i, name in enumerate(names)}
        others = [name for name in bench.contestants if name != OURS]
        self.contestants = (*self.backends, *others)

    @property
    def traffic(self) -> dict[str, Traffic]:
        return self.bench.traffic

    @property
    def tolerance(self) -> float:
        return self.bench.tolerance

    def entry(self, contestant: str) -> Entry:
        backend = self.backends.get(contestant)
        if backend is None:
            entry = self.bench.entry(contestant)
            return Entry(entry.calls, self._exactly(entry))
        with self.gpu.backend(backend):
            entry = self.bench.entry(OURS)
        calls = {direction: self._on(backend, call) for direction, call in entry.calls.items()}
        return Entry(calls, self._on(backend, self._exactly(entry)))

    def _on(self, backend: str, call: Any) -> Any:
        def run() -> Any:
            with self.gpu.backend(backend):
                return call()

        return run

    def _exactly(self, entry: Entry) -> Any:
        def error() -> float:
            with self.gpu.full_precision():
                return entry.error()

        return error


@dataclass(frozen=True)
class Comparison:
    """A bench of the CPU on a workload for GPUs."""

    operator: str
    workload: str
    dtype: str
    seconds: float = 120.0


# The most important first.
ALL = (
    Comparison("match", "gfmn", "float32"),
    Comparison("match", "gfmn", "bfloat16"),
    Comparison("relu_moments", "vgg19", "float32"),
    Comparison("covariance", "d2048", "float32"),
    Comparison("covariance", "d2048", "bfloat16"),
    Comparison("gram", "vgg19", "float32"),
    Comparison("gram", "vgg19", "bfloat16"),
    Comparison("moments", "gfmn", "float32"),
    Comparison("relu_moments", "vgg19", "bfloat16"),
    Comparison("relu_moments", "gfmn", "float32"),
    Comparison("moment_network", "molm", "float32"),
)


def _bench(device: Device, comparison: Comparison) -> Bench:
    # As bench.command_line, which parses arguments.
    module = importlib.import_module(f"bench.bench_{comparison.operator}")
    kind = getattr(module, f"{comparison.operator.title().replace('_', '')}Bench")
    return kind(device.workload(comparison.workload), comparison.dtype, device.device)


def _trusted(device: Device, comparison: Comparison) -> list[str]:
    def is_trusted(backend: str) -> bool:
        return (comparison.operator, backend, comparison.dtype) in device.context.trusted

    return [backend for backend in BACKENDS if is_trusted(backend)]


def _forget_tuning() -> None:
    """What inductor has chosen by timings that other processes disturbed: it chooses anew."""
    for path in Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", os.devnull)).glob("**/*.best_config"):
        path.unlink(missing_ok=True)


def _compare(device: Device, emit: Emit, comparison: Comparison) -> dict[str, Any]:
    trusted = _trusted(device, comparison)
    if not trusted:
        raise NotThere(
            f"{comparison.operator} in {comparison.dtype} was not seen to agree with float64 on any backend: no factors"
        )
    _forget_tuning()
    # The reference is plain PyTorch: one of the others, unless there is nothing else.
    names = [name for name in trusted if name != "reference"] or trusted
    facts: dict[str, Any] = {"withheld": [name for name in BACKENDS if name not in trusted], "said": []}
    target = COMPARISONS.get((comparison.operator, comparison.workload))
    if target:
        facts["target"] = str(target)

    def replay(result: dict[str, Any], entries: dict[str, Entry]) -> None:
        # Captures may fail in ways of their own; what was found before stays.
        emit({**facts, "result": result, "factors": factors(result)})
        for direction in (BOTH, FORWARD):
            calls = {
                name: [entry.calls[direction]] for name, entry in entries.items() if not name.startswith(NOT_CAPTURED)
            }
            for name, times in device.replayed(calls, SECONDS).items():
                result["directions"][direction]["contestants"][name]["replayed"] = times

    while True:
        bench = OnBackends(_bench(device, comparison), device, names)
        facts["backends"] = bench.backends
        try:
            result = measure(
                bench, device, seconds=SECONDS, repeat=device.rounds, say=facts["said"].append, after=replay
            )
            break
        except Exception as problem:
            # Without the first backend of ours the others can still be compared.
            if len(names) == 1 or not device.alive():
                raise
            facts["said"].append(f"{names.pop(0)}: {first_line(problem)}")
    return {**facts, "clocks": device.clocks(), "result": result, "factors": factors(result)}


def factors(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Times over ours, as called and replayed, of contestants that are right; none where ours is not."""
    if not report.ours_agrees(result):
        return {}
    table = {}
    contestants = result["directions"][BOTH]["contestants"]
    ours = contestants[OURS]
    for name, times in contestants.items():
        if name == OURS or not result["contestants"][name]["agrees"]:
            continue
        table[name] = {"called": times["median_ms"] / ours["median_ms"]}
        replays = [entry.get("replayed", {}) for entry in (times, ours)]
        if all("median_ms" in replay and "not_captured" not in replay for replay in replays):
            table[name]["replayed"] = replays[0]["median_ms"] / replays[1]["median_ms"]
    return table


def cases(context: Context) -> list[Case]:
    def made() -> Iterator[Case]:
        for comparison in ALL:

            def run(device: Device, emit: Emit, comparison: Comparison = comparison) -> dict[str, Any]:
                return _compare(device, emit, comparison)

            title = f"{comparison.operator}, {comparison.workload}, {comparison.dtype}"
            tags = {"family": comparison.operator, "dtype": comparison.dtype}
            yield Case(title, run, comparison.seconds, tags=tags)

    return list(made())


def compile_cases(context: Context) -> list[Case]:
    """Compiles what torch.compile has to, side by side with other work: the benches find it in the cache."""

    def made() -> Iterator[Case]:
        for comparison in ALL:

            def run(device: Device, emit: Emit, comparison: Comparison = comparison) -> dict[str, Any]:
                bench = _bench(device, comparison)
                names = [name for name in bench.contestants if name.startswith(COMPILED)]
                for name in names:
                    bench.entry(name).calls[BOTH]()
                return {"compiled": names}

            title = f"compile: {comparison.operator}, {comparison.workload}, {comparison.dtype}"
            yield Case(title, run, comparison.seconds, shard=title)

    return list(made())
