"""One measurement: contestants checked against float64, then timed in turns, A B C A B C, in one process."""

import gc
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from bench.machine import Call, Machine, Probe, Sample, Traffic, pytorch_calls
from bench.results import BOTH, COMPILED, FORWARD, OURS
from bench.workloads import DTYPES, Workload

__all__ = ["BOTH", "COMPILED", "FORWARD", "OURS", "Bench", "Entry", "measure"]

WARM_UP_CALLS = 2
FEWEST_ROUNDS, MOST_ROUNDS = 7, 200


@dataclass(frozen=True)
class Entry:
    """A contestant, ready to run.

    Args:
        calls: what is timed, by direction. All have FORWARD and BOTH; others are parts of these.
        error: relative error of the results against float64; called once, before anything else.
    """

    calls: dict[str, Call]
    error: Callable[[], float]


class Bench(ABC):
    """One operator on one workload: its inputs, its exact results, its contestants.

    Args:
        workload, dtype: of the features.
        device: where they are.
    """

    operator: ClassVar[str]
    # Ours among them, as OURS.
    contestants: ClassVar[tuple[str, ...]]
    # Left out where time is short.
    slow_to_prepare: ClassVar[tuple[str, ...]] = ()
    # What is run when nothing else is asked for: (workload, dtype), the most important first.
    default_cases: ClassVar[tuple[tuple[str, str], ...]]
    # Those that it can run on, where it cannot on all.
    workloads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, workload: Workload, dtype: str, device: str = "cpu") -> None:
        self.workload, self.dtype_name, self.device = workload, dtype, device
        self.dtype = DTYPES[dtype]

    @abstractmethod
    def entry(self, contestant: str) -> Entry:
        """A contestant with fresh state."""

    @property
    @abstractmethod
    def traffic(self) -> dict[str, Traffic]:
        """Bytes that have to move, by direction."""

    @property
    @abstractmethod
    def tolerance(self) -> float:
        """Largest accepted error."""


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(
    calls: dict[str, Call], machine: Machine, *, seconds: float, repeat: int | None = None
) -> dict[str, list[Sample]]:
    """Time calls in turns: as many rounds as fit into `seconds`, or `repeat` of them."""
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    machine.prepare()
    with _no_garbage_collection():
        for _ in range(WARM_UP_CALLS):
            start = time.perf_counter()
            for call in calls.values():
                machine.time(call)
            round_seconds = time.perf_counter() - start
        if repeat is None:
            repeat = min(max(int(seconds / round_seconds), FEWEST_ROUNDS), MOST_ROUNDS)
        for _ in range(repeat):
            for name, call in calls.items():
                samples[name].append(machine.time(call))
    return samples


def summary(samples: list[Sample]) -> dict[str, Any]:
    milliseconds = [1e3 * sample.seconds for sample in samples]
    low, median, high = np.quantile(milliseconds, (0.2, 0.5, 0.8))
    return {
        "median_ms": float(median),
        "q20_ms": float(low),
        "q80_ms": float(high),
        "page_faults": float(np.median([sample.page_faults for sample in samples])),
        "samples_ms": [round(value, 4) for value in milliseconds],
    }


def _bandwidth(probes: dict[str, Probe], samples: dict[str, list[Sample]]) -> dict[str, dict[str, float]]:
    result = {}
    for name, probe in probes.items():
        times = summary(samples[name])
        result[name] = {key: times[key] for key in ("median_ms", "q20_ms", "q80_ms")}
        result[name]["bytes"] = probe.bytes
        result[name]["gb_per_s"] = probe.bytes / times["median_ms"] / 1e6
    return result


def floor_ms(traffic: Traffic, bandwidth: dict[str, dict[str, float]]) -> float:
    """Time to move the bytes that have to move at the measured bandwidth."""
    return (
        traffic.read / bandwidth["read"]["gb_per_s"] + traffic.read_write / bandwidth["read_write"]["gb_per_s"]
    ) / 1e6


