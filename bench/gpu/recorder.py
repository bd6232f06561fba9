"""A plugin of pytest that writes every outcome down at once, and ends a process that hangs or whose device is dead.

`-p bench.gpu.recorder`; the supervisor of pytest, or xdist, goes on in a fresh process. Nothing is imported here
that takes time.
"""

import faulthandler
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Where outcomes go, tests that need not run, seconds until a test counts as hung.
FOLDER, DONE, SECONDS = "MOMENT_OPS_RECORDER_FOLDER", "MOMENT_OPS_RECORDER_DONE", "MOMENT_OPS_RECORDER_SECONDS"
POISONED = 70
DEVICE_ERRORS = ("CUDA error", "AcceleratorError", "CUDA_ERROR")


class Recorder:
    """Of one process that runs tests. Processes of xdist write to files of their own."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / f"outcomes-{os.getpid()}.jsonl").open("a")
        self.hang = (folder / f"hangs-{os.getpid()}.txt").open("w")
        self.seconds = float(os.environ[SECONDS])
        self.outcome: dict[str, Any] = {}
        self.device_error = False

    def write(self, **facts: Any) -> None:
        self.file.write(json.dumps(facts) + "\n")
        self.file.flush()

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = set(Path(os.environ[DONE]).read_text().splitlines())
        items[:] = [item for item in items if item.nodeid not in done]
        self.write(collected=len(items))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.outcome = {"test": item.nodeid, "outcome": "passed", "seconds": 0.0}
        self.write(start=item.nodeid, process=os.getpid())
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.hang)
        result = yield
        faulthandler.cancel_dump_traceback_later()
        self.write(**self.outcome)
        if self.device_error and not _device_is_alive():
            os._exit(POISONED)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report: Any = yield
        self.outcome["seconds"] = round(self.outcome["seconds"] + report.duration, 3)
        if report.skipped and self.outcome["outcome"] == "passed":
            self.outcome |= {"outcome": "skipped", "error": str(call.excinfo and call.excinfo.value)}
        if report.failed:
            problem = call.excinfo.value if call.excinfo else ""
            text = f"{type(problem).__name__}: {problem}".strip()
            self.device_error = self.device_error or any(error in text for error in DEVICE_ERRORS)
            frames = str(report.longrepr).splitlines()
            first = " ".join(text.splitlines()[:2])[:400]
            self.outcome |= {"outcome": "failed", "when": report.when, "error": first, "traceback": frames[-12:]}
        return report


def _device_is_alive() -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    try:
        torch.cuda.synchronize()
        return True
    except Exception:
        return False


def pytest_configure(config: pytest.Config) -> None:
    # The process that only hands tests out to others runs none.
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return
    if FOLDER in os.environ:
        config.pluginmanager.register(Recorder(Path(os.environ[FOLDER])), "moment-ops-recorder")
