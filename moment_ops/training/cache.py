"""What takes long to compute from data is kept under a hash of all that it depends on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import moment_ops as mo


def folder() -> Path:
    """``$MOMENT_OPS_CACHE``, by default ``moment_ops`` in the user's folder for caches. It may be deleted."""
    named = os.environ.get("MOMENT_OPS_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moment_ops")


def fingerprint(module: nn.Module) -> str:
    """A hash of the weights and buffers of a module, of its text, and of the code of traced modules."""
    digest = hashlib.sha256(repr(module).encode())
    for part in module.modules():
        digest.update(str(getattr(part, "code", "")).encode())
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def moments(parts: list[str], make: Callable[[], mo.Moments]) -> mo.Moments:
    """Moments from the cache, or from ``make``, which then go there. ``parts`` say all that they depend on."""
    path = folder() / f"moments-{hashlib.sha256(chr(0).join([mo.__version__, *parts]).encode()).hexdigest()[:32]}.npz"
    with suppress(OSError, ValueError, TypeError, KeyError):
        return mo.Moments.load(path)
    made = make()
    # A cache that cannot be written is none.
    with suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
    return made


def tensor(parts: list[str], make: Callable[[], Tensor]) -> Tensor:
    """A tensor from the cache, or from ``make``, which then goes there. ``parts`` say all that it depends on."""
    path = folder() / f"tensor-{hashlib.sha256(chr(0).join([mo.__version__, *parts]).encode()).hexdigest()[:32]}.npy"
    with suppress(OSError, ValueError, EOFError):
        return torch.from_numpy(np.load(path, allow_pickle=False))
    made = make()
    # A cache that cannot be written is none.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary, made.numpy())
        os.replace(temporary, path)
    return made


def image_path(key: str) -> Path:
    return folder() / f"images-{key[:32]}.npy"


def load_images(key: str) -> tuple[Tensor, Tensor | None, list[int]] | None:
    """Images, labels and rows that ``ImageFile.finish`` wrote, mapped into memory; None if there are none."""
    path = image_path(key)
    try:
        with np.load(path.with_suffix(".npz")) as about:
            labels, rows, channels = about["labels"], about["rows"].tolist(), int(about["channels"])
        # Copy on write: torch warns about arrays that cannot be written.
        images = torch.from_numpy(np.load(path, mmap_mode="c"))
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return images[: len(rows), :channels], torch.from_numpy(labels) if len(labels) else None, rows


class ImageFile:
    """An array of images: in memory, in a file of the cache, or without a key in a file that has no name."""

    def __init__(self, shape: tuple[int, ...], key: str | None, in_memory: bool) -> None:
        self.key = None if in_memory else key
        if in_memory:
            self.images: np.ndarray = np.empty(shape, np.uint8)
            return
        if key is None:
            with tempfile.TemporaryFile() as file:
                self.images = np.memmap(file, np.uint8, "w+", shape=shape)
            return
        self.temporary = image_path(key).with_suffix(f".{os.getpid()}.tmp")
        self.temporary.parent.mkdir(parents=True, exist_ok=True)
        self.images = np.lib.format.open_memmap(self.temporary, "w+", np.uint8, shape)

    def finish(self, count: int, channels: int, labels: Tensor | None, rows: list[int]) -> Tensor:
        """The first ``count`` images."""
        if self.key is None:
            return torch.from_numpy(self.images[:count, :channels])
        assert isinstance(self.images, np.memmap)
        self.images.flush()
        path = image_path(self.key)
        os.replace(self.temporary, path)
        about = path.with_suffix(f".{os.getpid()}.npz")
        known = np.empty(0, np.int64) if labels is None else labels.numpy()
        np.savez(about, labels=known, rows=np.array(rows), channels=channels)
        os.replace(about, path.with_suffix(".npz"))
        loaded = load_images(self.key)
        assert loaded is not None
        return loaded[0]


@contextmanager
def image_file(shape: tuple[int, ...], key: str | None, in_memory: bool) -> Iterator[ImageFile]:
    """An ``ImageFile``, of whose file nothing is left after an error."""
    file = ImageFile(shape, key, in_memory)
    try:
        yield file
    finally:
        if file.key is not None:
            file.temporary.unlink(missing_ok=True)
