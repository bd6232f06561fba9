"""These tests run the kernels in Triton's interpreter, which needs a process of its own: ../test_interpreter.py."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import moment_ops as mo

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _rounded_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates float32 to bfloat16 and is wrong for subnormal numbers; GPUs round to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, destination: Any, mode: Any) -> Any:
        if (source, destination) == (tl.float32, tl.bfloat16):
            wide = torch.from_numpy(np.array(values, dtype=np.float32))
            return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        if (source, destination) == (tl.bfloat16, tl.float32):
            return (np.asarray(values).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return convert(values, source, destination, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture(params=["triton"])
def backend(request: pytest.FixtureRequest, poisoned_memory: None) -> Iterator[str]:
    """The only backend here, on poisoned memory."""
    with mo.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs add the products of every sum in one order; the BLAS of numpy in another for each kind of processor."""
    from triton.runtime import interpreter

    def dot(builder: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        dtype = d.data.dtype
        total = np.zeros(d.data.shape, dtype)
        for column, row in zip(a.data.astype(dtype).T, b.data.astype(dtype), strict=True):
            total += np.multiply.outer(column, row)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
