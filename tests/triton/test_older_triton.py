"""The budgets hold with the older Triton, too, that many GPU machines have: torch 2.11 comes with it.

It lies beside the environment, and takes the place of the newer one in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
(VERSION,) = re.findall(r"^# triton for the compiled tests: (\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
FOLDER = Path(sys.prefix) / f"triton-{VERSION}"
LONG = os.environ.get("MOMENT_OPS_TEST") == "emulated"

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"triton {VERSION} is not in {FOLDER}; `make build`")


def run(*arguments):
    path = [str(FOLDER), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_the_process_has_the_older_version():
    assert run("-c", "import triton; print(triton.__version__)").stdout.strip() == VERSION


# Some of them in every run, all of them in `make test-emulated`.
@pytest.mark.parametrize("specs", ["sm_80", "sm_90", "sm_100"] if LONG else ["sm_90 and fp32"])
def test_the_kernels_stay_within_their_budgets(specs):
    tests = "tests/triton/test_compiled.py"
    result = run("-m", "pytest", "-p", "no:cacheprovider", tests, "-k", f"budget and {specs}")
    assert result.returncode == 0, result.stdout + result.stderr
