"""Configurations of running averages. The state of an average is kept in the buffers of the loss that uses it."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moment_ops.ops import checks
from moment_ops.ops.averages import AVERAGES


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    return value


def _zeros(average_kind: str, target_mean: Tensor, has_var: bool) -> dict[str, Tensor]:
    """The state of an average before its first step, by name, in the order that the operators expect."""
    kind = AVERAGES[average_kind]
    state = {
        f"{quantity}_{vector}": torch.zeros_like(target_mean)
        for quantity in (("mean", "var") if has_var else ("mean",))
        for vector in kind.vectors
    }
    if kind.has_started:
        # A column whose first values are non-finite starts from its first finite value.
        state["started"] = torch.zeros_like(target_mean, dtype=torch.bool)
    state["step"] = torch.zeros((), dtype=torch.int64, device=target_mean.device)
    return state


@dataclass(frozen=True)
class MovingAverage:
    """Exponential moving average of the moments of the batches. Gradients flow through the current batch only.

    `average = decay * average + (1 - decay) * batch`; the first batch is the first average. With `bias_correction` the
    weight of the past in step k is `decay * (1 - decay^(k - 1)) / (1 - decay^k)` instead of decay, so that the average
    is that of all batches with weights decay^age, and the gradient has the batch's share from the first step on.

    A column whose first batches are not finite starts from its first finite batch. Steps are those of the loss, for
    such a column too.

    Args:
        decay: weight of the previous average, in [0, 1).
        bias_correction: whether the first batch has no more weight than its age gives it.

    Raises:
        TypeError, ValueError: `decay` is not a number in [0, 1), or `bias_correction` is not a bool.

    Source: the released code of dos Santos et al. 2019, `--useRegularMovAvrg`, with decay = 1 - alpha. The correction
    is that of Kingma and Ba, ICLR 2015, section 3.
    """

    decay: float
    _: KW_ONLY
    bias_correction: bool = False
    kind: ClassVar[str] = "moving"

    def __post_init__(self) -> None:
        _number(self.decay, "decay")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: got {self.decay}, expected a number in [0, 1)")
        if not isinstance(self.bias_correction, bool):
            raise TypeError(f"bias_correction: got {self.bias_correction!r}, expected a bool")

    def options(self, columns: int) -> list[float]:
        """The numbers that the operator `match_` wants for `columns` matched columns."""
        return [self.decay, float(self.bias_correction)]

    def new_state(self, target_mean: Tensor, has_var: bool) -> dict[str, Tensor]:
        """The initial state by name, in the order that the operator expects."""
        return _zeros(self.kind, target_mean, has_var)


@dataclass(frozen=True)
class AdamMovingAverage:
    """ADAM moving average (AMA) of the differences between the target and the moments of the batches.

    Each call takes one step of torch.optim.Adam on the squared error between the average v and `target - batch`. The
    loss is then the inner product of v and `target - batch`, where v is a constant.

    Args:
        lr, betas, eps: as of torch.optim.Adam.
        reduction: "mean" divides the squared error by F, the number of columns over all layers, as the published code
            does; eps then has the effect that eps * F has with "sum". "sum" does not divide.
        init: initial values of v: "zeros", or "uniform" in [-1 / sqrt(F), 1 / sqrt(F)] as in the published code, where
            v is the weight of an nn.Linear.

    Raises:
        TypeError, ValueError: wrong types or values, with the argument's name.

    Source: dos Santos et al. 2019, section 3.2, and the released code.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8
    _: KW_ONLY
    reduction: str = "mean"
    init: str = "zeros"
    kind: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            value = _number(getattr(self, name), name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: got {value}, expected a non-negative number")
        if not isinstance(self.betas, (tuple, list)):
            raise TypeError(f"betas: got {self.betas!r}, expected two numbers")
        for beta in self.betas:
            _number(beta, "betas")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, expected two numbers in [0, 1)")
        checks.option(self.reduction, "reduction", ("mean", "sum"))
        checks.option(self.init, "init", ("zeros", "uniform"))

    def options(self, columns: int) -> list[float]:
        """The numbers that the operator `match_` wants for `columns` matched columns."""
        gradient_scale = 2 / columns if self.reduction == "mean" else 2.0
        return [self.lr, *self.betas, self.eps, gradient_scale]

    def new_state(self, target_mean: Tensor, has_var: bool) -> dict[str, Tensor]:
        """The initial state by name, in the order that the operator expects."""
        state = _zeros(self.kind, target_mean, has_var)
        if self.init == "uniform":
            bound = 1 / math.sqrt(target_mean.numel())
            for name, vector in state.items():
                if name.endswith("_average"):
                    vector.uniform_(-bound, bound)
        return state


Average = MovingAverage | AdamMovingAverage


def averaging(average: Average | None, columns: int) -> tuple[str, Sequence[float]]:
    """The kind and the options of an average as the operators take them, for `columns` matched columns."""
    return ("none", ()) if average is None else (average.kind, average.options(columns))
