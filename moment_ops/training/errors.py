"""Errors that a user can act on. The command line prints them as one line, without a traceback."""

import importlib
from typing import Any


class TrainingError(RuntimeError):
    """An error outside the program: a file, a folder, a missing package, a run that diverged."""


def import_extra(name: str, extra: str = "train") -> Any:
    """Import a module that comes with an extra. If it is missing, the error says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TrainingError(f"{error.name} is not installed; run `pip install 'moment-ops[{extra}]'`") from error


def import_package(name: str) -> Any:
    """Import a module of a package that no extra contains."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TrainingError(f"{error.name} is not installed; run `pip install {package}`") from error
    except RuntimeError as error:
        # torchvision and torch must be built for one another.
        raise TrainingError(f"{package} does not work with this torch: {str(error).splitlines()[0]}") from error
