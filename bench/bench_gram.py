"""`gram`: the distance of two covariances through inner products of rows, from features to their gradients."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

import moment_ops as mo
from bench import agreement
from bench.harness import BOTH, COMPILED, FORWARD, OURS, Bench, Entry
from bench.machine import Traffic
from bench.workloads import make_features
from moment_ops.losses.gram_distance import gram_distance

# The widest layer for which (D, D) matrices are tried.
WIDEST = 8192


def _centred(x: Tensor) -> Tensor:
    rows = x.flatten(1).float()
    return rows - rows.mean(0)


def through_rows(input: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Centred rows, their products, the products' norms."""
    total = input[0].new_zeros((), dtype=torch.float32)
    for x, y in zip(input, other, strict=True):
        x, y = _centred(x), _centred(y)
        n, m = len(x) - 1, len(y) - 1
        total = total + (x @ x.T).square().sum() / n**2
        total = total + (y @ y.T).square().sum() / m**2 - 2 * (x @ y.T).square().sum() / (n * m)
    return total


def through_covariances(input: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Two (D, D) covariances per layer and the norm of their difference."""
    total = input[0].new_zeros((), dtype=torch.float32)
    for x, y in zip(input, other, strict=True):
        x, y = _centred(x), _centred(y)
        total = total + (x.T @ x / (len(x) - 1) - y.T @ y / (len(y) - 1)).square().sum()
    return total


class GramBench(Bench):
    """From features and as many others to the loss; backward to the gradients of the features."""

    operator = "gram"
    contestants = (
        OURS,
        "moment_ops: covariances",
        f"{COMPILED}products of rows",
        "eager: products of rows",
        "eager: covariances",
    )
    slow_to_prepare = (f"{COMPILED}products of rows",)
    default_cases = (("vgg19", "float32"), ("vgg19", "bfloat16"), ("pooled", "float32"))

    @cached_property
    def features(self) -> list[Tensor]:
        return make_features(self.workload, self.dtype, self.device)

    @cached_property
    def other(self) -> list[Tensor]:
        return [y.detach() for y in make_features(self.workload, self.dtype, self.device, seed=1)]

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        """`4/(n-1) (Xc Xc' Xc/(n-1) - Xc Yc' Yc/(m-1))` in float64, kept in float32."""
        gradients = []
        for features, other in zip(self.features, self.other, strict=True):
            x, y = features.detach().flatten(1).double(), other.flatten(1).double()
            x -= x.mean(0)
            y -= y.mean(0)
            n, m = len(x) - 1, len(y) - 1
            gradient = (x @ x.T / n) @ x - (x @ y.T / m) @ y
            gradients.append((4 / n * gradient).float().view(features.shape))
        return gradients

    @property
    def tolerance(self) -> float:
        return agreement.tolerance(self.dtype)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Both sets of features are read; backward reads both again and writes the gradients of one."""
        features = self.workload.bytes(self.dtype)
        return {FORWARD: Traffic(2 * features), BOTH: Traffic(3 * features, 2 * features)}

    def _loss(self, contestant: str) -> Callable[[], Tensor]:
        if contestant.endswith("covariances"):
            width = max(x[0].numel() for x in self.features)
            if width > WIDEST:
                raise ValueError(f"a covariance of {width:,} columns would take {4e-9 * width**2:.0f} GB")
            if contestant == "eager: covariances":
                return lambda: through_covariances(self.features, self.other)
            return lambda: mo.covariance_distance(self.features, self.other, method="covariance")
        if contestant == OURS:
            weight = [1.0] * len(self.features)
            return lambda: gram_distance(self.features, self.other, weight=weight)
        function = through_rows
        if contestant.startswith(COMPILED):
            function = torch.compile(through_rows, fullgraph=True, dynamic=False)
        return lambda: function(self.features, self.other)

    def entry(self, contestant: str) -> Entry:
        forward = self._loss(contestant)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), self.features)

        def error() -> float:
            return agreement.relative_error(both(), self.exact_gradients)

        return Entry({FORWARD: forward, BOTH: both}, error)


def test_gram(benchmark, call) -> None:
    benchmark(call)


if __name__ == "__main__":
    from bench.command_line import main

    main(operators=("gram",))
