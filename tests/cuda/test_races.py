"""The CUDA kernels' own sources under ThreadSanitizer: no races, and no barrier or fence that nothing needs."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import host_module
import pytest

RACE = 66


def barriers_and_fences() -> list[str]:
    """FILE:LINE of each in the kernels."""
    return [
        f"{path.name}:{number}"
        for path in sorted((host_module.ROOT / "csrc/device").glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"__(sync|threadfence)\w*\(", line.partition("//")[0])
    ]


def unavailable(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """csrc/testing/races.cpp; skips, and fails in CI, where ThreadSanitizer cannot run."""
    # Under it, memory has to lie where it expects it.
    if shutil.which("setarch") is None:
        unavailable("no setarch, which turns the randomisation of addresses off")
    if subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode != 0:
        unavailable("setarch -R is not permitted, which turns the randomisation of addresses off")
    probe = tmp_path_factory.mktemp("tsan") / "probe"
    command = [host_module.compiler(), "-fsanitize=thread", "-x", "c++", "-", "-o", str(probe)]
    if subprocess.run(command, input=b"int main() {}", capture_output=True, check=False).returncode != 0:
        unavailable("the C++ compiler has no ThreadSanitizer")
    if run(probe).returncode != 0:
        unavailable("ThreadSanitizer does not run on this machine")
    # Not optimized: the kernels' accesses as the source has them.
    return host_module.build("races.cpp", "races", "-O0", "-g", "-pthread", "-fsanitize=thread")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}"}
    command = ["setarch", "-R", str(program), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_no_kernel_has_a_race(program):
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr[:5000]


@pytest.mark.parametrize("site", barriers_and_fences())
def test_every_barrier_and_fence_prevents_a_race(program, site):
    """A race is reported where threads still wait there, but it orders nothing."""
    result = run(program, site)
    assert result.returncode == RACE, f"nothing needs what is at {site}\n{result.stdout}{result.stderr[:5000]}"
    assert "data race" in result.stderr
