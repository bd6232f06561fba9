"""Peak memory of one call on the CPU, by the kernel's high-water mark of this process."""

import ctypes
import gc
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moment_ops.training.allocator import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_GLIBC_DEFAULT = 128 * 1024


def return_freed_memory() -> None:
    """Make glibc's malloc give large blocks back when they are freed, and give back what it holds now.

    By default it comes to keep them, and how many of them fit into the holes they leave is a matter of chance.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(threshold, _GLIBC_DEFAULT)
        libc.malloc_trim(0)


def _status(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {name}")
    return 1024 * int(match[1])


def peak_over_rest(call: Callable[[], object]) -> int | None:
    """Bytes of resident memory that a call needs at its peak beyond those before it; None where it cannot be read.

    The call should have run before, and everything been allocated after `return_freed_memory`.
    """
    gc.collect()
    return_freed_memory()
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        rest = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - rest)
    except OSError:
        return None
