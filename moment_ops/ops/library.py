"""The operator library `moment_ops::`: schemas are defined here, so that every operator exists without the extension.

Each public operator has one kernel, in Python, that allocates the outputs and hands them to the backend chosen for the
tensors. The extension implements the overloads called `native`, which only fill what they are given.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("moment_ops", "DEF")
# The public operators' names, in the order of their definition.
OPERATORS: list[str] = []


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define a public operator with its kernel for every device and its shape function.

    No schema has defaults: the dispatcher drops arguments that equal them, and autograd formulas over tensor lists
    then fail.
    """
    name = schema.partition("(")[0]
    if "." not in name:
        OPERATORS.append(name)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moment_ops::{name}", fake, lib=LIBRARY)


def define_native(schema: str) -> None:
    """Define the overload that the extension implements."""
    LIBRARY.define(schema)
