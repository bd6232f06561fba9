"""`frechet`: the Frechet loss of a batch, from features to their gradients."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

import moment_ops as mo
from bench import agreement
from bench.harness import BOTH, FORWARD, OURS, Bench, Entry
from bench.machine import Traffic
from bench.workloads import make_features

# "auto" must be about as fast as the faster of the two that are exact on the device.
METHODS = ("qdwh", "eigh", "polynomial")
PUBLIC = "eager: eigvalsh of (D, D)"
FASTFID = "eager: eigvalsh of (N, N)"
# What public losses add below the root, whose derivative is infinite at zero.
TINY = 1e-20


def root_of(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def from_covariance(mean: Tensor, cov: Tensor, target: mo.Moments, root: Tensor) -> Tensor:
    """The distance from float64 eigenvalues of (D, D), as public losses write it."""
    trace = torch.linalg.eigvalsh(root @ cov @ root).clamp_min(TINY).sqrt().sum()
    assert target.cov is not None
    return (mean - target.mean).square().sum() + cov.trace() + target.cov[0].trace() - 2 * trace


def from_rows(x: Tensor, target: mo.Moments, root: Tensor) -> Tensor:
    """The distance from float64 eigenvalues of (N, N): FastFID, Mathiasen and Hvilshoj 2020."""
    wide = x.double()
    mean = wide.mean(0)
    rows = (wide - mean) / (len(x) - 1) ** 0.5
    mapped = rows @ root
    trace = torch.linalg.eigvalsh(mapped @ mapped.mT).clamp_min(TINY).sqrt().sum()
    assert target.cov is not None
    return (mean - target.mean).square().sum() + rows.square().sum() + target.cov[0].trace() - 2 * trace


class FrechetBench(Bench):
    """From features to the loss; backward to their gradients. No average; the root of the target is there."""

    operator = "frechet"
    contestants = (OURS, *(f"{OURS}: {method}" for method in METHODS), PUBLIC, FASTFID)
    workloads = ("n256d2048", "n256d1024", "n256d512", "d2048", "n1024d1024", "n1024d512", "pooled")
    default_cases = tuple((workload, "float32") for workload in workloads[:-1])

    @cached_property
    def features(self) -> list[Tensor]:
        return make_features(self.workload, self.dtype, self.device)

    @cached_property
    def target(self) -> mo.Moments:
        """Moments of other draws of the same features, at least as many as columns."""
        return self._moments_of_draws(seed=1)

    def _moments_of_draws(self, seed: int) -> mo.Moments:
        parts = []
        for i in range(-(-2 * self.workload.columns // self.workload.batch)):
            (y,) = make_features(self.workload, torch.float32, self.device, seed=1000 * seed + i)
            parts.append(y.detach().double())
        drawn = torch.cat(parts)
        return mo.Moments(drawn.mean(0), cov=torch.cov(drawn.T), count=len(drawn))

    @cached_property
    def root(self) -> Tensor:
        assert self.target.cov is not None
        return root_of(self.target.cov[0])

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        x = self.features[0].detach().double().requires_grad_()
        loss = from_covariance(x.mean(0), torch.cov(x.T), self.target, self.root)
        return [g.float() for g in torch.autograd.grad(loss, x)]

    @property
    def tolerance(self) -> float:
        return agreement.tolerance(self.dtype)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Features and a float64 matrix are read; backward writes the gradients."""
        features, matrix = self.workload.bytes(self.dtype), 8 * self.workload.columns**2
        return {FORWARD: Traffic(features + matrix), BOTH: Traffic(features + 2 * matrix, features)}

    def _module(self, method: str) -> mo.FrechetLoss:
        return mo.FrechetLoss(self.target, method=method)

    def _loss(self, contestant: str) -> Callable[[Tensor], Tensor]:
        if contestant.startswith(OURS):
            loss_fn = self._module(contestant.partition(": ")[2] or "auto")
            return lambda x: loss_fn(x)
        if contestant == FASTFID:
            return lambda x: from_rows(x, self.target, self.root)
        return self._public

    def _public(self, x: Tensor) -> Tensor:
        wide = x.double()
        return from_covariance(wide.mean(0), torch.cov(wide.T), self.target, self.root)

    def entry(self, contestant: str) -> Entry:
        loss, (x,) = self._loss(contestant), self.features

        def forward() -> Tensor:
            return loss(x)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), x)

        def error() -> float:
            return agreement.relative_error(both(), self.exact_gradients)

        return Entry({FORWARD: forward, BOTH: both}, error)


def test_frechet(benchmark, call) -> None:
    benchmark(call)


if __name__ == "__main__":
    from bench.command_line import main

    main(operators=("frechet", "frechet_average"))
