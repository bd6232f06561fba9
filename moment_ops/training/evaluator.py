"""How good samples are: the Frechet distance to real images in the features of an independent classifier."""

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
    """The frozen digit classifier that ships with the package (made by ``make_evaluator``)."""
    classifier = EvaluationClassifier()
    with np.load(WEIGHTS) as arrays:
        state = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}
    classifier.load_state_dict({**classifier.state_dict(), **state})
    return freeze(classifier)


def save_classifier(classifier: nn.Module, path: Path = WEIGHTS) -> None:
    """Weights in half precision, which changes no digit's class."""
    state = {name: value for name, value in classifier.state_dict().items() if value.is_floating_point()}
    np.savez_compressed(path, **{name: value.cpu().numpy().astype(np.float16) for name, value in state.items()})


class Evaluator:
    """Frechet distances to the training images of ``data``, of as many samples as are held out.

    The distance falls with the number of samples; equal numbers make the two distances comparable.
    ``held_out_distance`` is that of real images never trained on: what a perfect generator would reach.
    For data other than digits the distances only rank runs on the same data.
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
        """Frechet distance of ``generator``'s samples, the same latent vectors every time."""
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
