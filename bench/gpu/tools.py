"""Programs that cases run: where they are, and how they ended."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.cases import Context, MissingTool

ROOT = Path(__file__).parents[2]
# Left of a case's time when its program is stopped, so that the case can say what it knows.
GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Ended:
    """A program that ran: exit code, negative for a signal, None where it was stopped at its limit; its output."""

    code: int | None
    text: str
    seconds: float

    @property
    def how(self) -> str:
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        return f"signal {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


class Tools:
    """The programs of this machine."""

    # Where tools of CUDA are that are not on the PATH.
    folders = ("/usr/local/cuda/bin",)
    # When a test counts as hung.
    seconds_per_test = 90.0
    # What times are multiplied with that are spent on as much as possible.
    patience = 1.0

    def __init__(self, context: Context) -> None:
        self.context = context

    def path(self) -> str:
        return os.pathsep.join([os.environ.get("PATH", ""), *self.folders])

    def which(self, tool: str) -> str:
        found = self._find(tool)
        if found is None:
            raise MissingTool(f"missing tool: {tool}")
        return found

    def _find(self, tool: str) -> str | None:
        return shutil.which(tool, path=self.path())

    def module(self, name: str, *arguments: str) -> list[str]:
        """The command that runs a module of the benches."""
        return [sys.executable, "-m", name, *arguments]

    def build_command(self) -> list[str]:
        return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]

    def test_targets(self) -> list[str]:
        return ["tests/gpu"]

    def synchronize(self) -> None:
        """Programs have ended when they return."""

    def seconds(self, most: float) -> float:
        """What a program may take: at most until shortly before the stage ends."""
        return max(min(most, self.context.deadline - time.monotonic()) - GRACE_SECONDS, 1.0)

    def run(
        self,
        command: Sequence[str],
        seconds: float,
        environment: Mapping[str, str] | None = None,
        poll: Callable[[], object] = lambda: None,
    ) -> Ended:
        """Run a program to its end or its limit; `poll` is called about once a second meanwhile."""
        start = time.monotonic()
        log = self.context.scratch / f"run-{os.getpid()}-{time.monotonic_ns()}.log"
        variables = {**os.environ, "PATH": self.path(), **(environment or {})}
        # A file, not a pipe: a grandchild that lives on would keep a pipe open.
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            code = self._wait(process, start + seconds, poll)
            if code is None:
                process.terminate()
                if self._wait(process, time.monotonic() + GRACE_SECONDS / 2) is None:
                    process.kill()
                    process.wait()
        text = log.read_text(errors="replace")
        log.unlink()
        return Ended(code, text, time.monotonic() - start)

    @staticmethod
    def _wait(process: "subprocess.Popen[bytes]", end: float, poll: Callable[[], object] = lambda: None) -> int | None:
        """The exit code; None where it still runs at `end`."""
        while (left := end - time.monotonic()) > 0:
            try:
                return process.wait(timeout=min(left, 1.0))
            except subprocess.TimeoutExpired:
                poll()
        return process.poll()
