"""Training of an autoencoder on the data, of whose encoder GFMN can match the features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import moment_ops as mo
from moment_ops.training import checkpoints
from moment_ops.training.classifiers import train_network
from moment_ops.training.data import SIZES, ImageData, load, scale
from moment_ops.training.errors import TrainingError
from moment_ops.training.generators import GfmnDcgan
from moment_ops.training.pretrained import AUTOENCODER_KIND, Encoder
from moment_ops.training.settings import DATA_HELP, SECONDS_HELP, option

BATCH_SIZE = 250


@dataclass(frozen=True)
class Settings:
    """The settings of the autoencoder. The learning rate falls to 0 along a cosine."""

    method: ClassVar[str] = "autoencoder"

    data: str = option("mnist", DATA_HELP)
    size: int = option(32, "height and width of the images in pixels", choices=SIZES)
    latent_size: int = option(64, "length of the codes, and of the latent vectors of a generator that matches them")
    steps: int = option(3000, "training steps")
    seconds: float = option(120.0, SECONDS_HELP)
    batch_size: int = option(64, "images per step")
    lr: float = option(1e-3, "learning rate")
    seed: int = option(0, "seed of all random numbers")

    def __post_init__(self) -> None:
        for name, least in (("latent_size", 1), ("steps", 1), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        for name in ("seconds", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size}, expected one of {', '.join(map(str, SIZES))}")


class Autoencoder(nn.Module):
    """Images ``(N, channels, image_size, image_size)`` in [-1, 1] -> codes ``(N, latent_size)`` -> images.

    The decoder is the DCGAN-like generator of the paper.

    Source: dos Santos et al. 2019.
    """

    def __init__(self, channels: int, latent_size: int, image_size: int) -> None:
        super().__init__()
        self.encoder = Encoder(channels, latent_size, image_size)
        self.decoder = GfmnDcgan(channels, latent_size, image_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


def train(
    path: Path | str,
    given: dict[str, Any],
    *,
    data: Any = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> float:
    """Train an autoencoder to return its input, with the squared error as the loss, and save it.

    Args:
        path: the file, which must not exist.
        given: settings that differ from the defaults.
        data: a map-style Dataset, in the place of the setting ``data``.

    Returns:
        The mean squared error of the held-out images, in [-1, 1].

    Raises:
        TrainingError: a file that exists or cannot be written, data that cannot be read, or weights that diverge.
    """
    path, settings = Path(path), Settings(**given)
    if path.exists():
        raise TrainingError(f"--output: {path} exists, expected the name of a new file")
    images = load(settings.data if data is None else data, settings.size, say).to(torch.device(device))
    torch.manual_seed(settings.seed)
    network = Autoencoder(images.channels, settings.latent_size, settings.size).to(images.device)

    def loss_fn(indices: Tensor) -> Tensor:
        batch = scale(images.train[indices.to(images.train.device)], images.device)
        return functional.mse_loss(network(batch), batch)

    train_network(
        network,
        loss_fn,
        len(images.train),
        iterations=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seconds=settings.seconds,
        seed=settings.seed,
        description="autoencoder",
    )
    error, share = held_out_error(network, images)
    if not math.isfinite(error):
        raise TrainingError("the weights are non-finite; try a lower --lr")
    state = {name: getattr(network, name).state_dict() for name in ("encoder", "decoder")}
    checkpoints.save(path, AUTOENCODER_KIND, {"sizes": network.encoder.sizes, **state})
    say(f"autoencoder: the mean squared error of held-out images is {error:.4f}, {share:.1%} of their variance")
    say(f"{path}: --features autoencoder --extractor {path} --latent-size {settings.latent_size} matches its features")
    return error


@torch.no_grad()
def held_out_error(network: nn.Module, data: ImageData) -> tuple[float, float]:
    """Mean squared error of the held-out images, and its ratio to the variance of their pixels."""

    def images_and_errors(images: Tensor) -> list[Tensor]:
        images = scale(images, data.device)
        return [images, (network(images) - images).square()]

    (_, variances), (errors, _) = mo.dataset_moments(images_and_errors, data.held_out.split(BATCH_SIZE)).layers()
    assert variances is not None
    error = float(errors.mean())
    return error, error / max(float(variances.mean()), 1e-12)
