import os
from pathlib import Path
from types import ModuleType

import host_module
import pytest


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The CUDA kernels' own sources on the host; another build of them where the environment names one."""
    path = os.environ.get("MOMENT_OPS_TESTING_MODULE")
    return host_module.load(Path(path) if path else host_module.build_module("-O1"))
