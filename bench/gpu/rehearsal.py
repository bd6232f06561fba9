"""A run without a GPU: the same code on CPU tensors, with one failure of every kind put in.

What stands between the code and a device is replaced, under the same names: `torch.cuda`, the tools, torch.compile.
Nothing that comes out of it is a measurement, and everything says so.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import moment_ops as mo
from bench.gpu.cases import Case, Context, Emit
from bench.gpu.device import Device
from bench.gpu.tools import Tools
from bench.machine import Call, Replay
from bench.workloads import WORKLOADS, Workload
from moment_ops.ops import reference_gram

STAMP = "rehearsal, no GPU"
# What runs in the place of a backend.
STAND_INS = {"cuda": "cpu", "triton": "reference", "reference": "reference"}
# The one whose inner products are wrong.
WRONG_GRAM = "triton"
HANG_SECONDS = 2.0
# All of so many cases are rehearsed.
FEW = 8
DEVICE_ERROR = "CUDA error: an illegal memory access was encountered"


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_Event") -> float:
        return 1e3 * (end.time - self.time)


class _Stream:
    def wait_stream(self, stream: "_Stream") -> None:
        pass


class RehearsedCuda:
    """What the benches use of `torch.cuda`, under the same names and with the same arguments."""

    Event, Stream = _Event, _Stream
    profiler = SimpleNamespace(start=lambda: None, stop=lambda: None)

    def __init__(self) -> None:
        self.sync_debug_mode = "default"

    def is_available(self) -> bool:
        return True

    def empty_cache(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def current_stream(self) -> _Stream:
        return _Stream()

    def stream(self, stream: _Stream) -> Any:
        return nullcontext()

    def set_sync_debug_mode(self, debug_mode: str) -> None:
        self.sync_debug_mode = debug_mode

    def reset_peak_memory_stats(self) -> None:
        pass

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 0

    def get_device_name(self) -> str:
        return STAMP

    def get_device_properties(self, device: int) -> Any:
        return SimpleNamespace(major=0, minor=0, multi_processor_count=0, L2_cache_size=1, total_memory=0)


class RehearsedDevice(Device):
    """The CPU in the place of a GPU."""

    device = "cpu"
    FLUSH_BYTES = PROBE_BYTES = 4096
    rounds = 2
    patience = 0.0

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.cuda = RehearsedCuda()
        self.is_dead = False

    def start(self) -> None:
        super().start()
        torch.compile = lambda function, **options: function  # type: ignore[assignment]

    def tools(self) -> Tools:
        return RehearsedTools(self.context)

    def unavailable(self, backend: str) -> str | None:
        return super().unavailable("cpu") if backend == "cuda" else None

    @contextmanager
    def backend(self, name: str) -> Iterator[None]:
        original = reference_gram.gram
        wrong = mock.patch.object(reference_gram, "gram", lambda *arguments: 1.01 * original(*arguments))
        with mo.backend(STAND_INS[name]), wrong if name == WRONG_GRAM else nullcontext():
            yield

    def workload(self, name: str) -> Workload:
        """Small ones; that of a network has to be one of its own."""
        return replace(WORKLOADS["digits" if name in ("vgg19", "gfmn") else "tiny"], batch=4)

    def alive(self) -> bool:
        return not self.is_dead and super().alive()

    def record(self, call: Call, stream: Any) -> Replay:
        """Runs the call at every replay, and not before, as a capture runs nothing."""
        outputs: list[Any] = []

        def again() -> None:
            outputs[:] = [call()]

        return Replay(again, lambda: outputs[0])


def _raises(device: RehearsedDevice, emit: Emit) -> None:
    raise RuntimeError("an exception of the rehearsal")


def _crashes(device: RehearsedDevice, emit: Emit) -> None:
    # To this thread: a signal to the process may be taken by the one that watches the time.
    signal.raise_signal(signal.SIGSEGV)


def _hangs(device: RehearsedDevice, emit: Emit) -> None:
    time.sleep(3600)


def _kills_device(device: RehearsedDevice, emit: Emit) -> None:
    device.is_dead = True
    raise RuntimeError(DEVICE_ERROR)


# By the beginning of a case's name.
FAILURES = {
    "identity_moments: triton": _raises,
    "coral_loss, wide: reference": _raises,
    "style_loss: reference": _kills_device,
    "MomentLoss, moving, means alone: reference": _hangs,
    "relu_moments, bias: reference": _crashes,
    "mean and var, 1 layer: eager": _crashes,
}


def prepared(cases: Sequence[Case]) -> list[Case]:
    """Some of the cases, so that every operator, backend and dtype is among them; failures in some of these."""
    kept = _kept(cases)
    chosen = [case for case in cases if case.name in kept]
    return [_with_failure(replace(case, shard=case.tags.get("backend", ""))) for case in chosen]


def _kept(cases: Sequence[Case]) -> set[str]:
    if len(cases) <= FEW:
        return {case.name for case in cases}
    groups: dict[str, list[Case]] = {}
    for case in cases:
        operator, _, rest = case.name.partition(": ")
        groups.setdefault(operator if rest else case.tags.get("family", operator), []).append(case)
    kept, seen = set(), set()
    for i, group in enumerate(groups.values()):
        # Another backend, dtype, size and layout for each of them.
        healthy = [case for case in group if not case.name.startswith(tuple(FAILURES))] or group
        kept.add(healthy[7 * i % len(healthy)].name)
        for case in group:
            # Factors depend on tags; a layout, or what else a name ends with, is tried once at least.
            marks = [tuple(sorted(case.tags.items())), case.name.rpartition(", ")[2]]
            marks += [name for name in FAILURES if case.name.startswith(name)]
            if "backend" in case.tags and not seen.issuperset(marks):
                seen.update(marks)
                kept.add(case.name)
    return kept


def _with_failure(case: Case) -> Case:
    for name, run in FAILURES.items():
        if case.name.startswith(name):
            return replace(case, run=run, seconds=HANG_SECONDS if run is _hangs else case.seconds)
    return case


_STUBS = {
    "nvidia-smi": "echo 'rehearsal (no GPU), none, P0, 0, 0, 0, 0, 0, 0, 0, 0, 0, none, none'",
    "gcc": "echo 'gcc (rehearsal) 0.0'",
    "ninja": "echo 0.0",
    # Runs the program under memcheck alone, and finds a race.
    "compute-sanitizer": """
