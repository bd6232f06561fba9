"""The quality of samples: their distance to real images, in the features of a network that is not matched."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moment_ops.training import cache, checkpoints, judges, quality
from moment_ops.training.data import ImageData, scale, shuffled

BATCH_SIZE = 250
SETS = 10
# Of more real images, as many are chosen for measures of pairs.
PAIRED_IMAGES = 5000


@dataclass(frozen=True)
class Quality:
    """Measures of samples, and of held-out real images, against the training images.

    Attributes:
        judge: the network and its features.
        samples: number of samples of a set, as many as are held out.
        sets: number of independent sets, over which means and standard deviations are taken.
        scales: scales of MS-SSIM.
    """

    judge: str
    samples: int
    sets: int
    frechet_distance: float
    frechet_distance_std: float
    held_out_frechet_distance: float
    held_out_frechet_distance_std: float
    kernel_distance: float
    kernel_distance_std: float
    held_out_kernel_distance: float
    precision: float
    recall: float
    held_out_precision: float
    held_out_recall: float
    ms_ssim: float
    real_ms_ssim: float
    scales: int

    def lines(self) -> list[str]:
        """The measures as a table, the most important one last."""
        ratio = self.frechet_distance / self.held_out_frechet_distance
        rows = [
            ("", "samples", "real images"),
            (f"MS-SSIM of pairs, {self.scales} scales", f"{self.ms_ssim:.3f}", f"{self.real_ms_ssim:.3f}"),
            ("precision", f"{self.precision:.3f}", f"{self.held_out_precision:.3f}"),
            ("recall", f"{self.recall:.3f}", f"{self.held_out_recall:.3f}"),
            (
                "kernel distance",
                f"{self.kernel_distance:.4g} +- {self.kernel_distance_std:.2g}",
                f"{self.held_out_kernel_distance:.4g}",
            ),
            (
                "Frechet distance",
                f"{self.frechet_distance:.2f} +- {self.frechet_distance_std:.2f}",
                f"{self.held_out_frechet_distance:.2f} +- {self.held_out_frechet_distance_std:.2f}",
            ),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return [
            f"judged by: {self.judge}; {self.sets} sets of {self.samples:,} samples, {self.samples:,} held-out images;"
            " with standard deviations",
            *table[:-1],
            f"{table[-1]}  ratio {ratio:.2f}",
        ]

    def save(self, path: Path) -> None:
        checkpoints.write_atomically(path, (json.dumps(asdict(self), indent=2) + "\n").encode())


class Evaluator:
    """Distances to the training images of ``data``, in features of a judge.

    ``held_out_distance`` is the distance of the held-out real images, which a perfect generator would reach. A distance
    decreases with the number of samples; therefore as many samples are drawn as images are held out.

    Args:
        judge: the name of a network, or a frozen module with a ``description``, which maps images ``(N, C, S, S)`` in
            [-1, 1] to features ``(N, D)``.
    """

    def __init__(self, data: ImageData, judge: str | nn.Module = judges.DIGITS, seed: int = 1234) -> None:
        self.judge: nn.Module = (judges.make(judge) if isinstance(judge, str) else judge).to(data.device)
        self.description = str(getattr(self.judge, "description", type(self.judge).__name__))
        self.data, self.samples, self.seed = data, len(data.held_out), seed
        self.train = self.of_data("train", data.train)
        self.held_out = self.of_data("held-out", data.held_out)
        self.gaussian = quality.gaussian(self.train)
        self.held_out_distance = quality.frechet(self.held_out, self.gaussian)

    def of_data(self, part: str, images: Tensor) -> Tensor:
        """Features of uint8 images ``(N, D)``, which are kept in the cache."""
        batches = (scale(batch, self.data.device) for batch in images.split(BATCH_SIZE))
        key = [self.data.fingerprint, part, cache.fingerprint(self.judge), self.description]
        return cache.tensor([*key, str(torch.get_default_dtype())], lambda: self.features(batches))

    @torch.no_grad()
    def features(self, batches: Iterable[Tensor]) -> Tensor:
        """Features ``(N, D)`` of batches of images in [-1, 1], on the CPU."""
        return torch.cat([self.judge(batch).cpu() for batch in batches])

    def distance(self, batches: Iterable[Tensor]) -> float:
        """Frechet distance between the training images and ``batches`` of images in [-1, 1]."""
        return quality.frechet(self.features(batches), self.gaussian)

    def __call__(self, generator: nn.Module) -> float:
        """Frechet distance of one set of samples of ``generator``, from the same latent vectors at every call."""
        return self.distance(sample(generator, self.samples, self.seed))

    def measure(self, generator: nn.Module, sets: int = SETS) -> Quality:
        """All measures, of independent sets of samples.

        The standard deviation over sets is an error bar. A bootstrap of one set is not: the distance of repeated
        samples is larger. That of the held-out images comes from other splits of all real images.
        """
        chosen = self.train[shuffled(len(self.train))[:PAIRED_IMAGES]]
        same = chosen[: self.samples]
        distances, kernels, near, similar = [], [], [], []
        for number in range(sets):
            images = torch.cat(sample(generator, self.samples, self.seed + number))
            features = self.features(images.split(BATCH_SIZE))
            distances.append(quality.frechet(features, self.gaussian))
            kernels.append(quality.kernel_distance(features, chosen))
            if number == 0:
                near.append(quality.precision_recall(features[: len(same)], same))
                similar.append(quality.similarity(images))
        held_out = self.held_out[: len(same)]
        held_out_precision, held_out_recall = quality.precision_recall(held_out, same)
        return Quality(
            judge=self.description,
            samples=self.samples,
            sets=sets,
            frechet_distance=statistics.fmean(distances),
            frechet_distance_std=spread(distances),
            held_out_frechet_distance=self.held_out_distance,
            held_out_frechet_distance_std=spread(list(self.split_distances(sets))),
            kernel_distance=statistics.fmean(kernels),
            kernel_distance_std=spread(kernels),
            held_out_kernel_distance=quality.kernel_distance(self.held_out, chosen),
            precision=near[0][0],
            recall=near[0][1],
            held_out_precision=held_out_precision,
            held_out_recall=held_out_recall,
            ms_ssim=similar[0],
            real_ms_ssim=quality.similarity(scale(self.data.held_out[:PAIRED_IMAGES])),
            scales=quality.SCALES[self.data.size],
        )

    def split_distances(self, splits: int) -> Iterator[float]:
        """Distances of other held-out sets of the same size, from other splits of all real images."""
        real = torch.cat([self.held_out, self.train])
        for number in range(splits):
            order = torch.randperm(len(real), generator=torch.Generator().manual_seed(number))
            held_out, train = real[order[: self.samples]], real[order[self.samples :]]
            yield quality.frechet(held_out, quality.gaussian(train))


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


@torch.no_grad()
def sample(generator: nn.Module, count: int, seed: int) -> list[Tensor]:
    """``count`` images in [-1, 1], in batches, with the generator in evaluation mode."""
    device = next(generator.parameters()).device
    latent = torch.randn(count, generator.latent_size, generator=torch.Generator().manual_seed(seed))
    training = generator.training
    generator.eval()
    images = [generator(part.to(device)) for part in latent.split(BATCH_SIZE)]
    generator.train(training)
    return images
