"""Cases of the operators that multiply: covariances, their match, Gram matrices, and their backward."""

from collections.abc import Sequence

import torch
from helpers import assert_close, epsilon, exact_moments, make_features, mean_bound, mean_error
from torch import Tensor

from emulated.cases import LAYOUTS, Case, empty_like
from emulated.columns import OPTIONS
from moment_ops.kernels import covariance, covariance_backward, covariance_match, gram
from moment_ops.kernels._launch import Launch
from moment_ops.ops import records, reference_covariance, reference_gram, triangle

# Relative Frobenius error of a precision.
BOUNDS = {"ieee": 1e-6, "bf16x3": 2e-5, "tf32": 1e-3, "bf16": 4e-3}


def _layers(rows: int, widths: Sequence[int], dtype: torch.dtype, layout: str, seed: int = 0) -> list[Tensor]:
    return [LAYOUTS[layout](x) for x in make_features(rows, [(width,) for width in widths], dtype, seed)]


def _relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def _symmetric(width: int, seed: int) -> Tensor:
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    return matrix + matrix.mT


class Covariance(Case):
    def __init__(
        self,
        rows: int,
        width: int,
        dtype: torch.dtype,
        precision: str,
        layout: str = "contiguous",
        centered: bool = True,
    ):
        (self.x,) = _layers(rows, [width], dtype, layout)
        self.precision, self.centered = precision, centered

    def launches(self, architecture: int) -> list[Launch]:
        width = self.x.shape[1]
        self.cov, self.mean = torch.empty(width, width), torch.empty(width)
        return covariance.covariance_launches(
            self.x, 1, self.centered, self.precision, self.cov, self.mean, architecture
        )

    def check(self) -> None:
        exact, _ = reference_covariance.covariance(self.x.double(), 1, self.centered, "ieee")
        assert torch.equal(self.cov, self.cov.mT)
        assert _relative_error(self.cov, exact) <= BOUNDS[self.precision]
        assert mean_error(self.mean, *exact_moments([self.x], correction=0)) <= mean_bound(torch.float32)

    def results(self) -> list[Tensor]:
        return [self.cov, self.mean]


class CovarianceMatch(Case):
    """Some targets are full matrices, the others packed."""

    def __init__(
        self,
        rows: int,
        widths: Sequence[int],
        dtype: torch.dtype,
        precision: str,
        average_kind: str,
        layout: str = "contiguous",
        update: bool = True,
        keep: bool = True,
        full: Sequence[int] = (0,),
    ):
        self.features = _layers(rows, widths, dtype, layout)
        self.precision, self.average_kind, self.update, self.keep = precision, average_kind, update, keep
        targets = [_symmetric(width, 4) for width in widths]
        self.targets = [t if i in full else triangle.pack(t) for i, t in enumerate(targets)]
        self.weights = [0.5 + i for i in range(len(widths))]

        def packed(seed: int) -> Tensor:
            return torch.cat([triangle.pack(_symmetric(width, seed)) for width in widths])

        self.state = {
            "none": [],
            "moving": [packed(5), packed(6) > 0, torch.tensor(3)],
            "adam": [packed(5), packed(6), packed(7).abs(), torch.tensor(3)],
        }[average_kind.partition(",")[0]]

    def launches(self, architecture: int) -> list[Launch]:
        widths = [x.shape[1] for x in self.features]
        self.loss, self.mean = torch.empty(()), torch.empty(sum(widths))
        self.grad = torch.empty(triangle.total_size(widths)) if self.keep else None
        self.before = [s.clone() for s in self.state]
        match = self._match(self.targets, self.state)
        return covariance_match.covariance_match_launches(
            self.features, 1, match, self.loss, self.mean, self.grad, architecture
        )

    def _match(
        self, targets: list[Tensor], state: list[Tensor], precision: str | None = None
    ) -> records.CovarianceMatch:
        averaging = self.average_kind.partition(",")[0], OPTIONS[self.average_kind], state, self.update
        return records.CovarianceMatch(targets, self.weights, *averaging, True, precision or self.precision)

    def check(self) -> None:
        state = [s.double() if s.is_floating_point() else s for s in self.before]
        wide = [x.double() for x in self.features]
        exact = self._match([t.double() for t in self.targets], state, "ieee")
        loss, _, grad = reference_covariance.covariance_match_(wide, 1, exact)
        self._check(self.loss, loss)
        if self.grad is not None:
            self._check(self.grad, grad)
        for got, wanted in zip(self.state, state, strict=True):
            if got.is_floating_point():
                self._check(got, wanted)
            else:
                assert torch.equal(got, wanted)
        assert mean_error(self.mean, *exact_moments(self.features, correction=0)) <= mean_bound(torch.float32)

    def _check(self, got: Tensor, exact: Tensor) -> None:
        if self.precision == "ieee":
            assert_close(got, exact, rows=len(self.features[0]))
        else:
            # Targets are larger than covariances, whose error is that of their difference; the loss has its square.
            assert _relative_error(got, exact) <= 2 * BOUNDS[self.precision]

    def results(self) -> list[Tensor]:
        return [self.loss, self.mean, *self.state] + ([] if self.grad is None else [self.grad])


