"""Which implementation runs an operator: the fastest that can, or the one that was asked for."""

import functools
import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moment_ops.ops import extension

NAMES = ("auto", "cuda", "triton", "cpu", "reference")

# What `auto` tries per device type, fastest first. ROCm's devices are called "cuda", too.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# The device type that a backend's kernels are for; the reference runs everywhere.
_DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
# The operators with Triton kernels, and where: the function of that name takes the arguments of the overload `native`.
_TRITON = {
    "moments": "moment_ops.kernels.moments",
    "moments_backward": "moment_ops.kernels.moments",
    "match_": "moment_ops.kernels.match",
    "relu_moments": "moment_ops.kernels.relu_moments",
    "relu_moments_backward": "moment_ops.kernels.relu_moments",
    "covariance": "moment_ops.kernels.covariance",
    "covariance_backward": "moment_ops.kernels.covariance_backward",
    "covariance_match_": "moment_ops.kernels.covariance_match",
    "covariance_match_backward": "moment_ops.kernels.covariance_backward",
    "gram": "moment_ops.kernels.gram",
    "gram_backward": "moment_ops.kernels.gram",
}
# The operators whose CPU kernels are Python around the BLAS of PyTorch, and where; they need no extension.
_BLAS = {
    "covariance": "moment_ops.ops.covariance_cpu",
    "covariance_backward": "moment_ops.ops.covariance_cpu",
    "covariance_match_": "moment_ops.ops.covariance_cpu",
    "covariance_match_backward": "moment_ops.ops.covariance_cpu",
    "gram": "moment_ops.ops.gram_cpu",
    "gram_backward": "moment_ops.ops.gram_cpu",
}
# Dtypes that Triton's kernels of an operator take, where not all: the others run on the reference.
_TRITON_DTYPES: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(
    (
        "covariance",
        "covariance_backward",
        "covariance_match_",
        "covariance_match_backward",
        "gram",
        "gram_backward",
    ),
    (torch.float32, torch.bfloat16, torch.float16),
)

# What is known about a backend on a kind of GPU, beyond that it can run.
UNPROVEN_ON_AMD = "compiled for AMD GPUs, never run on one"

_forced = os.environ.get("MOMENT_OPS_BACKEND", "auto")
_warned: set[str] = set()


def _warn_once(about: str, message: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, stacklevel=4)


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(NAMES)}")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every operator onto one backend: `with moment_ops.backend("reference"): ...`.

    Args:
        name: "auto" (the fastest that can run the given tensors), "cuda", "triton", "cpu" or "reference". A forced
            backend that cannot run raises RuntimeError with the reason. The choice holds for the process; the
            environment variable MOMENT_OPS_BACKEND sets it from the start.

    Every operator looks for the choice when it runs, those of a backward too: a backward outside of the block runs on
    the choice that holds there, whatever ran the forward. What is saved for it is the same for all backends.
    """
    global _forced
    _check_name(name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine; None if it can."""
    return _UNAVAILABLE[name]()


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: a switch that Triton reads on import."""
    return _triton_installed() and importlib.import_module("triton").knobs.runtime.interpret


@functools.cache
def _has_compiler() -> bool:
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def _triton_unavailable() -> str | None:
    if not _triton_installed():
        return "triton is not installed; `pip install triton`"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use; TRITON_INTERPRET=1 runs the kernels slowly, on CPU tensors"
    if not _has_compiler():
        return "triton needs a C compiler for its launcher: gcc or clang on the PATH, or one in the variable CC"
    return None


_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpu": lambda: extension.missing("CPU"),
    "cuda": lambda: extension.missing("CUDA"),
    "triton": _triton_unavailable,
}


def _cannot_run(name: str, operator: str, device_type: str, dtype: torch.dtype) -> str | None:
    if name == "triton" and operator not in _TRITON:
        return "it has no kernel for it"
    if name == "triton" and dtype not in _TRITON_DTYPES.get(operator, (dtype,)):
        return f"its kernel does not take {dtype}"
    if name != "reference" and _DEVICE[name] != device_type and not (name == "triton" and interpreted()):
        return f"it runs on {_DEVICE[name]} tensors, got {device_type}"
    if name == "cpu" and operator in _BLAS:
        return None
    if name in ("cpu", "cuda"):
        return extension.missing(name.upper(), operator)
    return unavailable(name)


def implementation(name: str, operator: str) -> Callable[..., Any]:
    """What fills the outputs of an operator: the extension's overload `native`, or the function with its arguments."""
    if name == "triton":
        return getattr(importlib.import_module(_TRITON[operator]), operator)
    if name == "cpu" and operator in _BLAS:
        return getattr(importlib.import_module(_BLAS[operator]), operator)
    return getattr(torch.ops.moment_ops, operator).native


def requested() -> str:
    """The backend that was asked for; "auto" where none was."""
    return _forced


def fill(operator: str, tensor: torch.Tensor) -> Callable[..., Any] | None:
    """What fills the outputs of an operator on tensors like `tensor`; None where the reference computes them."""
    name = select(operator, tensor)
    return None if name == "reference" else implementation(name, operator)


def select(operator: str, tensor: torch.Tensor) -> str:
    """The name of the backend that runs `operator` on tensors like `tensor`."""
    _check_name(_forced)
    device_type = tensor.device.type
    if _forced != "auto":
        reason = _cannot_run(_forced, operator, device_type, tensor.dtype)
        if reason is not None:
            raise RuntimeError(f"backend {_forced!r} was forced but cannot run {operator}: {reason}")
        return _forced
    reasons = []
    for name in _ORDER.get(device_type, ("reference",)):
        reason = _cannot_run(name, operator, device_type, tensor.dtype)
        if reason is not None:
            reasons.append(f"{name}: {reason}")
            continue
        if name == "reference" and reasons:
            reason = "; ".join(reasons)
            _warn_once(name, f"moment_ops runs on plain PyTorch, slower: {reason}. `moment-ops env` tells more.")
        if name == "triton" and torch.version.hip is not None:
            _warn_once(
                name,
                f"the Triton kernels of moment_ops are {UNPROVEN_ON_AMD}: compare their results with those of"
                ' `with moment_ops.backend("reference")`',
            )
        return name
    return "reference"


def chosen(device_type: str) -> str:
    """The backend that `auto` takes for tensors of a device type."""
    return next((name for name in _ORDER.get(device_type, ()) if unavailable(name) is None), "reference")
