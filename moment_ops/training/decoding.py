"""Images that have to be decoded, by several processes. Many images go into a file that is mapped into memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from moment_ops.training import cache
from moment_ops.training.errors import TrainingError, import_extra

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# Larger sets are decoded into a file in the cache.
MEMORY_BYTES = 2**28
LARGEST_UNREADABLE_SHARE = 0.1
FEW_IMAGES = 500
NAMES_SHOWN = 5
# A change of the decoding changes it, so that old files are not used.
VERSION = 1


@dataclass(frozen=True)
class Items:
    """Images that can be opened one by one.

    Attributes:
        open: the PIL image, array or tensor of an index, and its label or None.
        names: what the images are called in messages.
        fingerprint: a hash of what is to be decoded, or None if only decoding it tells.
    """

    name: str
    open: Callable[[int], tuple[Any, int | None]]
    names: Sequence[str] | None
    count: int
    fingerprint: str | None = None

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Decoded:
    """uint8 images ``(N, C, S, S)``, their labels or None, and their places in the order that was asked for."""

    images: Tensor
    labels: Tensor | None
    rows: list[int]
    fingerprint: str


@dataclass(frozen=True)
class Files:
    """Opens the image of an index, with its label. It can be pickled, for processes that are not forks."""

    paths: Sequence[Path]
    labels: Sequence[int] | None

    def __call__(self, index: int) -> tuple[Any, int | None]:
        with import_extra("PIL.Image").open(self.paths[index]) as picture:
            picture.load()
        return picture, None if self.labels is None else self.labels[index]


@dataclass(frozen=True)
class ItemsOfDataset:
    """The image and the label of an index of a Dataset, whose items are images or tuples of an image and a label."""

    dataset: Any

    def __call__(self, index: int) -> tuple[Any, int | None]:
        item = self.dataset[index]
        if not isinstance(item, (tuple, list)):
            return item, None
        label = item[1] if len(item) > 1 and isinstance(item[1], (int, np.integer)) else None
        return item[0], None if label is None else int(label)


def of_folder(folder: Path) -> Items:
    """The images below a folder. If all are in subfolders, of which there are at least two, these are the classes."""
    paths = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()))
    relative = [path.relative_to(folder) for path in paths]
    classes = sorted({path.parts[0] for path in relative if len(path.parts) > 1})
    labelled = len(classes) > 1 and all(len(path.parts) > 1 for path in relative)
    digest = hashlib.sha256()
    for path, name in zip(paths, relative, strict=True):
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    labels = [classes.index(path.parts[0]) for path in relative] if labelled else None
    names = [str(path) for path in relative]
    return Items(folder.resolve().name, Files(paths, labels), names, len(paths), digest.hexdigest())


def of_dataset(dataset: Any) -> Items:
    """The images of a map-style Dataset, whose items are images or tuples of an image and a label."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"data: got {type(dataset).__name__}, expected a path, a name or a map-style Dataset")
    return Items(type(dataset).__name__.lower(), ItemsOfDataset(dataset), None, len(dataset))


