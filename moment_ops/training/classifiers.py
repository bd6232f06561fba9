"""Training of the two classifiers: one extracts features, the other evaluates samples."""

import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from moment_ops.training.data import Batches, scale
from moment_ops.training.errors import import_extra


def random_affine(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Rotate, shift and scale each image at random: at strength 1 by up to 15 degrees, 3 pixels and 15 %."""
    draw = (torch.rand(4, len(images), generator=generator) * 2 - 1) * strength
    angle, zoom, shift = draw[0] * math.radians(15), 1 + draw[1] * 0.15, draw[2:] * 6 / images.shape[-1]
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    transforms = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], 1).view(-1, 2, 3)
    grid = functional.affine_grid(transforms.to(images.device), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def rotation_task(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each image in four orientations, which are the labels. Features can be learned from this task without labels."""
    rotated = [images.rot90(turns, (2, 3)) for turns in range(4)]
    return torch.cat(rotated), torch.arange(4, device=images.device).repeat_interleave(len(images))


def train_classifier(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    iterations: int,
    strength: float,
    batch_size: int = 64,
    lr: float = 2e-3,
    seconds: float = math.inf,
    seed: int = 0,
    description: str = "classifier",
) -> None:
    """Train ``network`` in place on uint8 ``images``, with Adam, a cosine schedule and random affine transforms.

    Training ends after ``iterations`` or after ``seconds``, whichever comes first.
    """
    progress_bar = import_extra("tqdm").tqdm(total=iterations, desc=description, unit="it", leave=False, disable=None)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    batches = Batches(len(images), min(batch_size, len(images)), seed)
    generator = torch.Generator().manual_seed(seed)
    start = time.monotonic()
    network.train()
    with progress_bar:
        for iteration in range(iterations):
            progress = max(iteration / iterations, (time.monotonic() - start) / seconds)
            if progress >= 1:
                break
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * progress)) / 2
            batch = next(batches).to(images.device)
            logits = network(random_affine(scale(images[batch]), strength, generator))
            loss = functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress_bar.update()
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of uint8 ``images`` that are classified as labelled, in evaluation mode."""
    network.eval()
    right = sum(
        int((network(scale(batch)).argmax(1) == truth).sum())
        for batch, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(images)
