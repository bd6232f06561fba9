"""The quality of samples: their Frechet distance to real images, in the features of an independent classifier."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import moment_ops as mo
from moment_ops.training.data import ImageData, scale
from moment_ops.training.networks import EvaluationClassifier, Generator, freeze

WEIGHTS = Path(__file__).with_name("evaluator.npz")
BATCH_SIZE = 250


def load_classifier() -> EvaluationClassifier:
    """The frozen digit classifier that is part of the package. ``make_evaluator`` trains it."""
    classifier = EvaluationClassifier()
    with np.load(WEIGHTS) as arrays:
        state = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}
    classifier.load_state_dict({**classifier.state_dict(), **state})
    return freeze(classifier)


def save_classifier(classifier: nn.Module, path: Path = WEIGHTS) -> None:
    """Write the weights in half precision, which does not change the class of any digit."""
    state = {name: value for name, value in classifier.state_dict().items() if value.is_floating_point()}
    np.savez_compressed(path, **{name: value.cpu().numpy().astype(np.float16) for name, value in state.items()})


class Evaluator:
    """Frechet distances to the training images of ``data``.

    ``held_out_distance`` is the distance of the held-out real images, which a perfect generator would reach. A distance
    decreases with the number of samples; therefore as many samples are drawn as images are held out. For data other
    than digits, distances only compare runs on the same data.
    """

    def __init__(self, data: ImageData, seed: int = 1234) -> None:
        self.classifier = load_classifier().to(data.train.device)
        self.samples, self.seed = len(data.held_out), seed
        self.train_mean, self.train_cov = self.gaussian(scale(batch) for batch in data.train.split(BATCH_SIZE))
        self.held_out_distance = self.distance(scale(batch) for batch in data.held_out.split(BATCH_SIZE))

    @torch.no_grad()
    def gaussian(self, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean ``(64,)`` and covariance ``(64, 64)`` of the features, in float64 on the CPU."""
        features = torch.cat([self.classifier.features(batch).cpu() for batch in batches]).double()
        return features.mean(0), torch.cov(features.T)

    def distance(self, batches: Iterable[Tensor]) -> float:
        """Frechet distance between the training images and ``batches`` of images in [-1, 1]."""
        mean, cov = self.gaussian(batches)
        return float(mo.frechet_distance(mean, cov, self.train_mean, self.train_cov))

    def __call__(self, generator: Generator) -> float:
        """Frechet distance of samples of ``generator``, from the same latent vectors at every call."""
        return self.distance(sample(generator, self.samples, self.seed))


@torch.no_grad()
def sample(generator: Generator, count: int, seed: int) -> list[Tensor]:
    """``count`` images in [-1, 1], in batches, with the generator in evaluation mode."""
    device = next(generator.parameters()).device
    latent = torch.randn(count, generator.latent_size, generator=torch.Generator().manual_seed(seed))
    training = generator.training
    generator.eval()
    images = [generator(part.to(device)) for part in latent.split(BATCH_SIZE)]
    generator.train(training)
    return images
