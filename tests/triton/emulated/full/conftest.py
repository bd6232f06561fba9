"""Collected by `make test-emulated` alone, which goes on where it was stopped: two hours of a core."""

import hashlib
import os
from importlib import metadata
from pathlib import Path

import pytest

TRITON = Path(__file__).parents[2]
ROOT = TRITON.parents[1]
# What a result depends on.
SOURCES = (ROOT / "kernels", ROOT / "moment_ops" / "ops", TRITON / "specs", TRITON / "emulator", TRITON / "emulated")

WANTED = os.environ.get("MOMENT_OPS_TEST") == "emulated"
if not WANTED:
    collect_ignore_glob = ["test_*.py"]


def _passed(config: pytest.Config) -> Path | None:
    """The names of what has passed with these sources; `--cache-clear` forgets them."""
    if not WANTED or not config.pluginmanager.has_plugin("cacheprovider"):
        return None
    digest = hashlib.sha256(metadata.version("triton").encode())
    for folder in SOURCES:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return config.cache.mkdir("emulated") / digest.hexdigest()[:16]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = _passed(config)
    names = set(path.read_text().splitlines()) if path and path.exists() else set()
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
    path = _passed(session.config)
    # Workers report to the main process.
    if path and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Recorder(path))
