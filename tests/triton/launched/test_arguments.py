"""What Triton's launcher hands to the driver: every argument of a first call, and of later ones."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver

from moment_ops.kernels import (
    _launch,
    covariance,
    covariance_backward,
    covariance_match,
    gram,
    match,
    moments,
    relu_moments,
)
from moment_ops.ops import triangle
from moment_ops.ops.averages import AVERAGES
from moment_ops.ops.records import CovarianceMatch, Match

LIBRARY = ctypes.CDLL(str(Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"))
SIZES = {"i32": 4, "i64": 8}


def flat(type_, value):
    """(bytes, number) of all that a kernel takes of an argument."""
    if isinstance(type_, tuple):
        for pair in zip(type_, value, strict=True):
            yield from flat(*pair)
    elif type_ != "constexpr":
        size = 8 if type_.startswith("*") else SIZES[type_]
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        yield size, number % (1 << 8 * size)


class Launcher(CudaLauncher):
    """Notes what it is given, and what reaches the driver."""

    given, received = [], []

    def __init__(self, source, metadata):
        super().__init__(source, metadata)
        self.signature = source.signature

    def __call__(self, *arguments):
        # Behind the grid, the stream, the function and what hooks are told.
        pairs = zip(self.signature.values(), arguments[9:], strict=True)
        sizes, numbers = zip(*(entry for pair in pairs for entry in flat(*pair)), strict=True)
        ctypes.c_int.in_dll(LIBRARY, "count").value = len(sizes)
        (ctypes.c_int * len(sizes)).in_dll(LIBRARY, "sizes")[:] = sizes
        super().__call__(*arguments)
        self.given.append(list(numbers))
        self.received.append(list((ctypes.c_uint64 * len(sizes)).in_dll(LIBRARY, "values")))


class Driver:
    """Of an H100 that is not there."""

    launcher_cls = Launcher
    utils = CudaUtils()
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """What is launched; calls allocate their workspaces where the last one did."""
    workspaces = {}
    allocate = _launch.Workspace.allocate
    driver.set_active(Driver)
    Launcher.given.clear()
    Launcher.received.clear()
    monkeypatch.setattr(_launch, "_calls", {})
    monkeypatch.setattr(_launch.Workspace, "allocate", lambda self: workspaces.setdefault(self, allocate(self)))


def state_of(average_kind, columns, quantities):
    kind = AVERAGES[average_kind]
    state = [torch.zeros(columns) for _ in range(quantities * len(kind.vectors))]
    if kind.has_started:
        state.append(torch.zeros(columns, dtype=torch.bool))
    return [*state, torch.tensor(0)] if state else []


def run_moments(rows):
    features = [torch.randn(rows, width) for width in (64, 3, 128)]
    mean, var, grad_mean, count = *(torch.rand(195) for _ in range(3)), torch.ones(3, dtype=torch.int64)
    out = [torch.empty_like(x) for x in features]
    return [
        lambda: moments.moments(features, 0, 1, mean, var),
        lambda: moments.moments_backward([], grad_mean, None, features, mean, count, 0, 1, None, out),
    ]


def run_relu_moments():
    x, y, grad, bias = *(torch.randn(9, 64) for _ in range(3)), torch.randn(64)
    mean, var, grad_mean, grad_var = (torch.rand(64) for _ in range(4))
    return [
        lambda: relu_moments.relu_moments(x, bias, 1, y, mean, var),
        lambda: relu_moments.relu_moments_backward(grad, grad_mean, grad_var, y, mean, 1, x),
    ]


def run_match(average_kind, var, weighted):
    features = [torch.randn(9, 64), torch.randn(9, 8)]
    mean, batch_var, target_mean, target_var, weight, grad_mean, grad_var = (torch.rand(72) for _ in range(7))
    options, state = [0.5] * len(AVERAGES[average_kind].options), state_of(average_kind, 72, 1 + var)
    m = Match(
        target_mean, target_var if var else None, 0.5, 2.0, weight if weighted else None, None, 1.0, average_kind,
        options, state, bool(state),
    )  # fmt: skip
    grads = grad_mean, grad_var if var else None
    loss = torch.zeros(())
    return [
        lambda: match.match_(mean, batch_var if var else None, [], 1, m, loss, None, *grads),
        lambda: match.match_(None, None, features, 1, m, loss, mean, *grads),
    ]


def run_covariances(average_kind, keep):
    features = [torch.randn(9, 64), torch.randn(9, 8)]
    cov, mean_64, mean, size = torch.empty(64, 64), torch.empty(64), torch.empty(72), triangle.total_size([64, 8])
    options = [0.5] * len(AVERAGES[average_kind].options)
    targets = [torch.eye(64), torch.rand(triangle.size(8))]
    m = CovarianceMatch(
        targets,
        [1.0, 2.0],
        average_kind,
        options,
        state_of(average_kind, size, 1),
        average_kind != "none",
        keep,
        "ieee",
    )
    grad, loss, scale = torch.empty(size), torch.zeros(()), torch.ones(())
    out = [torch.empty_like(x) for x in features]
    return [
        lambda: covariance.covariance(features[0], 1, keep, "ieee", cov, mean_64),
        lambda: covariance_match.covariance_match_(features, 1, m, loss, mean, grad if keep else None),
        lambda: covariance_backward.covariance_match_backward(grad, None, features, mean, scale, 1, "ieee", out),
    ]


def run_gram():
    rows = [torch.randn(n, width) for n in (5, 3) for width in (64, 8)]
    shift = [torch.randn(x.shape[1]) for x in rows]
    result = torch.empty(2, 8, 8, dtype=torch.float64)
    return [lambda: gram.gram(rows, shift, 2, result)]


CALLS = {
    "moments": lambda: run_moments(9),
    "moments in chunks": lambda: run_moments(3000),
    "relu_moments": run_relu_moments,
    "match_": lambda: run_match("none", True, True),
    "match_, without variances": lambda: run_match("none", False, False),
    "match_, moving": lambda: run_match("moving", True, False),
    "match_, ADAM": lambda: run_match("adam", True, False),
    "match_, ADAM, without variances": lambda: run_match("adam", False, True),
    "covariances, ADAM": lambda: run_covariances("adam", True),
    "covariances, moving, without the derivative": lambda: run_covariances("moving", False),
    "Gram matrices": run_gram,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_driver_receives_what_a_first_and_a_later_call_give(name):
    for call in CALLS[name]():
        call()
        first = list(Launcher.received)
        assert first
        assert Launcher.given == first
        assert _launch._calls
        Launcher.received.clear()
        call()
        assert Launcher.received == first
        assert Launcher.given == first + first
        Launcher.received.clear()
        Launcher.given.clear()
        _launch._calls.clear()
