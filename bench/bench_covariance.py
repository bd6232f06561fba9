"""`covariance_match_`: the squared distance of a full covariance to a target, from features to their gradients."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

import moment_ops as mo
from bench import agreement
from bench.harness import BOTH, COMPILED, FORWARD, OURS, Bench, Entry
from bench.machine import Traffic
from bench.workloads import make_features
from moment_ops.ops import triangle

# The loss alone, for features that want no gradients.
VALUE = "value"


def obvious(input: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Centre, multiply, Frobenius norm of the difference."""
    total = input[0].new_zeros((), dtype=torch.float32)
    for x, matrix in zip(input, target, strict=True):
        rows = x.flatten(1).float()
        rows = rows - rows.mean(0)
        total = total + (rows.T @ rows / (len(rows) - 1) - matrix).square().sum()
    return total


def by_torch_cov(input: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """`torch.cov`, Frobenius norm of the difference."""
    total = input[0].new_zeros((), dtype=torch.float32)
    for x, matrix in zip(input, target, strict=True):
        total = total + (torch.cov(x.flatten(1).float().T) - matrix).square().sum()
    return total


class CovarianceBench(Bench):
    """From features to the loss; backward to their gradients. No average."""

    operator = "covariance"
    contestants = (OURS, f"{COMPILED}centre, mm", "eager: centre, mm", "eager: torch.cov")
    default_cases = (("d2048", "float32"), ("d1024", "float32"), ("d512", "float32"), ("d2048", "bfloat16"))
    # On feature maps the matrices would not fit.
    workloads = ("d2048", "d1024", "d512", "pooled", "tiny")

    @cached_property
    def features(self) -> list[Tensor]:
        return make_features(self.workload, self.dtype, self.device)

    @cached_property
    def target(self) -> list[Tensor]:
        """Covariances of other draws of the same features."""
        samples = make_features(self.workload, torch.float32, self.device, seed=1)
        return [torch.cov(y.detach().flatten(1).T) for y in samples]

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        """`4/(n-1) Xc (C - T)` in float64, kept in float32."""
        gradients = []
        for x, matrix in zip(self.features, self.target, strict=True):
            rows = x.detach().flatten(1).double()
            rows -= rows.mean(0)
            freedom = len(rows) - 1
            gradients.append((4 / freedom * rows @ (rows.T @ rows / freedom - matrix)).float().view(x.shape))
        return gradients

    @property
    def tolerance(self) -> float:
        return agreement.tolerance(self.dtype)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Features are read, and a triangle of the target; backward reads the features again and writes as much.

        The triangle of the derivative is written forward and read in backward.
        """
        features = self.workload.bytes(self.dtype)
        matrix = 4 * triangle.total_size([x[0].numel() for x in self.features])
        value = Traffic(features + matrix)
        forward = Traffic(value.read, matrix)
        both = Traffic(forward.read + matrix, forward.read_write + 2 * features)
        return {VALUE: value, FORWARD: forward, BOTH: both}

    def _loss(self, contestant: str) -> Callable[[Sequence[Tensor]], Tensor]:
        if contestant == OURS:
            return lambda input: mo.covariance_loss(input, self.target)
        function = by_torch_cov if contestant.endswith("torch.cov") else obvious
        if contestant.startswith(COMPILED):
            function = torch.compile(function, fullgraph=True, dynamic=False)
        return lambda input: function(input, self.target)

    def entry(self, contestant: str) -> Entry:
        loss = self._loss(contestant)
        constants = [x.detach() for x in self.features]

        def value() -> Tensor:
            return loss(constants)

        def forward() -> Tensor:
            return loss(self.features)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), self.features)

        def error() -> float:
            return agreement.relative_error(both(), self.exact_gradients)

        return Entry({VALUE: value, FORWARD: forward, BOTH: both}, error)


def test_covariance(benchmark, call) -> None:
    benchmark(call)


if __name__ == "__main__":
    from bench.command_line import main

    main(operators=("covariance",))