case "$*" in
  --version) echo 'Version 0.0 (rehearsal)'; exit 0;;
  *memcheck*moment_ops*) shift 6; "$@" || exit 1; echo '========= ERROR SUMMARY: 0 errors';;
  *racecheck*moment_ops*) echo '========= Error: Race reported between Write access and Read access (rehearsal)'
    echo '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'; exit 9;;
  *racecheck*) echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)';;
  *) echo '========= ERROR SUMMARY: 0 errors';;
esac""",
    # Runs the program for one backend, and refuses the other.
    "ncu": """
case "$*" in
  --version) echo 'Version 0.0 (rehearsal)'; exit 0;;
  *main_kernels\\ cuda*) while [ "$1" != - ] && [ ! -x "$1" ]; do shift; done; "$@" || exit 1
    echo '==PROF== rehearsal'
    echo '"ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread"'
    echo '"","","","ns","byte","register/thread"'
    echo '"0","rehearsal::no_kernel<float>(Arguments)","(1, 1, 1)","1,000","2,000,000","32"';;
  *) echo '==ERROR== rehearsal'; exit 1;;
esac""",
}

_TESTS = """
import signal, time
import pytest

def test_that_passes(): pass
def test_that_fails(): assert 1 == 2
def test_that_is_skipped(): pytest.skip("a skip of the rehearsal")
def test_that_crashes(): signal.raise_signal(signal.SIGSEGV)
def test_that_hangs(): time.sleep(3600)
def test_whose_device_dies(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_that_comes_last(): pass
"""


def _write(path: Path, text: str) -> None:
    """An executable file, at once: another process may be about to run it."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(0o755)
    temporary.replace(path)


class RehearsedTools(Tools):
    """Programs that print what they might print. There is no nvcc."""

    seconds_per_test = 5.0
    patience = 0.01

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.folders = (str(context.scratch / "bin"),)
        self.tests = context.scratch / "test_rehearsal.py"
        _write(self.tests, _TESTS)
        for name, text in _STUBS.items():
            _write(context.scratch / "bin" / name, f"#!/usr/bin/env bash\n{text}\n")

    def path(self) -> str:
        return os.pathsep.join([*self.folders, os.environ.get("PATH", "")])

    def _find(self, tool: str) -> str | None:
        return shutil.which(tool, path=self.folders[0])

    def module(self, name: str, *arguments: str) -> list[str]:
        return super().module(name, *arguments, *([] if name == "pytest" else ["--rehearse"]))

    def build_command(self) -> list[str]:
        return [sys.executable, "-c", f"print('{STAMP}: nothing was built')"]

    def test_targets(self) -> list[str]:
        return [str(self.tests)]
