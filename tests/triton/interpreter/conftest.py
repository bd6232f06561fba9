"""These tests run the kernels in Triton's interpreter, which needs a process of its own: ../test_interpreter.py."""

import os
from collections.abc import Iterator

import pytest

import moment_ops as mo

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(params=["triton"])
def backend(request: pytest.FixtureRequest, poisoned_memory: None) -> Iterator[str]:
    """The only backend here, on poisoned memory."""
    with mo.backend(request.param):
        yield request.param
