"""`make test-gpu`: every operator on every GPU backend against float64 on the CPU; all skipped without a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moment_ops as mo
from moment_ops.ops import backends

# Deterministic algorithms, which poisoned memory switches on, forbid cuBLAS without such a workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).parent
BACKENDS = ("cuda", "triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no GPU that torch can use"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, poisoned_memory: None) -> Iterator[str]:
    """Forces each backend that this machine has in turn, on poisoned memory."""
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with mo.backend(request.param):
        yield request.param


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
