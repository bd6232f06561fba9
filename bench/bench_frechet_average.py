"""`frechet_average`: the Frechet loss of a moving average of the mixture, from features to their gradients."""

from functools import cached_property

import torch
from torch import Tensor

import moment_ops as mo
from bench.bench_frechet import METHODS, PUBLIC, FrechetBench, from_covariance
from bench.harness import OURS

DECAY = 0.99


class FrechetAverageBench(FrechetBench):
    """The state does not advance while it is timed: every call mixes the batch with the same past."""

    operator = "frechet_average"
    contestants = (OURS, *(f"{OURS}: {method}" for method in METHODS[:2]), PUBLIC)

    @cached_property
    def past(self) -> mo.Moments:
        return self._moments_of_draws(seed=2)

    def _mixed(self, wide: Tensor) -> Tensor:
        """As public losses average: the mean and `C + m m'`."""
        assert self.past.cov is not None
        mean = wide.mean(0)
        second = torch.cov(wide.T) + torch.outer(mean, mean)
        old = self.past.cov[0] + torch.outer(self.past.mean, self.past.mean)
        mean, second = DECAY * self.past.mean + (1 - DECAY) * mean, DECAY * old + (1 - DECAY) * second
        return from_covariance(mean, second - torch.outer(mean, mean), self.target, self.root)

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        x = self.features[0].detach().double().requires_grad_()
        return [g.float() for g in torch.autograd.grad(self._mixed(x), x)]

    def _public(self, x: Tensor) -> Tensor:
        return self._mixed(x.double())

    def _module(self, method: str) -> mo.FrechetLoss:
        assert self.past.cov is not None
        loss_fn = mo.FrechetLoss(self.target, mo.MovingAverage(DECAY), method=method).eval()
        cov = self.past.cov[0]
        state = {
            "mean_0": self.past.mean,
            "cov_0": self.root @ cov @ self.root,
            "trace_0": cov.trace().reshape(1),
            "step_0": torch.tensor(1),
        }
        loss_fn.load_state_dict(loss_fn.state_dict() | state)
        return loss_fn


def test_frechet_average(benchmark, call) -> None:
    benchmark(call)


if __name__ == "__main__":
    from bench.command_line import main

    main(operators=("frechet_average",))
