"""The operator library `moment_ops::`: schemas are defined here, so that every operator exists without the extension.

Each public operator has one kernel, in Python, that allocates the outputs and hands them to the backend chosen for the
tensors. The extension implements the overloads called `native`, which only fill what they are given.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("moment_ops", "DEF")
# Names of the public operators that run on a chosen backend, in the order of their definition.
OPERATORS: list[str] = []


def no_forward_mode(name: str) -> str:
    """The message of an error."""
    return f"{name}: forward-mode differentiation is not supported; use reverse mode"


def has_tangent(values: Iterable[Any]) -> bool:
    """Whether a tensor in `values`, or in a list there, has a tangent of forward mode, which operators would drop."""
    if forward_ad._current_level < 0:
        return False
    tensors = [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, composed: bool = False) -> None:
    """Define a public operator with its kernel for every device and its shape function.

    A composed operator consists of products and factorisations of torch on every device; no backend is chosen for it.

    No schema has defaults: the dispatcher drops arguments that equal them, and autograd formulas over tensor lists
    then fail.
    """
    name = schema.partition("(")[0]

    def without_tangents(*arguments: Any) -> Any:
        if has_tangent(arguments):
            raise NotImplementedError(no_forward_mode(name))
        return kernel(*arguments)

    if "." not in name and not composed:
        OPERATORS.append(name)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, without_tangents, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moment_ops::{name}", fake, lib=LIBRARY)


def define_native(schema: str) -> None:
    """Define the overload that the extension implements."""
    LIBRARY.define(schema)
