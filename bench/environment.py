"""Where and with what a result was measured."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import moment_ops
from moment_ops.ops import backends

_ROOT = Path(__file__).parent.parent


def cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The commit that is checked out; `+` where tracked files differ from it."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: str = "cpu") -> dict[str, Any]:
    """The environment as it goes into a result."""
    gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"{cpu_name()}, {cores()} cores",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moment_ops": moment_ops.__version__,
        "backend": backends.chosen("moments", torch.device(device).type),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def line(environment: dict[str, Any]) -> str:
    """The environment in one line."""
    return lines([environment])[0]


def lines(environments: Sequence[dict[str, Any]]) -> list[str]:
    """One line for all that differ in the load alone."""
    loads: dict[str, list[float]] = {}
    for environment in environments:
        text = (
            f"{environment['device']}, {environment['threads']} threads, {environment['instructions']};"
            f" Python {environment['python']}, torch {environment['torch']}, moment_ops {environment['moment_ops']}"
            f" ({environment['backend']} backend, commit {environment['commit']}); {environment['date']}"
        )
        loads.setdefault(text, []).append(environment["load"])
    return [f"{text}, load before the run {_range(found)}" for text, found in loads.items()]


def _range(loads: Sequence[float]) -> str:
    known = sorted({load for load in loads if load is not None})
    return " to ".join(map(str, dict.fromkeys(known[:1] + known[-1:]))) or "unknown"
