"""Builds `csrc/testing`: the CUDA kernels' own sources compiled for the host."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
NAME = "moment_ops_testing"

# Pragmas and attributes are nvcc's; the last two are clang's names.
WARNINGS = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-maybe-uninitialized"]
WARNINGS += ["-Wno-unknown-warning-option", "-Wno-pass-failed"]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def build(source: str, output: str, *flags: str) -> Path:
    """The path of `output`; built again only where a source or the command has changed."""
    command = [compiler(), "-std=c++20", *flags, *WARNINGS, f"-I{ROOT / 'csrc'}", str(ROOT / "csrc/testing" / source)]
    sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp"))
    digest = hashlib.sha256("".join([*command, *(p.read_text() for p in sources)]).encode()).hexdigest()[:16]
    target = ROOT / "build" / "testing" / digest / output
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        # Processes of one test run wait for the first of them.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            temporary = target.with_suffix(".new")
            subprocess.run([*command, "-o", str(temporary)], check=True)
            temporary.rename(target)
    return target


def build_module(*flags: str) -> Path:
    """The kernels on NumPy arrays."""
    includes = [flag for path in (pybind11.get_include(), sysconfig.get_path("include")) for flag in ("-isystem", path)]
    return build("module.cpp", f"{NAME}.so", "-shared", "-fPIC", *includes, *flags)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
