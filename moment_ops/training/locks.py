"""A run is trained by one trainer at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moment_ops.training.errors import TrainingError


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of the folder ``run``, in a file ``.NAME.lock`` beside it, since a new run may move the folder.

    The operating system frees the lock when the process ends, however it ends.

    Raises:
        TrainingError: another trainer holds it. The message names its process and host.
    """
    run = run.resolve()
    path = run.with_name(f".{run.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115, which stays open until the lock is freed
    except OSError as error:
        raise TrainingError(f"could not write {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"{run} is in use by {holder(path)}; choose another --run-dir") from error
        except OSError as error:
            raise TrainingError(f"could not lock {path}: {error.strerror}") from error
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder(path: Path) -> str:
    """The trainer that holds a lock, in words."""
    try:
        content = json.loads(path.read_text())
        return f"another trainer, process {content['pid']} on {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        # It took the lock a moment ago.
        return "another trainer"
