import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import host_module
import pytest

from moment_ops.ops import extension

# The emulator is there.
sys.path.append(str(Path(__file__).parents[1] / "triton"))


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The CUDA kernels' own sources on the host; another build of them where the environment names one."""
    path = os.environ.get("MOMENT_OPS_TESTING_MODULE")
    return host_module.load(Path(path) if path else host_module.build_module("-O1"))


@pytest.fixture(scope="session")
def library() -> Path:
    """The extension with the compiled kernels."""
    if extension.missing("CUDA") is not None:
        if shutil.which("nvcc") and extension.missing("CPU") is None:
            pytest.fail(f"there is an nvcc, but {extension.missing('CUDA')}; build again")
        pytest.skip(str(extension.missing("CUDA")))
    return extension.LIBRARY
