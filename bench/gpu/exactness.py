"""How far results are from the same computation in float64, in units of what dtype and length of the sums allow."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import Wrong


@dataclass(frozen=True)
class Close:
    """Every entry: one rounding to its dtype, and what sums of `terms` terms lose.

    Sums lose up to the square root of their length in epsilons; the largest entry sets the scale, as terms cancel.
    """

    value: Tensor
    terms: int = 1

    def error(self, exact: Tensor, accumulator: torch.dtype) -> float:
        sums = 16 * math.sqrt(self.terms) * torch.finfo(accumulator).eps * exact.abs().max()
        dtype = self.value.dtype
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + sums + torch.finfo(dtype).smallest_normal
        return ((self.value.double() - exact).abs() / bound).max().item()


@dataclass(frozen=True)
class Norm:
    """The whole, by its Frobenius norm: a relative error up to `bound` in float32, and as many epsilons in float64."""

    value: Tensor
    bound: float

    def error(self, exact: Tensor, accumulator: torch.dtype) -> float:
        bound = self.bound * torch.finfo(accumulator).eps / torch.finfo(torch.float32).eps
        bound = max(bound, torch.finfo(self.value.dtype).eps / 2)
        distance = (self.value.double() - exact).norm()
        return (distance / exact.norm().clamp_min(torch.finfo(torch.float64).tiny) / bound).item()


Results = dict[str, Close | Norm]


def compare(results: Results, exact: Results, dtype: torch.dtype) -> dict[str, Any]:
    """Errors over their bounds; raises Wrong where one is beyond it.

    Args:
        exact: of the same names, computed in float64 on the CPU.
        dtype: of the features.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    errors = {}
    for name, result in results.items():
        value, wanted = result.value.detach().cpu(), exact[name].value.detach()
        if not value.is_floating_point():
            errors[name] = 0.0 if torch.equal(value, wanted) else math.inf
            continue
        finite = wanted.isfinite()
        if not torch.equal(value.isfinite(), finite):
            errors[name] = math.inf
        elif finite.any():
            only = type(result)(value[finite], result.terms if isinstance(result, Close) else result.bound)
            errors[name] = only.error(wanted[finite], accumulator)
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else math.inf)
    facts = {"worst": errors[worst], "of": worst, "quantities": len(errors)}
    if not errors[worst] <= 1.0:
        beyond = sorted(name for name, error in errors.items() if not error <= 1.0)
        raise Wrong(f"{errors[worst]:.3g} times the bound in {worst}; wrong: {', '.join(beyond)[:120]}", facts)
    return facts
