"""Cases of the operators over columns: moments, taps, matches, and their backward."""

from collections.abc import Callable, Sequence

import torch
from helpers import (
    assert_close,
    assert_moments,
    exact_moments,
    make_features,
    mean_bound,
    mean_error,
    statistics_dtype,
    var_bound,
    var_error,
)
from torch import Tensor

import moment_ops as mo
from emulated.cases import LAYOUTS, Case, empty_like
from moment_ops.kernels import _records, covariance, match, moments, relu_moments
from moment_ops.kernels._launch import Launch
from moment_ops.ops import records, reference
from moment_ops.ops.averages import AVERAGES

Shapes = Sequence[Sequence[int]]
# Up to a comma, names are kinds.
OPTIONS = {
    "none": [],
    "moving": [0.9, 1.0],
    "moving, uncorrected": [0.9, 0.0],
    "adam": [1e-2, 0.5, 0.999, 1e-8, 0.05],
}


def features(rows: int, shapes: Shapes, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> list[Tensor]:
    """Layers of one layout, each column with its own mean and spread."""
    return [LAYOUTS[layout](x) for x in make_features(rows, shapes, dtype, seed)]


def count_columns(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


class Moments(Case):
    def __init__(self, rows: int, shapes: Shapes, dtype: torch.dtype, layout: str = "contiguous", var: bool = True):
        self.features = features(rows, shapes, dtype, layout)
        self.correction = int(rows > 1)
        self.with_var = var

    def launches(self, architecture: int) -> list[Launch]:
        features = self.features
        dtype = statistics_dtype(features[0].dtype)
        self.mean = torch.empty(sum(x[0].numel() for x in features), dtype=dtype)
        self.var = torch.empty_like(self.mean) if self.with_var else None
        return moments.moments_launches(features, self.correction, self.mean, self.var)

    def check(self) -> None:
        assert_moments(mo.Moments(self.mean, self.var), self.features, self.correction)

    def results(self) -> list[Tensor]:
        return [self.mean] + ([] if self.var is None else [self.var])


class Shifts(Case):
    """The first launch of covariances: means, a shift close to them, and the rest."""

    def __init__(self, rows: int, shapes: Shapes, dtype: torch.dtype, layout: str = "contiguous"):
        self.features = features(rows, shapes, dtype, layout)

    def launches(self, architecture: int) -> list[Launch]:
        columns = sum(x[0].numel() for x in self.features)
        self.mean, self.shift, self.rest, self.scale = (torch.empty(columns) for _ in range(4))
        shifts = _records.Shifts(self.shift, self.rest, self.scale)
        return covariance.shifts_launches(self.features, self.mean, shifts)

    def check(self) -> None:
        mean, var = exact_moments(self.features, correction=0)
        assert mean_error(self.mean, mean, var) <= mean_bound(torch.float32)
        assert bool((self.scale == 1).all())
        scale = 1e-6 * mean.abs()
        assert bool(
            ((self.shift.double() + self.rest.double() - mean).abs() <= 1e-12 * mean.abs() + 1e-6 * var.sqrt()).all()
        )
        assert bool((self.rest.double().abs() <= var.sqrt() / 8 + scale).all())

    def results(self) -> list[Tensor]:
        return [self.mean, self.shift, self.rest, self.scale]


class MomentsBackward(Case):
    def __init__(
        self,
        rows: int,
        shapes: Shapes,
        dtype: torch.dtype,
        layout: str = "contiguous",
        mean: bool = True,
        var: bool = True,
        added: bool = False,
        scaled: bool = True,
    ):
        self.features = features(rows, shapes, dtype, layout)
        self.grad = features(rows, shapes, dtype, layout, seed=1) if added else []
        statistics = statistics_dtype(dtype)
        columns = count_columns(shapes)
        self.mean = torch.cat([x.double().mean(0).flatten() for x in self.features]).to(statistics)
        self.grad_mean = torch.randn(columns, dtype=statistics) if mean else None
        self.grad_var = torch.randn(columns, dtype=statistics) if var else None
        self.count = torch.tensor([2 * rows + i for i in range(len(shapes))])
        self.scale = torch.tensor(-1.5, dtype=statistics) if scaled else None

    def launches(self, architecture: int) -> list[Launch]:
        self.out = [empty_like(x) for x in self.features]
        return moments.backward_launches(
            self.grad,
            self.grad_mean,
            self.grad_var,
            self.features,
            self.mean,
            self.count,
            1,
            self.scale,
            self.out,
        )

    def check(self) -> None:
        def wide(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.double()

        expected = reference.moments_backward(
            [g.double() for g in self.grad],
            wide(self.grad_mean),
            wide(self.grad_var),
            [x.double() for x in self.features],
            self.mean.double(),
            self.count,
            0,
            1,
            wide(self.scale),
        )
        for dx, exact in zip(self.out, expected, strict=True):
            assert_close(dx, exact)

    def results(self) -> list[Tensor]:
        return self.out


class ReluMoments(Case):
    def __init__(
        self, rows: int, shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", bias: bool = True
    ):
        (self.x,) = features(rows, [shape], dtype, layout)
        self.bias = torch.randn(shape[0]).to(dtype) if bias else None

    def launches(self, architecture: int) -> list[Launch]:
        dtype = statistics_dtype(self.x.dtype)
        self.y = empty_like(self.x)
        self.mean, self.var = (torch.empty(self.x[0].numel(), dtype=dtype) for _ in range(2))
        return relu_moments.relu_moments_launches(self.x, self.bias, 1, self.y, self.mean, self.var)

    def check(self) -> None:
        x = self.x if self.bias is None else self.x + self.bias.view(-1, *[1] * (self.x.dim() - 2))
        assert torch.equal(self.y, torch.relu(x))
        mean, var = exact_moments([self.y])
        assert mean_error(self.mean, mean, var) <= mean_bound(self.x.dtype)
        assert var_error(self.var, var) <= var_bound(self.x.dtype)

    def results(self) -> list[Tensor]:
        return [self.y, self.mean, self.var]


class ReluMomentsBackward(Case):
    def __init__(
        self,
        rows: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        layout: str = "contiguous",
        grad: bool = True,
        mean: bool = True,
        var: bool = True,
    ):
        self.y = LAYOUTS[layout](torch.relu(make_features(rows, [shape], dtype)[0]))
        self.grad = features(rows, [shape], dtype, layout, seed=1)[0] if grad else None
        statistics = statistics_dtype(dtype)
        self.mean = self.y.double().mean(0).flatten().to(statistics)
        self.grad_mean = torch.randn(len(self.mean), dtype=statistics) if mean else None
        self.grad_var = torch.randn(len(self.mean), dtype=statistics) if var else None

    def launches(self, architecture: int) -> list[Launch]:
        self.out = empty_like(self.y)
        return relu_moments.relu_moments_backward_launches(
            self.grad, self.grad_mean, self.grad_var, self.y, self.mean, 1, self.out
        )

    def check(self) -> None:
        wide = (
            None if x is None else x.double() for x in (self.grad, self.grad_mean, self.grad_var, self.y, self.mean)
        )
        assert_close(self.out, reference.relu_moments_backward(*wide, 1))  # type: ignore[arg-type]

    def results(self) -> list[Tensor]:
        return [self.out]


class Matching:
    """Targets, weights and an average that has run for some steps; `expected` are those of float64."""

    def __init__(self, columns: int, dtype: torch.dtype, average_kind: str, update: bool, weighted: bool, var: bool):
        generator = torch.Generator().manual_seed(2)

        def vector() -> Tensor:
            return torch.rand(columns, generator=generator, dtype=torch.float64).to(dtype) + 0.1

        kind = AVERAGES[average_kind.partition(",")[0]]
        self.average_kind, self.update = average_kind, update
        self.target_mean, self.target_var = vector() - 0.5, vector() if var else None
        self.weights = [vector() if weighted else None, vector() if weighted and var else None]
        self.scales = (0.7, 1.3) if weighted else (1.0, 1.0)
        self.reduction = 1 / columns
        self.state = [vector() * 1e-2 for _ in range((1 + var) * len(kind.vectors))]
        if kind.has_started:
            self.state.append(torch.rand(columns, generator=generator) > 0.3)
        if average_kind != "none":
            self.state.append(torch.tensor(5))

    def arguments(self) -> tuple[records.Match, Tensor, Tensor | None]:
        """The match, with gradients to be filled."""
        self.grad_mean = torch.empty_like(self.target_mean)
        self.grad_var = None if self.target_var is None else torch.empty_like(self.target_mean)
        self.before = [s.clone() for s in self.state]
        return self._match(self.state, lambda x: x), self.grad_mean, self.grad_var

    def _match(self, state: list[Tensor], cast: Callable[[Tensor], Tensor]) -> records.Match:
        vectors = (self.target_mean, self.target_var, *self.weights)
        target_mean, target_var, *weights = (None if v is None else cast(v) for v in vectors)
        averaging = self.average_kind.partition(",")[0], OPTIONS[self.average_kind], state, self.update
        return records.Match(target_mean, target_var, *self.scales, *weights, self.reduction, *averaging)

    def check(self, mean: Tensor, var: Tensor, loss: Tensor, rows: int) -> None:
        """mean, var: float64."""
        state = [s.double() if s.is_floating_point() else s for s in self.before]
        expected, grad_mean, grad_var = reference.match_(mean, var, self._match(state, Tensor.double))
        # The terms of ADAM's loss have both signs.
        magnitudes = (grad_mean * (mean - self.target_mean)).abs().sum()
        if grad_var is not None:
            magnitudes += (grad_var * (var - self.target_var)).abs().sum()
        assert_close(loss, expected, rows=mean.numel(), scale=magnitudes)
        assert_close(self.grad_mean, grad_mean, rows=rows)
        if grad_var is not None:
            assert self.grad_var is not None
            assert_close(self.grad_var, grad_var, rows=rows)
        for got, wanted in zip(self.state, state, strict=True):
            if got.is_floating_point():
                assert_close(got, wanted, rows=rows)
            else:
                assert torch.equal(got, wanted)

    def results(self) -> list[Tensor]:
        return [self.grad_mean, *self.state] + ([] if self.grad_var is None else [self.grad_var])


class Match(Case):
    """From moments."""

    def __init__(
        self,
        columns: int,
        dtype: torch.dtype,
        average_kind: str,
        update: bool = True,
        weighted: bool = False,
        var: bool = True,
    ):
        self.matching = Matching(columns, dtype, average_kind, update, weighted, var)
        self.mean, self.var = torch.randn(columns, dtype=dtype), torch.rand(columns, dtype=dtype) if var else None

    def launches(self, architecture: int) -> list[Launch]:
        self.loss = torch.empty((), dtype=self.mean.dtype)
        matching, *grads = self.matching.arguments()
        return match.match_launches(self.mean, self.var, matching, self.loss, *grads)

    def check(self) -> None:
        var = self.mean if self.var is None else self.var
        self.matching.check(self.mean.double(), var.double(), self.loss, rows=1)

    def results(self) -> list[Tensor]:
        return [self.loss, *self.matching.results()]


class MatchFeatures(Case):
    """From features."""

    def __init__(
        self,
        rows: int,
        shapes: Shapes,
        dtype: torch.dtype,
        average_kind: str,
        layout: str = "contiguous",
        update: bool = True,
        weighted: bool = False,
        var: bool = True,
    ):
        self.features = features(rows, shapes, dtype, layout)
        self.matching = Matching(count_columns(shapes), statistics_dtype(dtype), average_kind, update, weighted, var)

    def launches(self, architecture: int) -> list[Launch]:
        self.mean = torch.empty_like(self.matching.target_mean)
        self.loss = torch.empty((), dtype=self.mean.dtype)
        matching, *grads = self.matching.arguments()
        return match.match_features_launches(self.features, 1, matching, self.loss, self.mean, *grads)

    def check(self) -> None:
        mean, var = exact_moments(self.features)
        assert mean_error(self.mean, mean, var) <= mean_bound(self.features[0].dtype)
        self.matching.check(mean, var, self.loss, rows=len(self.features[0]))

    def results(self) -> list[Tensor]:
        return [self.loss, self.mean, *self.matching.results()]
