"""`tests/gpu` in several processes; every outcome is a record."""

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu import recorder
from bench.gpu.cases import CRASHED, FAILED, HUNG, OK, Case, Context, Emit
from bench.gpu.records import cut_middle
from bench.gpu.tools import Tools

MOST_PROCESSES = 8
# How often pytest is started anew after it died.
MOST_STARTS = 6
SKIPPED = "skipped"
_STATUS = {"passed": OK, "failed": FAILED, "skipped": SKIPPED}


def _command(tools: Tools) -> list[str]:
    plugins = ["-p", "bench.gpu.recorder", "-p", "no:cacheprovider"]
    command = tools.module("pytest", *tools.test_targets(), "-q", "--no-header", "--tb=short", *plugins)
    if importlib.util.find_spec("xdist") is not None:
        processes = max(min(MOST_PROCESSES, len(os.sched_getaffinity(0))), 1)
        command += ["-n", str(processes), f"--max-worker-restart={10 * processes}"]
    return command


def _lives(process: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked for its exit code does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


class _Watch:
    """What is known of the tests, from the files that the recorder writes."""

    def __init__(self, folder: Path, done: frozenset[str], emit: Emit) -> None:
        self.folder, self.emit = folder, emit
        self.done = set(done)
        self._earlier = len(self.done)
        # To run, of the first collection: later ones leave out what has run by then.
        self.tests = 0
        self._started: dict[str, int] = {}

    def _lines(self) -> Iterator[dict[str, Any]]:
        for file in sorted(self.folder.glob("outcomes-*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue

    def read(self) -> None:
        """Record new outcomes."""
        for line in self._lines():
            if "collected" in line:
                self.tests = max(self.tests, line["collected"])
            elif "start" in line:
                self._started.setdefault(line["start"], line["process"])
            elif line["test"] not in self.done:
                self.done.add(line["test"])
                self.emit(line | {"status": _STATUS[line["outcome"]]})

    def look(self) -> None:
        """Record new outcomes, and tests whose process has ended without one."""
        self.read()
        gone = [test for test, process in self._started.items() if test not in self.done and not _lives(process)]
        if gone:
            # One may have ended well in the meantime.
            self.read()
        for test in gone:
            if test in self.done:
                continue
            hang = self.folder / f"hangs-{self._started[test]}.txt"
            lines = hang.read_text().splitlines() if hang.exists() else []
            self.done.add(test)
            error = "no end within its time" if lines else "its process ended"
            self.emit({"test": test, "status": HUNG if lines else CRASHED, "error": error, "traceback": lines[:8]})

    @property
    def missing(self) -> int:
        return max(self.tests - (len(self.done) - self._earlier), 0)


def _suite(tools: Tools, emit: Emit) -> dict[str, Any]:
    folder = tools.context.scratch / f"tests-{os.getpid()}"
    folder.mkdir()
    watch = _Watch(folder, tools.context.tests_done, emit)
    environment = {
        "OMP_NUM_THREADS": "2",
        recorder.FOLDER: str(folder),
        recorder.DONE: str(folder / "done"),
        recorder.SECONDS: str(tools.seconds_per_test),
    }
    end = time.monotonic() + tools.seconds(3600)
    texts: list[str] = []
    for _ in range(MOST_STARTS):
        before = len(watch.done)
        (folder / "done").write_text("\n".join(watch.done))
        ended = tools.run(_command(tools), end - time.monotonic(), environment, watch.look)
        # What ran when pytest was stopped has not crashed.
        (watch.read if ended.code is None else watch.look)()
        texts.append(f"{ended.how}: {cut_middle(ended.text, 3000)}")
        # Without xdist pytest dies with a test; it goes on with the others.
        if ended.code is None or watch.missing == 0 or len(watch.done) == before:
            break
    return {"tests": watch.tests, "not_run": watch.missing, "pytest": texts}


def cases(context: Context) -> list[Case]:
    return [Case("tests/gpu", _suite, 3600.0)]
