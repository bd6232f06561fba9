"""What a stage consists of: cases, each of which runs guarded and leaves one record at least."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu.device import Device

# How a case ended. What is not there, as a kernel that a backend lacks, is no failure.
OK, WRONG, FAILED, CRASHED, HUNG = "ok", "wrong", "failed", "crashed", "hung"
NOT_RUN, NOT_THERE = "not_run", "not_there"
BAD = (WRONG, FAILED, CRASHED, HUNG)

Emit = Callable[[dict[str, Any]], None]
Run = Callable[["Device", Emit], dict[str, Any] | None]


class Wrong(Exception):
    """A case ran to its end, and what it computed is wrong."""

    def __init__(self, message: str, facts: dict[str, Any]) -> None:
        super().__init__(message)
        self.facts = facts


class NotThere(Exception):
    """What a case is about does not exist here; nothing is wrong."""


class MissingTool(Exception):
    """A program that a case needs is not installed."""


@dataclass(frozen=True)
class Case:
    """Something to find out.

    Args:
        name: unique in its stage.
        run: gets the device and a function that records facts before the end; returns the others.
        seconds: when it counts as hung.
        shard: cases of one shard run one after another in one process, shards side by side.
        tags: what the case is about, for tables.
    """

    name: str
    run: Run
    seconds: float = 60.0
    shard: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What processes of a run have in common.

    Args:
        rehearse: no GPU: everything on the CPU, with failures put in.
        folder: of the results.
        scratch: for logs and temporary files.
        commit: of the sources.
        deadline: when the stage that runs now has to end, by `time.monotonic`.
        trusted: (family, backend, dtype) whose results agreed with float64.
        tests_done: tests that need not run again.
        force_build: builds the library from source though one is there that loads.
    """

    rehearse: bool
    folder: Path
    scratch: Path
    commit: str = "unknown"
    deadline: float = float("inf")
    trusted: frozenset[tuple[str, str, str]] = frozenset()
    tests_done: frozenset[str] = frozenset()
    force_build: bool = False

    def device(self) -> "Device":
        """Imported late: the supervising process starts without torch."""
        if self.rehearse:
            from bench.gpu.rehearsal import RehearsedDevice

            return RehearsedDevice(self)
        from bench.gpu.device import Device

        return Device(self)
