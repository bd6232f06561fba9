"""Loads the compiled extension, and keeps the reason if it cannot be loaded."""

import functools
from pathlib import Path

import torch

# The one name that setup.py builds: other files of that kind are of other builds.
LIBRARY = Path(__file__).parent.parent / "_C.abi3.so"
HOW_TO_BUILD = "build it with `pip install --no-build-isolation -e .` in a checkout (needs a C++ compiler and ninja)"


def _load() -> str | None:
    """Load the library; returns the reason if that fails."""
    if not LIBRARY.exists():
        return f"the C++ extension is not built; {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    return None


_reason: str | None = "not loaded yet"


def load() -> None:
    """Load the extension; called once, after all schemas are defined."""
    global _reason
    _reason = _load()


def missing(dispatch_key: str = "CPU", operator: str = "moments") -> str | None:
    """Why the extension has no kernel of an operator for a dispatch key; None if it has one."""
    if _reason is not None:
        return _reason
    if not _has_kernel("moments", dispatch_key):
        return f"the C++ extension was built without {dispatch_key} kernels"
    if not _has_kernel(operator, dispatch_key):
        return f"the C++ extension has no {dispatch_key} kernel for it"
    return None


@functools.cache
def _has_kernel(operator: str, dispatch_key: str) -> bool:
    """Asked on every call of an operator, and slow to ask: 5 us."""
    name = f"moment_ops::{operator}.native"
    # Asking for a key of an unknown operator raises.
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, dispatch_key)