def square(image: Any, size: int) -> tuple[np.ndarray, bool]:
    """An image as uint8 ``(3, size, size)``, and whether it is grey. Transparent parts become white."""
    pil, operations = import_extra("PIL.Image"), import_extra("PIL.ImageOps")
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        image = pil.fromarray(pixels_of(image))
    image = operations.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits per pixel. PIL's own conversion cuts off at 255.
        values = np.asarray(image, np.float64)
        image = pil.fromarray((values / (257 if values.max(initial=0) > 255 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
        channels = np.asarray(image)
        grey = bool((channels[..., :1] == channels).all())
    else:
        grey = image.mode in ("1", "L")
    fitted = operations.fit(image.convert("L" if grey else "RGB"), (size, size))
    return np.broadcast_to(np.asarray(fitted).reshape(size, size, -1).transpose(2, 0, 1), (3, size, size)), grey


def pixels_of(image: np.ndarray) -> np.ndarray:
    """An array of an image as uint8, with the channels last or without channels. Fractions are from 0 to 1."""
    if np.issubdtype(image.dtype, np.floating):
        image = (image * 255).round().clip(0, 255)
    elif image.dtype != np.uint8:
        raise ValueError(f"got an image of {image.dtype}, expected uint8, or fractions from 0 to 1")
    image = image.astype(np.uint8)
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] == 3):
        raise ValueError(f"got an image of shape {image.shape}, expected (C, H, W), (H, W, C) or (H, W)")
    return image


class Decoder:
    """A Dataset of ``(position, pixels or None, grey, label, error)``, which processes of a DataLoader read."""

    def __init__(self, items: Items, order: Sequence[int], size: int) -> None:
        self.items, self.order, self.size = items, order, size

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[int, np.ndarray | None, bool, int | None, str]:
        try:
            image, label = self.items.open(self.order[position])
            return position, *square(image, self.size), label, ""
        except Exception as error:  # anything may be raised for arbitrary bytes
            return position, None, True, None, str(error) or type(error).__name__


def decode(items: Items, order: Sequence[int], size: int, say: Callable[[str], None]) -> Decoded:
    """Decode images in this order. Those that cannot be decoded are left out and named.

    Raises:
        TrainingError: more than a tenth cannot be decoded.
    """
    key = None
    if items.fingerprint is not None:
        key = hashlib.sha256(f"{VERSION} {items.fingerprint} {size}".encode()).hexdigest()
    in_memory = len(order) * 3 * size * size <= MEMORY_BYTES
    if key is not None and not in_memory:
        known = cache.load_images(key)
        if known is not None:
            return Decoded(*known, key)
    with cache.image_file((len(order), 3, size, size), key, in_memory) as file:
        images, digest = file.images, hashlib.sha256()
        rows: list[int] = []
        labels: list[int | None] = []
        unreadable: list[tuple[int, str]] = []
        all_grey = True
        for position, pixels, grey, label, error in read_in_processes(Decoder(items, order, size)):
            if pixels is None:
                unreadable.append((order[position], error))
                continue
            images[len(rows)] = pixels
            if key is None:
                digest.update(pixels.tobytes())
            rows.append(position)
            labels.append(label)
            all_grey = all_grey and grey
        tell(items, unreadable, len(order), say)
        known_labels = [label for label in labels if label is not None]
        kept = torch.tensor(known_labels) if len(known_labels) == len(rows) and rows else None
        channels = 1 if all_grey else 3
        tensor = file.finish(len(rows), channels, kept, rows)
    if key is None:
        digest.update(str((size, known_labels, VERSION)).encode())
    return Decoded(tensor, kept, rows, key or digest.hexdigest())


def as_it_is(item: Any) -> Any:
    return item


def read_in_processes(decoder: Decoder) -> Any:
    """The items of a decoder in order, decoded by several processes if there are many."""
    workers = 0 if len(decoder) <= FEW_IMAGES else min(8, os.cpu_count() or 1)
    loader = DataLoader(
        decoder,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        collate_fn=as_it_is,
        prefetch_factor=64 if workers else None,
    )
    return import_extra("tqdm").tqdm(loader, desc="decoding", unit="image", leave=False, disable=None)


def tell(items: Items, unreadable: list[tuple[int, str]], count: int, say: Callable[[str], None]) -> None:
    """Say which images are left out; an error if they are many."""
    if not unreadable:
        return
    names = [items.names[index] if items.names else f"item {index}" for index, _ in unreadable]
    shown = ", ".join(sorted(names)[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    text = f"{items.name}: {len(names)} of {count} images cannot be read: {shown} ({unreadable[0][1]})"
    text = " ".join(text.split())
    if len(names) > LARGEST_UNREADABLE_SHARE * count:
        raise TrainingError(f"{text}; expected at most a tenth")
    say(f"{text}; they are left out")
