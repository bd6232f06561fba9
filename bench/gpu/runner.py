"""The supervisor of workers: it outlives crashes and hangs, and goes on with the next case in a fresh process.

One thread: processes are forked, and a fork of a process with threads may inherit a lock that nobody releases.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench.gpu.cases import CRASHED, FAILED, HUNG, NOT_RUN, Case, Context
from bench.gpu.worker import POISONED, work

# Beyond a case's limit, in which its process may write down where it hangs.
GRACE_SECONDS = 1.0
# Until a process begins its first case.
START_SECONDS = 60.0
# Of processes that are started for one shard.
MOST_STARTS = 12
# Of processes that end before their first case.
MOST_FALSE_STARTS = 2
LOG_LINES = 12

Save = Callable[[Case, dict[str, Any]], None]


@dataclass
class _Worker:
    """A process and what it is doing."""

    process: BaseProcess
    connection: Any
    shard: "_Shard"
    log: Path
    limit: float
    current: str | None = None
    log_start: int = 0


@dataclass
class _Shard:
    """Cases that run one after another."""

    waiting: list[Case]
    starts: int = 0
    false_starts: int = 0
    finished: set[str] = field(default_factory=set)
    last_words: list[str] = field(default_factory=list)


class Runner:
    """Runs the cases of one stage.

    Args:
        method: how processes are started: "fork" has everything imported already, "spawn" imports it anew.
        most: processes side by side.
        save: gets a case and its result as soon as it ends, and facts that it sends before.
    """

    def __init__(self, context: Context, stage: str, method: str, most: int, save: Save) -> None:
        self.context, self.stage, self.most, self.save = context, stage, most, save
        self.processes = multiprocessing.get_context(method)
        self._active: list[_Worker] = []
        self._queue: list[_Shard] = []

    def run(self, cases: Sequence[Case]) -> None:
        """Every case is saved, at the latest when the stage's time is over."""
        self._cases = {case.name: case for case in cases}
        shards: dict[str, list[Case]] = {}
        for case in cases:
            shards.setdefault(case.shard, []).append(case)
        self._queue = [_Shard(part) for part in shards.values()]
        try:
            while self._queue or self._active:
                while self._queue and len(self._active) < self.most:
                    self._start(self._queue.pop(0))
                self._listen()
                self._look_after()
        finally:
            for worker in list(self._active):
                self._kill(worker)

    def _start(self, shard: _Shard) -> None:
        if shard.starts >= MOST_STARTS or shard.false_starts >= MOST_FALSE_STARTS:
            self._give_up(shard, "processes end before their cases do", CRASHED)
            return
        shard.starts += 1
        ours, theirs = self.processes.Pipe(duplex=False)
        log = self.context.scratch / f"{self.stage}-{time.monotonic_ns()}.log"
        log.touch()
        names = [case.name for case in shard.waiting]
        process = self.processes.Process(target=work, args=(theirs, self.context, self.stage, names, log))
        process.start()
        theirs.close()
        self._active.append(_Worker(process, ours, shard, log, time.monotonic() + START_SECONDS))

    def _listen(self) -> None:
        now = time.monotonic()
        next_limit = min([worker.limit for worker in self._active] + [self.context.deadline])
        # A process may end without closing its pipe, where a grandchild has it: look at least twice a second.
        ready = wait([worker.connection for worker in self._active], timeout=min(max(next_limit - now, 0.01), 0.5))
        for worker in self._active:
            if worker.connection in ready:
                self._receive(worker)

    def _receive(self, worker: _Worker) -> None:
        """Everything that a process has sent."""
        with suppress(EOFError, OSError):
            while worker.connection.poll():
                kind, *rest = worker.connection.recv()
                if kind == "start":
                    worker.current, seconds, worker.log_start = rest
                    worker.limit = time.monotonic() + seconds + GRACE_SECONDS
                elif kind == "facts":
                    self.save(self._cases[rest[0]], {"status": "so far", "facts": rest[1]})
                elif kind == "end":
                    self._finish(worker, rest[1])

    def _finish(self, worker: _Worker, result: dict[str, Any]) -> None:
        """The current case has a result."""
        assert worker.current is not None
        name, worker.current, worker.limit = worker.current, None, float("inf")
        worker.shard.waiting = [case for case in worker.shard.waiting if case.name != name]
        worker.shard.finished.add(name)
        if result["status"] == FAILED and (log := self._log_lines(worker)):
            result = {**result, "log": log}
        self.save(self._cases[name], result)

    def _look_after(self) -> None:
        now = time.monotonic()
        for worker in list(self._active):
            if now > self.context.deadline:
                self._kill(worker)
                self._give_up(worker.shard, "the stage's time was over")
            elif now > worker.limit:
                late = worker.current
                self._kill(worker)
                if late is None:
                    self._count_false_start(worker)
                elif late == worker.current:
                    limit = self._cases[late].seconds
                    self._finish(worker, self._death(worker, HUNG, f"no end after {limit:g} s"))
                self._start_again(worker.shard)
            elif not worker.process.is_alive():
                self._kill(worker)
                if worker.current is not None:
                    self._finish(worker, self._death(worker, CRASHED, f"the process ended with {_how(worker)}"))
                elif not worker.shard.finished:
                    self._count_false_start(worker)
                self._start_again(worker.shard)
        if now > self.context.deadline:
            for shard in self._queue:
                self._give_up(shard, "the stage's time was over")
            self._queue = []

    def _count_false_start(self, worker: _Worker) -> None:
        worker.shard.false_starts += 1
        worker.shard.last_words = self._log_lines(worker)

    def _start_again(self, shard: _Shard) -> None:
        if shard.waiting:
            self._queue.insert(0, shard)

    def _kill(self, worker: _Worker) -> None:
        """End a process with all that it started, after what it sent was read."""
        self._receive(worker)
        with suppress(ProcessLookupError, PermissionError):
            assert worker.process.pid is not None
            os.killpg(worker.process.pid, signal.SIGKILL)
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join(5)
        worker.connection.close()
        self._active.remove(worker)

    def _death(self, worker: _Worker, status: str, error: str) -> dict[str, Any]:
        return {"status": status, "error": error, "log": self._log_lines(worker)}

    def _give_up(self, shard: _Shard, why: str, status: str = NOT_RUN) -> None:
        for case in shard.waiting:
            self.save(case, {"status": status, "error": why, "log": shard.last_words})
            status = NOT_RUN
        shard.waiting = []

    def _log_lines(self, worker: _Worker) -> list[str]:
        """The first lines that a process has written since its case began: of a crash, where it was."""
        with worker.log.open(errors="replace") as stream:
            stream.seek(worker.log_start)
            lines = [line.rstrip()[:200] for line in stream if line.strip()]
        return lines[:LOG_LINES]


def _how(worker: _Worker) -> str:
    code = worker.process.exitcode
    if code == POISONED:
        return "an error of the device"
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
