"""The stages of a run, in their order: what every later one rests on comes first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gpu.cases import Case, Context
from bench.gpu.tools import Tools


def _environment(context: Context) -> list[Case]:
    from bench.gpu import environment

    return environment.cases(context)


def _smoke(context: Context) -> list[Case]:
    from bench.gpu import agreement, comparisons

    cuda, *others = agreement.smoke_cases_by_backend(context)
    # Kernels of CUDA C++ need no compiler: their shards leave room for what takes long.
    return [*cuda, *comparisons.compile_cases(context), *(case for cases in others for case in cases)]


def _syncs(context: Context) -> list[Case]:
    from bench.gpu import agreement

    return agreement.sync_cases(context)


def _graphs(context: Context) -> list[Case]:
    from bench.gpu import agreement

    return agreement.graph_cases(context)


def _kernels(context: Context) -> list[Case]:
    from bench.gpu import kernel_times

    return kernel_times.cases(context)


def _comparisons(context: Context) -> list[Case]:
    from bench.gpu import comparisons

    return comparisons.cases(context)


def _overhead(context: Context) -> list[Case]:
    from bench.gpu import overhead

    return overhead.cases(context)


def _tests(context: Context) -> list[Case]:
    from bench.gpu import suite

    return suite.cases(context)


def _sanitizer(context: Context) -> list[Case]:
    from bench.gpu import sanitizer

    return sanitizer.cases(context)


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Args:
        file: where its records go.
        least, most: seconds; with less it is left for another run, with more it is stopped.
        make: its cases. They are imported late: the first stages run where torch may not even be importable.
        needs_device: its cases compute on the device themselves; the others start programs.
        side_by_side: processes at a time; one where times are taken.
    """

    file: str
    least: float
    most: float
    make: Callable[[Context], list[Case]]
    needs_device: bool = True
    side_by_side: int = 1

    def cases(self, context: Context) -> list[Case]:
        """The cases; in a rehearsal fewer of them, with failures put in."""
        cases = self.make(context)
        if context.rehearse:
            from bench.gpu import rehearsal

            return rehearsal.prepared(cases)
        return cases

    def worker(self, context: Context) -> Any:
        """What cases get: the device, or the programs of this machine."""
        if self.needs_device:
            device = context.device()
            device.start()
            return device
        if context.rehearse:
            from bench.gpu.rehearsal import RehearsedTools

            return RehearsedTools(context)
        return Tools(context)


STAGES = {
    "environment": Stage("environment.jsonl", 5, 400, _environment, needs_device=False),
    "smoke": Stage("smoke.jsonl", 20, 200, _smoke, side_by_side=14),
    "syncs": Stage("smoke.jsonl", 10, 60, _syncs, side_by_side=3),
    "graphs": Stage("smoke.jsonl", 10, 90, _graphs, side_by_side=3),
    "kernels": Stage("bench.jsonl", 10, 120, _kernels),
    "comparisons": Stage("bench.jsonl", 30, 300, _comparisons),
    "overhead": Stage("bench.jsonl", 10, 40, _overhead),
    "tests": Stage("tests.jsonl", 60, 500, _tests, needs_device=False),
    "sanitizer": Stage("tools.jsonl", 60, 400, _sanitizer, needs_device=False, side_by_side=2),
}
