"""`moments` and `moments_backward`: packed mean and variance of many layers, and their gradients."""

from functools import cached_property

import torch
from torch import Tensor

import moment_ops as mo
from bench import agreement, baselines
from bench.harness import BOTH, COMPILED, FORWARD, OURS, Bench, Entry
from bench.machine import Traffic
from bench.workloads import make_features, make_vectors


def _ours(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    moments = mo.moments(features)
    return moments.mean, moments.var


REDUCTIONS = {
    OURS: _ours,
    f"{COMPILED}mean, var": baselines.per_layer,
    f"{COMPILED}sums of squares": baselines.sums_of_squares,
    "eager: sums of squares": baselines.sums_of_squares,
    "eager: mean, var": baselines.per_layer,
    "original: concatenated": baselines.concatenated,
}


class MomentsBench(Bench):
    """From features to packed moments; backward from given gradients of the moments."""

    operator = "moments"
    contestants = tuple(REDUCTIONS)
    slow_to_prepare = (f"{COMPILED}mean, var",)
    default_cases = (("gfmn", "float32"), ("gfmn", "bfloat16"))

    @cached_property
    def features(self) -> list[Tensor]:
        return make_features(self.workload, self.dtype, self.device)

    @cached_property
    def grads(self) -> tuple[Tensor, Tensor]:
        return make_vectors(self.workload, self.device)

    @cached_property
    def exact(self) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        """The moments and the gradients of the features."""
        moments = agreement.exact_moments(self.features)
        grads = [grad.double() for grad in self.grads]
        return moments, agreement.exact_gradients(self.features, moments[0], *grads)

    @property
    def tolerance(self) -> float:
        return agreement.tolerance(self.dtype)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Features are read once forward; backward reads them once and writes as much.

        The packed vectors: mean and variance are written; the mean and both gradients are read.
        """
        features, vector = self.workload.bytes(self.dtype), 4 * self.workload.columns
        forward = Traffic(features, 2 * vector)
        return {FORWARD: forward, BOTH: Traffic(forward.read + 3 * vector, forward.read_write + 2 * features)}

    def entry(self, contestant: str) -> Entry:
        reduction = REDUCTIONS[contestant]
        if contestant.startswith(COMPILED):
            reduction = torch.compile(reduction, fullgraph=True, dynamic=False)

        def forward() -> tuple[Tensor, Tensor]:
            return reduction(self.features)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), self.features, self.grads)

        def error() -> float:
            moments, grads = self.exact
            return max(agreement.relative_error(forward(), moments), agreement.relative_error(both(), grads))

        return Entry({FORWARD: forward, BOTH: both}, error)


def test_moments(benchmark, call) -> None:
    benchmark(call)


if __name__ == "__main__":
    from bench.command_line import main

    main(operators=("moments",))
