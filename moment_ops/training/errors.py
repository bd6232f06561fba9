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
