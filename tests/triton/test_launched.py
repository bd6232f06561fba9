"""The way from a call to the driver, without a GPU: Triton's own launcher, and a driver that keeps what it is given.

For both versions of Triton: they unpack tuples, records and constants among the arguments in different ways.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from test_older_triton import FOLDER

LAUNCHED = Path(__file__).parent / "launched"
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="Triton's launcher needs a C compiler")


@pytest.mark.parametrize("older", [False, True])
def test_the_driver_receives_all_arguments(older, tmp_path):
    if older and not FOLDER.exists():
        pytest.skip(f"no {FOLDER}")
    library = tmp_path / "libcuda.so.1"
    name = "-Wl,-soname,libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", name, "-o", library, LAUNCHED / "libcuda.c"], check=True)
    path = [str(FOLDER)] * older + [os.environ.get("PYTHONPATH", "")]
    # Triton's modules are linked against this driver: they have a cache of their own.
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(LAUNCHED)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=LAUNCHED.parents[2],
    )
    assert result.returncode == 0, result.stdout + result.stderr