def prepare_entries(
    bench: Bench, contestants: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[str, Entry], dict[str, dict[str, Any]]]:
    """Contestants that ran once, and what was found out about them."""
    entries: dict[str, Entry] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in contestants:
        start = time.perf_counter()
        try:
            entry = bench.entry(name)
            error = entry.error()
        except Exception as problem:
            if name == OURS:
                raise
            # A compiler that does not work here leaves the others comparable.
            say(f"  {name}: does not run: {str(problem).splitlines()[0] if str(problem) else type(problem).__name__}")
            continue
        agrees = math.isfinite(error) and error <= bench.tolerance
        facts[name] = {"error": error, "agrees": agrees, "preparation_s": time.perf_counter() - start}
        entries[name] = entry
        verdict = "" if agrees else f" IS NOT WITHIN {bench.tolerance:.0e}"
        say(f"  {name}: error against float64 {error:.1e}{verdict}, ready after {facts[name]['preparation_s']:.1f} s")
    return entries, facts


def peak_memories(bench: Bench, machine: Machine, entries: dict[str, Entry]) -> dict[str, dict[str, int | None]]:
    """Peak bytes by direction and contestant."""
    return {
        direction: {
            name: machine.peak_memory(entry.calls[direction])
            for name, entry in entries.items()
            if direction in entry.calls
        }
        for direction in bench.traffic
    }


def time_direction(
    bench: Bench,
    machine: Machine,
    entries: dict[str, Entry],
    direction: str,
    probes: dict[str, Probe],
    *,
    seconds: float,
    repeat: int | None = None,
) -> dict[str, Any]:
    """All contestants that have a direction, and the bandwidth between their calls."""
    traffic = bench.traffic[direction]
    calls = {name: entry.calls[direction] for name, entry in entries.items() if direction in entry.calls}
    operators = {name: pytorch_calls(call) for name, call in calls.items()}
    timed = {name: probe.call for name, probe in probes.items()} | calls
    samples = interleave(timed, machine, seconds=seconds, repeat=repeat)
    bandwidth = _bandwidth(probes, samples)
    floor = floor_ms(traffic, bandwidth)
    results = {}
    for name in calls:
        times = summary(samples[name])
        results[name] = times | {
            "gb_per_s": traffic.total / times["median_ms"] / 1e6,
            "share_of_bandwidth": floor / times["median_ms"],
            "pytorch_calls": operators[name],
        }
    return {
        "bytes": {"read": traffic.read, "read_write": traffic.read_write},
        "floor_ms": floor,
        "bandwidth": bandwidth,
        "contestants": results,
    }


def measure(
    bench: Bench,
    machine: Machine,
    *,
    seconds: float,
    repeat: int | None = None,
    contestants: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
    after: Callable[[dict[str, Any], dict[str, Entry]], None] = lambda result, entries: None,
) -> dict[str, Any]:
    """Everything about one operator on one workload, ready for JSON.

    Args:
        seconds: how long the timed rounds of one direction may take, at least FEWEST_ROUNDS of them.
        repeat: number of rounds instead.
        contestants: those to run, ours among them; by default all.
        after: gets the result and the contestants while these are still there, to measure more.
    """
    torch.compiler.reset()
    machine.begin()
    entries, facts = prepare_entries(bench, contestants or bench.contestants, say)
    peaks = peak_memories(bench, machine, entries)
    probes = machine.probes(bench.workload.bytes(bench.dtype))
    directions = {}
    for direction in bench.traffic:
        timed = time_direction(bench, machine, entries, direction, probes, seconds=seconds, repeat=repeat)
        for name, entry in timed["contestants"].items():
            entry["peak_bytes"] = peaks[direction][name]
        directions[direction] = timed
    result = {
        "operator": bench.operator,
        "workload": bench.workload.name,
        "title": bench.workload.title,
        "dtype": bench.dtype_name,
        "batch": bench.workload.batch,
        "layers": len(bench.workload.shapes),
        "columns": bench.workload.columns,
        "tolerance": bench.tolerance,
        "contestants": facts,
        "directions": directions,
    }
    after(result, entries)
    return result
