"""Files of known data sets: IDX (MNIST, Fashion-MNIST), the pickles of CIFAR, the binaries of STL-10, and arrays.

Nothing in a file is executed.
"""

from __future__ import annotations

import gzip
import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moment_ops.training.errors import TrainingError

Part = tuple[Tensor, Tensor | None]
IDX_IMAGES, IDX_LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"
# What has to be put into the folder of a data set with a name.
NAMED = {
    "cifar10": "the folder cifar-10-batches-py of cifar-10-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html)",
    "cifar100": "the folder cifar-100-python of cifar-100-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html)",
    "fashion-mnist": "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k files"
    " (https://github.com/zalandoresearch/fashion-mnist)",
    "stl10": "the folder stl10_binary of stl10_binary.tar.gz (https://cs.stanford.edu/~acoates/stl10)",
}
IMAGE_KEYS, LABEL_KEYS = ("x_train", "train_images", "images", "arr_0"), ("y_train", "train_labels", "labels")
TEST_KEYS, TEST_LABEL_KEYS = ("x_test", "test_images"), ("y_test", "test_labels")


@dataclass(frozen=True)
class Known:
    """A data set whose files were found. The functions read uint8 images ``(N, C, H, W)`` and labels or None."""

    name: str
    read_train: Callable[[], Part]
    read_test: Callable[[], Part] | None


def find(path: Path) -> Known | None:
    """The data set at a path: a file of arrays, or a folder with the files of a known data set, or None."""
    if path.suffix in (".npz", ".npy") and not path.is_dir():
        return arrays(path)
    for folder in (path, path / "raw", path / "cifar-10-batches-py", path / "cifar-100-python", path / "stl10_binary"):
        for kind in (idx, cifar, stl10):
            known = kind(folder, path.resolve().name)
            if known is not None:
                return known
    return None


