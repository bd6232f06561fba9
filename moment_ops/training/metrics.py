"""The metrics file of a run."""

import json
from pathlib import Path
from typing import Any

from moment_ops.training import checkpoints
from moment_ops.training.errors import TrainingError


class Metrics:
    """A file with one JSON object per line. Lines of steps after ``step``, which a crash left, are removed first."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        checkpoints.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def append(self, values: dict[str, Any]) -> None:
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise TrainingError(f"could not write {self.path}: {error.strerror}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file. After a crash the last one may be incomplete."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
