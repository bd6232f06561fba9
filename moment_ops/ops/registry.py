"""Which kernels in Python there are: the constants `OPERATORS` beside them, from an operator to the dtypes it takes.

They are read from the sources, since importing a Triton kernel imports Triton. The extension registers its own.
"""

import ast
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Where the kernels of a backend are.
_PACKAGES = {"triton": "kernels", "cpu": "ops"}


class Kernel(NamedTuple):
    """The function of an operator's name in a module; it fills the outputs it is given."""

    module: str
    operator: str
    dtypes: frozenset[torch.dtype]

    def load(self) -> Callable[..., Any]:
        """Import it."""
        return getattr(importlib.import_module(self.module), self.operator)


def find(backend: str, operator: str) -> Kernel | None:
    """The kernel of an operator that a backend has in Python."""
    return _kernels(backend).get(operator)


@functools.cache
def _kernels(backend: str) -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    if backend not in _PACKAGES:
        return found
    folder = Path(__file__).parents[1] / _PACKAGES[backend]
    for path in sorted(folder.glob("*.py")):
        module = f"moment_ops.{folder.name}.{path.stem}"
        for operator, dtypes in _constant(path.read_text()).items():
            found[operator] = Kernel(module, operator, frozenset(getattr(torch, dtype) for dtype in dtypes))
    return found


def _constant(source: str) -> dict[str, tuple[str, ...]]:
    if "\nOPERATORS = " not in source:
        return {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "OPERATORS":
            return ast.literal_eval(statement.value)
    return {}
