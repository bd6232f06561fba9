"""Checkpoints, and files that are replaced in one step."""

import errno
import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from moment_ops.training.errors import TrainingError

FORMAT = "moment_ops checkpoint 1"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` in one step, so that a full disk or a crash does not damage the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise TrainingError(f"could not write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def link_atomically(path: Path, target: Path) -> None:
    """Make ``path`` another name of the file ``target``, in one step; a copy where there are no hard links."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(target, temporary)
        os.replace(temporary, path)
        # If both are one file already, the system leaves the temporary name.
        temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        write_atomically(path, target.read_bytes())


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in a folder are on the disk. A rename alone may be lost in a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Not every file system has this for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def save(path: Path, kind: str, state: dict[str, Any]) -> None:
    """Write tensors and plain containers. ``load`` checks ``kind``, which says what they are."""
    # Serialized in memory first: on a full disk torch.save reports an internal error.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "kind": kind, "state": state}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, kind: str) -> dict[str, Any]:
    """Read what ``save`` wrote with the same ``kind``, with tensors on the CPU."""
    foreign = f"{path} is damaged, or not a {kind} written by moment_ops"
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not compare checksums; `testzip` reads every byte and does.
            if archive.testzip() is not None:
                raise TrainingError(foreign)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(f"could not read {path}: {error.strerror}") from error
    except TrainingError:
        raise
    except Exception as error:  # anything may be raised for arbitrary bytes
        raise TrainingError(foreign) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("kind") != kind:
        raise TrainingError(foreign)
    return content["state"]
