"""The Frechet loss written plainly in float64, by autograd through the singular values."""

import torch
from torch import Tensor


def root_of(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def distance(mean: Tensor, rows: Tensor, target_mean: Tensor, target_cov: Tensor) -> Tensor:
    """The distance of the Gaussian with covariance R'R, by the nuclear norm of R T^1/2."""
    t = target_cov.double()
    singular = torch.linalg.svdvals(rows @ root_of(t))
    return (mean - target_mean.double()).square().sum() + rows.square().sum() + t.trace() - 2 * singular.sum()


def of_rows(x: Tensor, target_mean: Tensor, target_cov: Tensor, correction: int = 1) -> Tensor:
    """Of a batch (N, D); differentiable."""
    wide = x.double().flatten(1)
    mean = wide.mean(0)
    rows = (wide - mean) / (len(x) - correction) ** 0.5
    return distance(mean, rows, target_mean, target_cov)


class Average:
    """The moving average of the mixture, as its published form has it: of the mean and of C + m m'."""

    def __init__(self, decay: float, correction: int = 1, bias_correction: bool = False) -> None:
        self.decay, self.correction, self.bias_correction = decay, correction, bias_correction
        self.mean = self.second = None
        self.step = 0

    def __call__(self, x: Tensor, target_mean: Tensor, target_cov: Tensor) -> Tensor:
        return of_covariance(*self.advance(x), target_mean, target_cov)

    def advance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, covariance) after a step."""
        wide = x.double().flatten(1)
        mean = wide.mean(0)
        centred = wide - mean
        second = centred.mT @ centred / (len(x) - self.correction) + torch.outer(mean, mean)
        self.step += 1
        b = 0.0 if self.step == 1 else self.decay
        if self.bias_correction:
            b = self.decay * (1 - self.decay ** (self.step - 1)) / (1 - self.decay**self.step)
        if self.mean is not None:
            mean, second = b * self.mean + (1 - b) * mean, b * self.second + (1 - b) * second
        self.mean, self.second = mean.detach(), second.detach()
        return mean, second - torch.outer(mean, mean)


class _NuclearNorm(torch.autograd.Function):
    """tr (T^1/2 C T^1/2)^1/2, by eigenvalues, with a derivative that is finite where they vanish."""

    @staticmethod
    def forward(ctx, cov, root):
        values, vectors = torch.linalg.eigh(root @ cov @ root)
        inverse = torch.where(values > values[-1] * 1e-14, values, torch.inf).rsqrt()
        ctx.save_for_backward(root @ (vectors * inverse) @ vectors.mT @ root / 2)
        return values.clamp_min(0).sqrt().sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def of_covariance(mean: Tensor, cov: Tensor, target_mean: Tensor, target_cov: Tensor) -> Tensor:
    t = target_cov.double()
    trace = _NuclearNorm.apply(cov, root_of(t))
    return (mean - target_mean.double()).square().sum() + cov.trace() + t.trace() - 2 * trace
