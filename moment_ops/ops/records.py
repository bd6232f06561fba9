"""The arguments of the operators that match: one record per family, with fields in the order of its schema."""

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
    """The target and weights of `match_`, and its running average.

    If the average keeps n vectors per quantity, `state` holds n for the mean; n for the variance if it has a target;
    `started` (one bool per column) if the average needs it; and the step. It is empty without an average.
    """

    target_mean: Tensor  # (F,)
    target_var: Tensor | None  # (F,); None: means alone are matched
    mean_scale: float = 1.0
    var_scale: float = 1.0
    mean_weight: Tensor | None = None  # (F,), times the scale
    var_weight: Tensor | None = None
    reduction: float = 1.0  # a factor: 1 / F for "mean"
    average_kind: str = "none"  # a key of `averages.AVERAGES`, whose `options` these are
    options: Sequence[float] = ()
    state: State = ()
    update: bool = False  # whether the state advances


class CovarianceMatch(NamedTuple):
    """The same for `covariance_match_`. The vectors of the state are packed triangles."""

    target: Sequence[Tensor]  # per layer a symmetric (D, D) matrix or its packed triangle
    weight: Sequence[float]  # of every layer
    average_kind: str = "none"
    options: Sequence[float] = ()
    state: State = ()
    update: bool = False
    keep: bool = False  # whether the derivative is wanted
    precision: str = "ieee"


def parameters(record: type, **types: str) -> str:
    """The fields as part of a schema.

    Args:
        types: the types of fields that differ from those of the record.
    """
    hints = typing.get_type_hints(record, include_extras=True)
    return ", ".join(f"{types.get(name) or _schema_type(hint)} {name}" for name, hint in hints.items())


def _schema_type(hint: Any) -> str:
    return hint.__metadata__[0] if hasattr(hint, "__metadata__") else _TYPES[hint]
