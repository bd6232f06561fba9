"""The arguments of the operators that match, one record for each family, in the order of its schema."""

import typing
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias

from torch import Tensor

# As an operator's schema has it, where that says more than the Python type.
State: TypeAlias = Annotated[Sequence[Tensor], "Tensor(a!)[]"]

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    str: "str",
    bool: "bool",
    Sequence[float]: "float[]",
    Sequence[Tensor]: "Tensor[]",
}


class Match(NamedTuple):
    """What `match_` compares moments with, how, and the running average between them.

    With n the vectors that the average keeps per quantity, `state` has n of the mean, n of the variance where it has a
    target, `started` (one bool per column) where the average wants it, and the step; nothing without an average.
    """

    target_mean: Tensor  # (F,)
    target_var: Tensor | None  # (F,); None: means alone are matched
    mean_scale: float = 1.0
    var_scale: float = 1.0
    mean_weight: Tensor | None = None  # (F,), times the scale
    var_weight: Tensor | None = None
    reduction: float = 1.0  # a factor: 1 / F for "mean"
    average: str = "none"  # a key of `averages.AVERAGES`, whose `options` these are
    options: Sequence[float] = ()
    state: State = ()
    update: bool = False  # whether the state advances


class CovarianceMatch(NamedTuple):
    """Likewise for `covariance_match_`; the state's vectors are on packed triangles."""

    target: Sequence[Tensor]  # per layer a symmetric (D, D) matrix or its packed triangle
    weight: Sequence[float]  # of every layer
    average: str = "none"
    options: Sequence[float] = ()
    state: State = ()
    update: bool = False
    keep: bool = False  # whether the derivative is wanted
    precision: str = "ieee"


def parameters(record: type, **types: str) -> str:
    """The fields as a part of a schema.

    Args:
        types: of fields whose type there is not that of the record.
    """
    hints = typing.get_type_hints(record, include_extras=True)
    return ", ".join(f"{types.get(name) or _schema_type(hint)} {name}" for name, hint in hints.items())


def _schema_type(hint: Any) -> str:
    return hint.__metadata__[0] if hasattr(hint, "__metadata__") else _TYPES[hint]
