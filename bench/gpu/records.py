"""Results as they come: JSON lines that are on the disk before the next case starts."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Below the 16 MiB that a file may have where results are carried from one machine to another.
MOST_BYTES = 15 << 20
# Of a file, for records that are shortened.
RESERVED_BYTES = 1 << 20
# Of a text in a record: the rest is cut out of its middle.
MOST_CHARACTERS = 4000

Record = dict[str, Any]


def cut_middle(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text, or its beginning and its end."""
    if len(text) <= most:
        return text
    note = f"\n[... {len(text) - most} characters left out ...]\n"
    half = max((most - len(note)) // 2, 0)
    return text[:half] + note + text[len(text) - half :]


def _shortened(value: Any) -> Any:
    """A value whose texts are cut and whose lists of numbers are left out: what still goes into a full file."""
    if isinstance(value, str):
        return cut_middle(value, 200)
    if isinstance(value, dict):
        return {key: _shortened(part) for key, part in value.items()}
    return value if not isinstance(value, list) else len(value)


class Records:
    """Appends records to the files of a folder.

    Args:
        folder: made if it is not there.
        stamp: goes into every record.
    """

    def __init__(self, folder: Path, stamp: Record) -> None:
        self.folder, self.stamp = folder, dict(stamp)
        self.written: list[Record] = []
        self._full: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, file: str, record: Record) -> None:
        """Append one line. A file near its limit gets short records, and then none: the first ones matter most."""
        record = {**self.stamp, **record}
        self.written.append(record)
        path = self.folder / file
        size = path.stat().st_size if path.exists() else 0
        line = json.dumps(record) + "\n"
        if size + len(line) > MOST_BYTES - RESERVED_BYTES:
            line = json.dumps(_shortened(record)) + "\n"
        if size + len(line) > MOST_BYTES:
            self._full.add(file)
            return
        with path.open("a") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    @property
    def full(self) -> list[str]:
        """Files that lack records."""
        return sorted(self._full)


def read(paths: Iterable[Path]) -> Iterator[Record]:
    """The records of files, and of all `.jsonl` files of folders; a line that was cut off is left out."""
    for path in paths:
        for file in sorted(path.glob("**/*.jsonl")) if path.is_dir() else [path]:
            for line in file.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue
