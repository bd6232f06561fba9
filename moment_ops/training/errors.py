"""Errors that a user can act on; the command line prints them as one line, without a traceback."""

import importlib
from typing import Any


class TrainingError(RuntimeError):
    """Something outside the program is wrong: a file, a folder, a package, a diverged run."""


def import_extra(name: str, extra: str = "train") -> Any:
    """Import a module that comes with an extra, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TrainingError(f"{error.name} is not installed; get it with: pip install 'moment-ops[{extra}]'") from error