class CovarianceBackward(Case):
    """Of a full matrix, which need not be symmetric."""

    def __init__(
        self,
        rows: int,
        width: int,
        dtype: torch.dtype,
        precision: str,
        layout: str = "contiguous",
        centered: bool = True,
        mean: bool = True,
    ):
        (self.x,) = _layers(rows, [width], dtype, layout)
        self.precision, self.centered = precision, centered
        self.grad = torch.randn(width, width)
        self.grad_mean = torch.randn(width) if mean else None
        self.mean = self.x.double().mean(0).float()

    def launches(self, architecture: int) -> list[Launch]:
        self.out = empty_like(self.x)
        return covariance_backward.backward_launches(
            self.grad, self.grad_mean, [self.x], self.mean, None, 1, self.centered, self.precision, [self.out],
            architecture,
        )  # fmt: skip

    def check(self) -> None:
        x = self.x.double()
        shifted = x - self.mean.double() if self.centered else x
        exact = shifted @ (self.grad + self.grad.mT).double() / (len(x) - 1)
        if self.grad_mean is not None:
            exact = exact + self.grad_mean.double() / len(x)
        _check_gradient(self.out, exact, self.precision)

    def results(self) -> list[Tensor]:
        return [self.out]


def _check_gradient(got: Tensor, exact: Tensor, precision: str) -> None:
    """Gradients of 16 bits are rounded, and three products are exact enough for them."""
    narrow = got.dtype != torch.float32
    bound = BOUNDS["bf16x3" if narrow and precision == "ieee" else precision]
    assert _relative_error(got, exact) <= bound + (epsilon(got.dtype) / 2 if narrow else 0)


class CovarianceMatchBackward(Case):
    """Of packed matrices."""

    def __init__(
        self,
        rows: int,
        widths: Sequence[int],
        dtype: torch.dtype,
        precision: str,
        layout: str = "contiguous",
        mean: bool = True,
        scaled: bool = True,
    ):
        self.features = _layers(rows, widths, dtype, layout)
        self.precision = precision
        self.matrices = [_symmetric(width, 8) for width in widths]
        self.grad = torch.cat([triangle.pack(m) for m in self.matrices])
        self.mean = torch.cat([x.double().mean(0) for x in self.features]).float()
        self.grad_mean = torch.randn(len(self.mean)) if mean else None
        self.scale = torch.tensor(-1.5) if scaled else None

    def launches(self, architecture: int) -> list[Launch]:
        self.out = [empty_like(x) for x in self.features]
        return covariance_backward.backward_launches(
            self.grad,
            self.grad_mean,
            self.features,
            self.mean,
            self.scale,
            1,
            True,
            self.precision,
            self.out,
            architecture,
        )

    def check(self) -> None:
        widths = [x.shape[1] for x in self.features]
        scale = 1.0 if self.scale is None else self.scale.double()
        grads = [None] * len(widths) if self.grad_mean is None else self.grad_mean.split(widths)
        for x, m, g, matrix, out in zip(
            self.features, self.mean.split(widths), grads, self.matrices, self.out, strict=True
        ):
            exact = scale * 2 / (len(x) - 1) * (x.double() - m.double()) @ matrix.double()
            if g is not None:
                exact = exact + g.double() / len(x)
            _check_gradient(out, exact, self.precision)

    def results(self) -> list[Tensor]:
        return self.out


class Gram(Case):
    def __init__(self, counts: Sequence[int], widths: Sequence[int], dtype: torch.dtype, layout: str = "contiguous"):
        groups = [_layers(n, widths, dtype, layout, seed) for seed, n in enumerate(counts)]
        self.rows = [x for features in groups for x in features]
        self.shift = [x[0].float().contiguous() for x in self.rows]
        self.num_layers = len(widths)

    def launches(self, architecture: int) -> list[Launch]:
        total = sum(len(x) for x in self.rows[:: self.num_layers])
        self.out = torch.empty(self.num_layers, total, total, dtype=torch.float64)
        return gram.gram_launches(self.rows, self.shift, self.num_layers, self.out, architecture)

    def check(self) -> None:
        exact = reference_gram.gram([x.double() for x in self.rows], [s.double() for s in self.shift], self.num_layers)
        assert torch.equal(self.out, self.out.mT)
        for got, wanted in zip(self.out, exact, strict=True):
            assert (got - wanted).abs().max() <= 32 * epsilon(torch.float32) * wanted.diagonal().max()

    def results(self) -> list[Tensor]:
        return [self.out]


class GramBackward(Case):
    def __init__(
        self,
        counts: Sequence[int],
        widths: Sequence[int],
        dtype: torch.dtype,
        layout: str = "contiguous",
        wanted: Sequence[bool] | None = None,
    ):
        groups = [_layers(n, widths, dtype, layout, seed) for seed, n in enumerate(counts)]
        self.rows = [x for features in groups for x in features]
        self.shift = [x[0].float().contiguous() for x in self.rows]
        self.wanted = list(wanted or [True] * len(self.rows))
        total = sum(counts)
        self.factors = torch.zeros(len(widths), total, -(-total // 4) * 4)
        for layer in self.factors:
            layer[:, :total] = _symmetric(total, 9)

    def launches(self, architecture: int) -> list[Launch]:
        self.out = [empty_like(x) if want else x for x, want in zip(self.rows, self.wanted, strict=True)]
        return gram.backward_launches(self.factors, self.rows, self.shift, self.wanted, self.out, architecture)

    def check(self) -> None:
        total = self.factors.shape[1]
        half = self.factors[:, :, :total].double() / 2
        expected = reference_gram.gram_backward(
            half, [x.double() for x in self.rows], [s.double() for s in self.shift], self.wanted
        )
        written = [y for y, want in zip(self.out, self.wanted, strict=True) if want]
        for got, exact in zip(written, expected, strict=True):
            assert_close(got, exact, rows=total)

    def results(self) -> list[Tensor]:
        return [y for y, want in zip(self.out, self.wanted, strict=True) if want]
