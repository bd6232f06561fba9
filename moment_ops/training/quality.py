"""Measures of the quality of samples, from features of samples and of real images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import moment_ops as mo

NEIGHBOUR = 3
# Weights of the scales of MS-SSIM, the finest first: Wang, Simoncelli, Bovik 2003.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SCALES = {32: 2, 64: 3, 128: 4}
WINDOW, WINDOW_STD = 11, 1.5
CHUNK = 1000


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)`` of features ``(N, D)``, in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet(features: Tensor, real: tuple[Tensor, Tensor]) -> float:
    """Frechet distance between Gaussians fitted to features ``(N, D)`` and to real images."""
    return float(mo.frechet_distance(*gaussian(features), *real))


def kernel_distance(features: Tensor, real: Tensor) -> float:
    """Squared kernel distance between features ``(N, D)`` and ``(M, D)``, unbiased, with the kernel (x.y / D + 1)^3.

    Its expectation is 0 for equal distributions, so that it may be negative. Source: Binkowski et al. 2018.
    """

    def kernel_sum(x: Tensor, y: Tensor) -> float:
        rows = x.double().split(CHUNK)
        return sum(float((row @ y.double().T / y.shape[1] + 1).pow(3).sum()) for row in rows)

    def within(x: Tensor) -> float:
        diagonal = (x.double().square().sum(1) / x.shape[1] + 1).pow(3).sum()
        return (kernel_sum(x, x) - float(diagonal)) / (len(x) * (len(x) - 1))

    return within(features) + within(real) - 2 * kernel_sum(features, real) / (len(features) * len(real))


def precision_recall(features: Tensor, real: Tensor, neighbour: int = NEIGHBOUR) -> tuple[float, float]:
    """The share of samples near real images, and of real images near samples.

    Near is: within the distance of an image of the other set to its ``neighbour``-th neighbour in its own set. Source:
    Kynkaanniemi et al. 2019.
    """

    def share(points: Tensor, centres: Tensor) -> float:
        radii = torch.cat(
            [torch.cdist(part, centres).kthvalue(neighbour + 1, dim=1).values for part in centres.split(CHUNK)]
        )
        inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(CHUNK)]
        return float(torch.cat(inside).double().mean())

    features, real = features.double(), real.double()
    return share(features, real), share(real, features)


def ms_ssim(first: Tensor, second: Tensor, scales: int) -> Tensor:
    """Multi-scale structural similarity ``(N,)`` of images ``(N, C, S, S)`` in [-1, 1], with the finest scales only.

    The weights of the scales are divided by their sum. Source: Wang, Simoncelli, Bovik 2003, with 5 scales.
    """
    x, y = (first + 1) / 2, (second + 1) / 2
    weights = torch.tensor(SCALE_WEIGHTS[:scales], dtype=x.dtype, device=x.device)
    weights = weights / weights.sum()
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * WINDOW_STD**2))
    window = torch.outer(window, window) / window.sum() ** 2

    def blur(images: Tensor) -> Tensor:
        return functional.conv2d(images.flatten(0, 1)[:, None], window[None, None]).view(
            *images.shape[:2], images.shape[2] - WINDOW + 1, -1
        )

    result = torch.ones(len(x), dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(weights):
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
        cov = blur(x * y) - mean_x * mean_y
        value = (2 * cov + 0.03**2) / (var_x + var_y + 0.03**2)
        if scale == scales - 1:
            value = value * (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
        result = result * value.mean((1, 2, 3)).clamp_min(0) ** weight
        x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
    return result


def similarity(images: Tensor) -> float:
    """The mean MS-SSIM of each image and the next: high where images resemble one another, low for diverse ones."""
    pairs = images[: len(images) // 2 * 2]
    return float(ms_ssim(pairs[::2], pairs[1::2], SCALES[images.shape[2]]).mean())
