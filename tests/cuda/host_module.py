"""Builds `csrc/testing`: the CUDA kernels' own sources compiled for the host, called on NumPy arrays."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
NAME = "moment_ops_testing"


def build(*flags: str) -> Path:
    """The module's path; built again only where a source or a flag has changed."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp"))
    digest = hashlib.sha256("".join([*flags, *(p.read_text() for p in sources)]).encode()).hexdigest()[:16]
    target = ROOT / "build" / "testing" / digest / f"{NAME}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        includes = [f"-I{ROOT / 'csrc'}", "-isystem", pybind11.get_include(), "-isystem", _python_include()]
        warnings = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-maybe-uninitialized"]
        command = [compiler, "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", *flags, *warnings, *includes]
        subprocess.run([*command, str(ROOT / "csrc/testing/module.cpp"), "-o", str(temporary)], check=True)
        temporary.rename(target)
    return target


def _python_include() -> str:
    import sysconfig

    return sysconfig.get_paths()["include"]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
