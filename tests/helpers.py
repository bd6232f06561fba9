"""What the tests share: data, the formulas of the library written naively in float64, and tolerances."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import moment_ops as mo

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((5,), (3, 2, 2), (2, 3), (4,))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def make_features(
    rows: int, shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Normal features whose columns differ in mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    features = []
    for shape in shapes:
        noise = torch.randn((rows, *shape), generator=generator, dtype=torch.float64)
        spread = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        shift = torch.randn(shape, generator=generator, dtype=torch.float64)
        features.append((noise * spread + shift).to(dtype))
    return features


def make_target(
    shapes: Sequence[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    var: bool = True,
    seed: int = 1,
) -> mo.Moments:
    generator = torch.Generator().manual_seed(seed)
    columns = sum(torch.Size(shape).numel() for shape in shapes)
    mean = torch.randn(columns, generator=generator, dtype=torch.float64).to(dtype)
    variance = (torch.rand(columns, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    return mo.Moments(mean, variance if var else None, shapes=tuple(tuple(shape) for shape in shapes))


def leaves(features: Sequence[Tensor]) -> list[Tensor]:
    """Copies that want gradients, in the same layouts."""
    return [x.detach().clone().requires_grad_() for x in features]


def exact_moments(features: Sequence[Tensor], dim: int = 0, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Packed mean and variance of the same inputs in float64; differentiable.

    Shifted by the first row, in two passes: for float64 inputs torch.var would be the less exact of the two.
    """
    means, variances = [], []
    for x in features:
        pivot = x.detach().double().narrow(dim, 0, 1)
        shifted = x.double() - pivot
        shift = shifted.mean(dim, keepdim=True)
        means.append((shift + pivot).reshape(-1))
        variances.append((shifted - shift).square().sum(dim).reshape(-1) / (x.shape[dim] - correction))
    return torch.cat(means), torch.cat(variances)


def squared_distance(
    features: Sequence[Tensor],
    target: mo.Moments,
    mean_weight: Any = 1.0,
    var_weight: Any = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """The plain matching loss in float64 PyTorch; differentiable in features and target."""
    mean, var = exact_moments(features, correction=target.correction)
    total = (mean_weight * (mean - target.mean.double()) ** 2).sum()
    if target.var is not None:
        total = total + (var_weight * (var - target.var.double()) ** 2).sum()
    return total / mean.numel() if reduction == "mean" else total


def mean_error(mean: Tensor, exact_mean: Tensor, exact_var: Tensor) -> float:
    """Largest error relative to max(|mean|, std)."""
    scale = torch.maximum(exact_mean.abs(), exact_var.sqrt()).clamp_min(torch.finfo(torch.float64).tiny)
    return ((mean.double() - exact_mean).abs() / scale).max().item()


def var_error(var: Tensor, exact_var: Tensor) -> float:
    return ((var.double() - exact_var).abs() / exact_var.clamp_min(torch.finfo(torch.float64).tiny)).max().item()


def mean_bound(dtype: torch.dtype) -> float:
    """1e-6 in float32, and as many epsilons in float64."""
    return 1e-6 * epsilon(statistics_dtype(dtype)) / epsilon(torch.float32)


def var_bound(dtype: torch.dtype, ratio: float = 1.0) -> float:
    """1e-5 in float32 up to |mean|/std = 1e3, 1e-3 at 1e4; as many epsilons in float64."""
    return (1e-5 if ratio <= 1e3 else 1e-3) * epsilon(statistics_dtype(dtype)) / epsilon(torch.float32)


def merged_var_bound(dtype: torch.dtype, ratio: float, rows: int) -> float:
    """For moments merged from parts of `rows` rows, whose means were rounded to the statistics' dtype.

    Part means lie 1/sqrt(rows) standard deviations apart and are rounded by ratio * epsilon / 2.
    """
    return var_bound(dtype, ratio) + ratio * epsilon(statistics_dtype(dtype)) / rows**0.5


def assert_moments(m: mo.Moments, features: Sequence[Tensor], correction: int = 1) -> None:
    mean, var = exact_moments(features, correction=correction)
    dtype = features[0].dtype
    assert m.mean.dtype == statistics_dtype(dtype)
    assert mean_error(m.mean, mean, var) <= mean_bound(dtype)
    if m.var is not None:
        assert m.var.dtype == statistics_dtype(dtype)
        assert var_error(m.var, var) <= var_bound(dtype)


def assert_close(
    actual: Tensor, exact: Tensor, dtype: torch.dtype | None = None, rows: int = 1, scale: Tensor | float = 0.0
) -> None:
    """`actual`, computed in the statistics' dtype from sums over `rows` rows and rounded to its own, is `exact`.

    Sums lose up to the square root of their length in epsilons; the largest entry sets the scale, as terms cancel, or
    the sum of the terms' magnitudes, where that is given.
    """
    dtype = dtype or actual.dtype
    assert actual.shape == exact.shape
    exact = exact.detach().double()
    sums = 16 * rows**0.5 * epsilon(statistics_dtype(dtype)) * max(float(exact.abs().max()), float(scale))
    bound = epsilon(actual.dtype) / 2 * exact.abs() + sums + torch.finfo(actual.dtype).smallest_normal
    error = (actual.detach().double() - exact).abs()
    assert bool((error <= bound).all()), f"error {error.max():.3g}, {(error / bound).max():.3g} times the bound"


def assert_same_bits(first: Any, second: Any) -> None:
    """Equal to the last bit, NaNs included."""
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(torch.isnan(first), torch.isnan(second))
        assert torch.equal(first.nan_to_num(0.0), second.nan_to_num(0.0))
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same_bits(first[name], second[name])
    elif isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            assert_same_bits(one, other)
    else:
        assert first == second


def state_of(loss: mo.MomentLoss) -> dict[str, Tensor]:
    """A copy of the average's state."""
    return {k: v.clone() for k, v in loss.state_dict().items() if not k.startswith("target")}


def assert_raises(call: Callable[[], Any], error: type[BaseException], *fragments: str) -> None:
    """An exception of just this type, whose text has what these regular expressions match."""
    with pytest.raises(error) as raised:
        call()
    # A subclass such as UnicodeError or a bare AttributeError would not tell the user what was wrong.
    assert raised.type is error
    for fragment in fragments:
        assert re.search(fragment, str(raised.value)), f"{fragment!r} is not in {raised.value}"
