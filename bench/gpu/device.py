"""The GPU as the cases see it: backends, synchronization, graphs, and times of captured calls."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import moment_ops as mo
from bench.gpu.cases import Context
from bench.gpu.environment import clocks
from bench.gpu.tools import Tools
from bench.harness import interleave, summary
from bench.machine import Call, Gpu, Sample
from bench.workloads import WORKLOADS, Workload
from moment_ops.ops import backends

# Fastest first. The reference counts as one of ours: it runs where nothing else does.
BACKENDS = ("cuda", "triton", "reference")
# Not for CPUs.
_LARGE = {"d8192": Workload("d8192", "8,192 features, 1,024 rows", 1024, ((8192,),))}


class Device(Gpu):
    """A GPU that torch can use.

    Attributes:
        rounds: of timed calls; None for as many as fit into the time that they are given.
        patience: what numbers of repetitions are multiplied with.
    """

    rounds: int | None = None
    patience = 1.0

    def __init__(self, context: Context) -> None:
        self.context = context

    def start(self) -> None:
        """In a process of its own, before anything else."""
        torch.manual_seed(0)
        # Many processes run side by side.
        torch.set_num_threads(1)
        self.begin()

    def name(self) -> str:
        return self.cuda.get_device_name()

    def properties(self) -> dict[str, Any]:
        facts = self.cuda.get_device_properties(0)
        return {
            "name": self.name(),
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "l2_bytes": facts.L2_cache_size,
            "memory_bytes": facts.total_memory,
        }

    def unavailable(self, backend: str) -> str | None:
        """Why a backend cannot run here; None if it can."""
        return backends.unavailable(backend)

    def backend(self, name: str) -> Any:
        """Forces a backend."""
        return mo.backend(name)

    def workload(self, name: str) -> Workload:
        return _LARGE.get(name) or WORKLOADS[name]

    def tools(self) -> Tools:
        return Tools(self.context)

    def clocks(self) -> dict[str, str] | None:
        """What nvidia-smi says now; None where it says nothing."""
        try:
            return clocks(self.tools())
        except Exception:
            return None

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def alive(self) -> bool:
        """Whether the device still computes: after an illegal access all further calls of a process fail."""
        try:
            return (torch.ones(3, device=self.device) + 1).sum().item() == 6.0
        except Exception:
            return False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Whatever waits for the device raises."""
        self.synchronize()
        self.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self.cuda.set_sync_debug_mode("default")

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Convolutions without TF32, which cuDNN uses by default: for results, not for times."""
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def launches(self, call: Call) -> int:
        """Kernels, copies and fills that a call starts on the device."""
        call()
        self.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            self.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    def input_sets(self, size: int) -> int:
        """How many inputs of `size` bytes to take in turns, so that all of them exceed the L2 cache several times."""
        cache = self.properties()["l2_bytes"]
        return min(max(-(-4 * cache // max(size, 1)), 2), 16)

    def replayed(self, calls: dict[str, Sequence[Call]], seconds: float) -> dict[str, dict[str, Any]]:
        """Times of captured calls, taken in turns; what cannot be captured is called, and says why.

        Args:
            calls: by name, the same call on different inputs, one after another in one graph; times are per call.
            seconds: for all of them.
        """
        timed: dict[str, Call] = {}
        notes: dict[str, dict[str, Any]] = {}
        for name, parts in calls.items():
            timed[name] = _in_turn(parts)
            notes[name] = {"calls_in_a_graph": len(parts)}
            try:
                timed[name] = self.capture(timed[name]).replay
            except Exception as problem:
                if not self.alive():
                    raise
                notes[name] = {"not_captured": first_line(problem)}
        results = {}
        for name, samples in interleave(timed, self, seconds=seconds, repeat=self.rounds).items():
            each = [Sample(sample.seconds / len(calls[name])) for sample in samples]
            results[name] = summary(each) | notes[name]
        return results


def _in_turn(calls: Sequence[Call]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def first_line(problem: BaseException) -> str:
    """An exception in one line."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__