def idx(folder: Path, name: str) -> Known | None:
    """IDX files ``train-images-idx3-ubyte`` and so on, as they are or with .gz."""

    def file(part: str, kind: str) -> Path | None:
        return next((p for p in (folder / (part + kind), folder / f"{part}{kind}.gz") if p.is_file()), None)

    def read(part: str) -> Part:
        images, labels = file(part, IDX_IMAGES), file(part, IDX_LABELS)
        assert images is not None
        pixels = read_idx(images, 3)
        numbers = None if labels is None else read_idx(labels, 1)
        if numbers is not None and len(numbers) != len(pixels):
            raise TrainingError(f"{labels} holds {len(numbers)} labels, expected {len(pixels)} as images")
        return pixels[:, None], None if numbers is None else numbers.long()

    if file("train", IDX_IMAGES) is None:
        return None
    test = None if file("t10k", IDX_IMAGES) is None else lambda: read("t10k")
    return Known(name, lambda: read("train"), test)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 array of an IDX file, which may be compressed."""
    content = read_bytes(path)
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise TrainingError(f"{path} is not an IDX file of {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) != header + math.prod(shape):
        raise TrainingError(f"{path} holds {len(content) - header} bytes, expected {math.prod(shape)} for {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise TrainingError(f"could not read {path}: {error}") from error


def latin1(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


class ArraysOnly(pickle.Unpickler):
    """Reads pickles of containers, numbers, strings and numpy arrays. Anything else is an error, and is not run."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            # How Python 3 writes bytes in an old format.
            return latin1
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def read_cifar(paths: list[Path], labels_key: bytes) -> Part:
    """Images and labels of the python version of CIFAR."""
    images, labels = [], []
    for path in paths:
        try:
            with open(path, "rb") as file:
                content = ArraysOnly(file, encoding="bytes").load()
            pixels, numbers = content[b"data"], content[labels_key]
            if pixels.dtype != np.uint8 or pixels.shape != (len(numbers), 3072):
                raise ValueError(f"got an array of {pixels.dtype} {pixels.shape}, expected uint8 (N, 3072)")
        except OSError as error:
            raise TrainingError(f"could not read {path}: {error.strerror}") from error
        except Exception as error:  # anything may be raised for arbitrary bytes
            raise TrainingError(f"{path} is not a file of CIFAR's python version: {error}") from error
        images.append(torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
        labels += numbers
    return torch.cat(images), torch.tensor(labels)


def cifar(folder: Path, name: str) -> Known | None:
    """The python version of CIFAR-10 or CIFAR-100."""
    parts = [folder / f"data_batch_{number}" for number in range(1, 6)]
    if parts[0].is_file():
        test = [folder / "test_batch"]
        return Known(name, lambda: read_cifar(parts, b"labels"), lambda: read_cifar(test, b"labels"))
    train, test = [folder / "train"], [folder / "test"]
    if train[0].is_file() and test[0].is_file():
        return Known(name, lambda: read_cifar(train, b"fine_labels"), lambda: read_cifar(test, b"fine_labels"))
    return None


def stl10(folder: Path, name: str) -> Known | None:
    """The binaries of STL-10. For training are the unlabeled images if they are there, else ``train_X.bin``."""
    unlabeled, train, test = (folder / f"{part}_X.bin" for part in ("unlabeled", "train", "test"))
    if not (unlabeled.is_file() or train.is_file()):
        return None

    def read(path: Path) -> Part:
        try:
            pixels = np.memmap(path, np.uint8, mode="c")
        except (OSError, ValueError) as error:
            raise TrainingError(f"could not read {path}: {error}") from error
        if pixels.size % (3 * 96 * 96):
            raise TrainingError(f"{path} holds {pixels.size} bytes, expected images of 3 x 96 x 96")
        # Columns come first in the file. The copy is made when images are resized, a part at a time.
        images = torch.from_numpy(pixels).view(-1, 3, 96, 96).transpose(2, 3)
        labels = path.with_name(path.name.replace("_X", "_y"))
        if not labels.is_file():
            return images, None
        # Classes are counted from 1.
        return images, torch.from_numpy(np.fromfile(labels, np.uint8)).long() - 1

    chosen = unlabeled if unlabeled.is_file() else train
    return Known(name, lambda: read(chosen), (lambda: read(test)) if test.is_file() else None)


def arrays(path: Path) -> Known:
    """A .npy or .npz file of uint8 images. The names of arrays in a .npz file are those of the constants above."""
    try:
        content = np.load(path, allow_pickle=False)
        found = {"images": content} if isinstance(content, np.ndarray) else {name: content[name] for name in content}
    except OSError as error:
        raise TrainingError(f"could not read {path}: {error.strerror or error}") from error
    except Exception as error:  # anything may be raised for arbitrary bytes
        raise TrainingError(f"{path} is not a file of arrays: {error}") from error

    def part(image_keys: tuple[str, ...], label_keys: tuple[str, ...]) -> Part | None:
        key = next((key for key in image_keys if key in found), None)
        if key is None:
            return None
        images = channels_first(found[key], f"{path}: {key}")
        labels = next((found[key] for key in label_keys if key in found), None)
        if labels is not None and labels.shape != (len(images),):
            raise TrainingError(f"{path}: got labels of shape {labels.shape}, expected ({len(images)},)")
        return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))

    train, test = part(IMAGE_KEYS, LABEL_KEYS), part(TEST_KEYS, TEST_LABEL_KEYS)
    if train is None:
        raise TrainingError(f"{path} holds {', '.join(found)}, expected images named {' or '.join(IMAGE_KEYS)}")
    return Known(path.stem, lambda: train, None if test is None else lambda: test)


def channels_first(pixels: np.ndarray, name: str) -> Tensor:
    """An array of images, with the channels first or last or without channels, as ``(N, C, H, W)``."""
    if pixels.dtype != np.uint8:
        raise TrainingError(f"{name}: got {pixels.dtype}, expected uint8 images")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[3] in (1, 3) and pixels.shape[1] not in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise TrainingError(f"{name}: got shape {pixels.shape}, expected (N, H, W), (N, H, W, C) or (N, C, H, W)")
    return torch.from_numpy(np.ascontiguousarray(pixels))
