"""These tests take half an hour, and are collected by `make test-emulated` alone. It goes on where it was stopped."""

import hashlib
import os
from pathlib import Path

import pytest

TRITON = Path(__file__).parents[2]
KERNELS = TRITON.parents[1] / "kernels"

if os.environ.get("MOMENT_OPS_TEST") != "emulated":
    collect_ignore_glob = ["test_*.py"]


def _passed(config: pytest.Config) -> Path:
    """The names of what has passed with these sources; `--cache-clear` forgets them."""
    digest = hashlib.sha256()
    for folder in (KERNELS, TRITON / "emulator", TRITON / "emulated"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return config.cache.mkdir("emulated") / digest.hexdigest()[:16]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = _passed(config)
    names = set(path.read_text().splitlines()) if path.exists() else set()
    done = [item for item in items if item.nodeid in names]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in names]


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and "/full/" in report.nodeid:
            with self._path.open("a") as file:
                file.write(report.nodeid + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    # Workers report to the main process.
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Recorder(_passed(session.config)))
