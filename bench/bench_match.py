"""`match_`: the matching loss with the ADAM moving average, from features to their gradients."""

from functools import cached_property

import torch
from torch import Tensor, nn

import moment_ops as mo
from bench import agreement, baselines
from bench.harness import BOTH, COMPILED, FORWARD, OURS, Bench, Entry
from bench.machine import Traffic
from bench.workloads import make_features, make_vectors

# Steps of the average before gradients are compared.
STEPS = 3
# `moments`, then `match_`.
IN_TWO_CALLS = f"{OURS} in two calls"


class _InTwoCalls(nn.Module):
    """As where the moments come from taps; features of a loop of one's own are read by `match_` itself."""

    def __init__(self, loss: mo.MomentLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.loss(mo.moments(features))


class MatchBench(Bench):
    """From features to the loss; backward to their gradients. The average takes a step in every call."""

    operator = "match"
    contestants = (
        OURS,
        IN_TWO_CALLS,
        f"{COMPILED}mean, var",
        f"{COMPILED}sums of squares",
        "eager: sums of squares",
        "eager: mean, var",
        "original",
    )
    slow_to_prepare = (f"{COMPILED}mean, var",)
    default_cases = (("gfmn", "float32"), ("gfmn", "bfloat16"), ("digits", "float32"))

    @cached_property
    def features(self) -> list[Tensor]:
        return make_features(self.workload, self.dtype, self.device)

    @cached_property
    def target(self) -> tuple[Tensor, Tensor]:
        return make_vectors(self.workload, self.device)

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        """Gradients of the features in the call number STEPS."""
        moments = agreement.exact_moments(self.features)
        differences = [target - moment for target, moment in zip(self.target, moments, strict=True)]
        averages = agreement.exact_averages(differences, STEPS)
        return agreement.exact_gradients(self.features, moments[0], *(-average for average in averages))

    @property
    def tolerance(self) -> float:
        return agreement.tolerance(self.dtype)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Features are read once forward; backward reads them once and writes as much.

        The packed vectors: two targets are read, three vectors of state are read and written for means and variances
        each; the mean and two derivatives are written, and read in backward.
        """
        features, vector = self.workload.bytes(self.dtype), 4 * self.workload.columns
        forward = Traffic(features + 2 * vector, (2 * 6 + 3) * vector)
        return {FORWARD: forward, BOTH: Traffic(forward.read + 3 * vector, forward.read_write + 2 * features)}

    def _loss(self, contestant: str) -> nn.Module:
        if contestant in (OURS, IN_TWO_CALLS):
            target = mo.Moments(*self.target, shapes=self.workload.shapes)
            average = mo.AdamMovingAverage(baselines.LR, baselines.BETAS, baselines.EPS)
            loss = mo.MomentLoss(target, average, process_group=False)
            return loss if contestant == OURS else _InTwoCalls(loss)
        if contestant == "original":
            return baselines.Original(*self.target)
        squares = contestant.endswith("sums of squares")
        reduction = baselines.sums_of_squares if squares else baselines.per_layer
        loss = baselines.PackedLoss(reduction, *self.target)
        return torch.compile(loss, fullgraph=True, dynamic=False) if contestant.startswith(COMPILED) else loss

    def entry(self, contestant: str) -> Entry:
        loss = self._loss(contestant)
        # The published code computes gradients of the average as well, though it throws them away.
        leaves = [*self.features, *loss.parameters()]

        def forward() -> Tensor:
            return loss(self.features)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), leaves)

        def error() -> float:
            for _ in range(STEPS - 1):
                forward()
            grads = both()[: len(self.features)]
            return agreement.relative_error(grads, self.exact_gradients)

        return Entry({FORWARD: forward, BOTH: both}, error)


def test_match(benchmark, call) -> None:
    benchmark(call)


if __name__ == "__main__":
    from bench.command_line import main

    main(operators=("match",))
