"""Loads the compiled extension, or remembers why it cannot be loaded."""

from pathlib import Path

import torch

HOW_TO_BUILD = "build it with `pip install --no-build-isolation -e .` in a checkout (needs a C++ compiler and ninja)"


def _load() -> str | None:
    """Load `moment_ops/_C*.so`; returns the reason if that fails."""
    libraries = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not libraries:
        return f"the C++ extension is not built; {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}"
    return None


_reason: str | None = "not loaded yet"


def load() -> None:
    """Load the extension; called once, after all schemas are defined."""
    global _reason
    _reason = _load()


def missing(dispatch_key: str = "CPU") -> str | None:
    """Why the extension has no kernels for a dispatch key; None if it has them."""
    if _reason is not None:
        return _reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("moment_ops::moments.native", dispatch_key):
        return f"the C++ extension was built without {dispatch_key} kernels"
    return None
