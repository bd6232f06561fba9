"""Training of networks in one loop, and of the two classifiers: one extracts features, the other evaluates samples."""

import math
import time
from collections.abc import Callable
from typing import Any

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


class Task:
    """uint8 images and their labels, in batches on a device.

    Without labels, each image is there in four orientations, which are the labels. Features can be learned from this
    task too.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, device: torch.device | None = None) -> None:
        self.images, self.labels = images, labels
        self.device = images.device if device is None else device
        self.classes = 4 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images) * (4 if self.labels is None else 1)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], and labels."""
        indices = indices.to(self.images.device)
        if self.labels is not None:
            return scale(self.images[indices], self.device), self.labels[indices].to(self.device)
        turns = indices // len(self.images)
        images = self.images[indices % len(self.images)].to(self.device)
        turned = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)])
        return scale(turned), turns.to(self.device)


def train_network(
    network: nn.Module,
    loss_fn: Callable[[Tensor], Tensor],
    count: int,
    *,
    iterations: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    seconds: float = math.inf,
    seed: int = 0,
    description: str = "classifier",
) -> None:
    """Train ``network`` in place, with Adam and a cosine schedule, and leave it in evaluation mode.

    Training ends after ``iterations`` or after ``seconds``, whichever comes first.

    Args:
        loss_fn: the loss of a batch, of which it gets the indices, below ``count``.
    """
    progress_bar = import_extra("tqdm").tqdm(total=iterations, desc=description, unit="it", leave=False, disable=None)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    batches = Batches(count, min(batch_size, count), seed)
    start = time.monotonic()
    network.train()
    with progress_bar:
        for iteration in range(iterations):
            progress = max(iteration / iterations, (time.monotonic() - start) / seconds)
            if progress >= 1:
                break
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * progress)) / 2
            loss = loss_fn(next(batches))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress_bar.update()
    network.eval()


def train_classifier(
    network: nn.Module, task: Task, *, iterations: int, strength: float, seed: int = 0, **given: Any
) -> None:
    """Train ``network`` in place on random affine transforms of the images. ``given`` is as for ``train_network``."""
    generator = torch.Generator().manual_seed(seed)

    def loss_fn(indices: Tensor) -> Tensor:
        images, labels = task.batch(indices)
        return functional.cross_entropy(network(random_affine(images, strength, generator)), labels)

    train_network(network, loss_fn, len(task), iterations=iterations, seed=seed, **given)


@torch.no_grad()
def accuracy(network: nn.Module, task: Task) -> float:
    """The share of the images that are classified as labelled, in evaluation mode."""
    network.eval()
    batches = map(task.batch, torch.arange(len(task)).split(500))
    return sum(int((network(images).argmax(1) == labels).sum()) for images, labels in batches) / len(task)
