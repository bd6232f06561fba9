"""Which implementation runs an operator: the fastest that can, or the one that was asked for."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moment_ops.ops import extension

NAMES = ("auto", "cuda", "triton", "cpu", "reference")

# What `auto` tries per device type, fastest first.
_ORDER = {"cpu": ("cpu", "reference")}
# The device type that a backend's kernels are for; the reference runs everywhere.
_DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}

_forced = os.environ.get("MOMENT_OPS_BACKEND", "auto")
_warned = False


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
    if name == "reference":
        return None
    if name == "cpu":
        return extension.missing("CPU")
    return f"the {name} backend has no kernels in this version"


def _cannot_run(name: str, device_type: str) -> str | None:
    if name != "reference" and _DEVICE[name] != device_type:
        return f"it runs on {_DEVICE[name]} tensors, got {device_type}"
    return unavailable(name)


def select(operator: str, tensor: torch.Tensor) -> str:
    """The name of the backend that runs `operator` on tensors like `tensor`."""
    global _warned
    _check_name(_forced)
    device_type = tensor.device.type
    if _forced != "auto":
        reason = _cannot_run(_forced, device_type)
        if reason is not None:
            raise RuntimeError(f"backend {_forced!r} was forced but cannot run {operator}: {reason}")
        return _forced
    for name in _ORDER.get(device_type, ()):
        reason = _cannot_run(name, device_type)
        if reason is None:
            return name
        if not _warned:
            _warned = True
            warnings.warn(
                f"moment_ops runs on plain PyTorch, slower: {reason}. `moment-ops env` tells more.",
                stacklevel=2,
            )
    return "reference"


def chosen(device_type: str) -> str:
    """The backend that `auto` takes for tensors of a device type."""
    return next((name for name in _ORDER.get(device_type, ()) if unavailable(name) is None), "reference")
