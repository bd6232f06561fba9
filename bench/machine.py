"""Devices to measure on: their clock, their bandwidth, their memory. A new kind of device is one more class here."""

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench.memory import peak_over_rest, return_freed_memory
from moment_ops.training.allocator import keep_freed_memory

Call = Callable[[], object]


@dataclass(frozen=True)
class Traffic:
    """Bytes that have to move: in passes that only read, and in passes that read and write."""

    read: int
    read_write: int = 0

    @property
    def total(self) -> int:
        return self.read + self.read_write


@dataclass(frozen=True)
class Probe:
    """A call whose traffic is known, to measure bandwidth with."""

    call: Call
    bytes: int


@dataclass(frozen=True)
class Sample:
    """One timed call."""

    seconds: float
    page_faults: int = 0


class Machine(Protocol):
    """What the harness needs of a device."""

    device: str

    def begin(self) -> None:
        """Called before anything is allocated: from here on peak memory is measured."""

    def prepare(self) -> None:
        """Called before a series of timed calls: from here on their memory may be kept for reuse."""

    def time(self, call: Call) -> Sample: ...

    def probes(self, size: int) -> dict[str, Probe]:
        """`read` and `read_write`, on flat tensors of `size` bytes."""

    def peak_memory(self, call: Call) -> int | None: ...


class Cpu:
    """Wall time, page faults of the process, resident memory."""

    device = "cpu"

    def begin(self) -> None:
        return_freed_memory()

    def prepare(self) -> None:
        keep_freed_memory()

    def time(self, call: Call) -> Sample:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return Sample(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)

    def probes(self, size: int) -> dict[str, Probe]:
        source = torch.ones(size // 4)
        target = torch.ones_like(source)
        moved = source.numel() * source.itemsize
        return {
            "read": Probe(source.sum, moved),
            "read_write": Probe(lambda: torch.mul(source, 1.0001, out=target), 2 * moved),
        }

    def peak_memory(self, call: Call) -> int | None:
        return peak_over_rest(call)


@dataclass(frozen=True)
class Replay:
    """A captured call: `replay` launches it again, `outputs` are what it then computes."""

    replay: Call
    outputs: Callable[[], Any]


class Gpu:
    """Time between events on the device, memory of its caching allocator."""

    device = "cuda"
    # What the device is reached through; a rehearsal without one has another.
    cuda: Any = torch.cuda
    # What is read before a call is timed, so that the call finds nothing of its inputs in the L2 cache. Were it
    # written, the cache would be full of lines that are written back while the call runs.
    FLUSH_BYTES = 256 << 20
    # The least that is copied to measure bandwidth: a copy of the size of the L2 cache would be faster than memory.
    PROBE_BYTES = 1 << 30

    def begin(self) -> None:
        if not self.cuda.is_available():
            raise SystemExit("there is no GPU that torch can use")
        # Contestants of an earlier measurement refer to each other.
        gc.collect()
        self.cuda.empty_cache()

    def prepare(self) -> None:
        self.flush = torch.ones(self.FLUSH_BYTES // 4, device=self.device)

    def time(self, call: Call) -> Sample:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        # The flush keeps the device busy while the host gets ahead: what is timed is the device, not the launch.
        self.flush.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end) / 1e3)

    def probes(self, size: int) -> dict[str, Probe]:
        source = torch.ones(max(size, self.PROBE_BYTES) // 4, device=self.device)
        target = torch.empty_like(source)
        moved = source.numel() * source.itemsize
        return {"read": Probe(source.sum, moved), "read_write": Probe(lambda: target.copy_(source), 2 * moved)}

    def peak_memory(self, call: Call) -> int | None:
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        rest = self.cuda.memory_allocated()
        call()
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated() - rest

    def capture(self, call: Call, warm_up: Call | None = None) -> Replay:
        """The launches of a call as a CUDA graph, after `warm_up`, or the call itself, has run once outside of it."""
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            (warm_up or call)()
        self.cuda.current_stream().wait_stream(stream)
        return self.record(call, stream)

    def record(self, call: Call, stream: Any) -> Replay:
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph, stream=stream):
            outputs = call()
        return Replay(graph.replay, lambda: outputs)


MACHINES: dict[str, type[Cpu] | type[Gpu]] = {"cpu": Cpu, "cuda": Gpu}


def pytorch_calls(call: Call) -> int:
    """Operators and compiled graphs that a call enters; those inside other operators do not count."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()

    def is_operator(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
        return "CompiledFxGraph" in event.name or ("::" in event.name and not event.name.startswith("autograd::"))

    def is_outermost(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
        parent = event.cpu_parent
        while parent is not None:
            if is_operator(parent):
                return False
            parent = parent.cpu_parent
        return True

    return sum(is_operator(event) and is_outermost(event) for event in profile.events())
