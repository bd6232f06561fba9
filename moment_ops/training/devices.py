"""The device that a command runs on."""

import torch

from moment_ops.training.errors import TrainingError


def choose_device(name: str = "auto") -> torch.device:
    """The device of this name. ``"auto"`` is CUDA if it is available, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
