"""The choice of the backend that runs an operator: the fastest that can run it, or a forced one."""

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

from moment_ops.ops import extension, registry

NAMES = ("auto", "cuda", "triton", "cpu", "reference")

# What `auto` tries per device type, fastest first. ROCm's devices are called "cuda", too.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# The device type that a backend's kernels are for; the reference runs everywhere.
_DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
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
    """Run every operator on one backend: `with moment_ops.backend("reference"): ...`.

    Args:
        name: "auto" (the fastest backend that can run the operator on the given tensors), "cuda", "triton", "cpu" or
            "reference". The choice holds for all threads of the process. The environment variable MOMENT_OPS_BACKEND
            sets the initial choice.

    The backend of an operator is chosen when it runs. A backward outside of the block therefore runs on the backend
    that is chosen there. All backends save the same tensors for backward.

    Raises:
        ValueError: there is no backend of this name.
        RuntimeError: raised by an operator that the forced backend cannot run, with the reason.
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


def _gpu_unavailable() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no GPU"


def _triton_unavailable() -> str | None:
    if not _triton_installed():
        return "triton is not installed; run `pip install triton`"
    if interpreted():
        return None
    if reason := _gpu_unavailable():
        return f"{reason}; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly and on CPU tensors"
    if not _has_compiler():
        return "triton needs a C compiler: gcc or clang on the PATH, or one in the environment variable CC"
    return None


_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpu": lambda: extension.missing("CPU"),
    "cuda": lambda: extension.missing("CUDA") or _gpu_unavailable(),
    "triton": _triton_unavailable,
}


def _cannot_run(name: str, operator: str, device_type: str, dtype: torch.dtype) -> str | None:
    if name == "reference":
        return None
    kernel = registry.find(name, operator)
    if name == "triton" and kernel is None:
        return "it has no kernel for this operator"
    if kernel is not None and dtype not in kernel.dtypes:
        return f"its kernel does not take {dtype}"
    if _DEVICE[name] != device_type and not (name == "triton" and interpreted()):
        return f"it runs on {_DEVICE[name]} tensors, got {device_type}"
    if name == "triton":
        return unavailable(name)
    # A kernel in Python, around the BLAS of torch, needs no extension.
    return None if kernel is not None else extension.missing(name.upper(), operator)


def implementation(name: str, operator: str) -> Callable[..., Any]:
    """What fills the outputs of an operator: a kernel in Python, or the extension's overload `native`."""
    kernel = registry.find(name, operator)
    return getattr(torch.ops.moment_ops, operator).native if kernel is None else kernel.load()


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
    name, reasons = _first(operator, device_type, tensor.dtype)
    if name == "reference" and reasons:
        reason = "; ".join(reasons)
        _warn_once(
            name,
            f"moment_ops runs on plain PyTorch, which is slower: {reason}. `moment-ops env` shows the backends.",
        )
    if name == "triton" and torch.version.hip is not None:
        _warn_once(
            name,
            f"the Triton kernels of moment_ops are {UNPROVEN_ON_AMD}: compare their results with those of"
            ' `with moment_ops.backend("reference")`',
        )
    return name


def _first(operator: str, device_type: str, dtype: torch.dtype) -> tuple[str, list[str]]:
    """The backend that `auto` takes, and why not those before it."""
    reasons: list[str] = []
    for name in _ORDER.get(device_type, ("reference",)):
        reason = _cannot_run(name, operator, device_type, dtype)
        if reason is None:
            return name, reasons
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference runs everywhere")


def chosen(operator: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `auto` takes for an operator on tensors of a device type."""
    return _first(operator, device_type, dtype)[0]
