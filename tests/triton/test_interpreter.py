"""The kernels' numbers, without a GPU: in Triton's interpreter, which is chosen when the kernels are imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreter"
# Each takes about a minute. Every run executes the same kernels as compiled code in the emulator.
LONG = {path.name for path in FOLDER.glob("test_*.py")} - {"test_launch.py"}
SKIPPED = set() if os.environ.get("MOMENT_OPS_TEST") == "emulated" else LONG


@pytest.mark.parametrize("file", sorted({path.name for path in FOLDER.glob("test_*.py")} - SKIPPED))
def test_the_kernels_compute_what_the_reference_computes(file):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[2],
    )
    assert result.returncode == 0, result.stdout + result.stderr
