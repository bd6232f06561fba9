"""Memory that knows of every byte whether it may be accessed and whether anybody has written it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from emulator.faults import MemoryFault
from emulator.parsing import Instruction

ACCESSIBLE, WRITTEN = 1, 2
# Widths of accesses in bytes, and types of that width; 16 bytes move as a complex number, which NumPy copies as it is.
_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class Memory:
    """Bytes and their shadow.

    base: the address of the first byte. Accesses are given as addresses, which become positions in units of the
    access's width.
    """

    space = ""

    def __init__(self, size: int, base: int, describe: Callable[[int], str]) -> None:
        size = -(-size // 16) * 16
        self.base = base
        self.bytes = np.full(size, 0xA5, np.uint8)
        self.shadow = np.zeros(size, np.uint8)
        self.describe = describe
        self._stamps = np.zeros(size, np.int32)
        self._views = {width: self.bytes.view(type_) for width, type_ in _TYPES.items()}
        self._shadows = {width: self.shadow.view(type_) for width, type_ in _TYPES.items()}

    def view(self, width: int) -> np.ndarray:
        """The bytes in units of this width."""
        return self._views[width]

    def readable(self, offsets: np.ndarray, width: int, ins: Instruction) -> np.ndarray:
        """Positions of what is about to be read; offsets: of bytes, uint64."""
        positions = self._positions(offsets, width, ins)
        state = self._shadows[width].take(positions).view(np.uint8)
        if not (state == ACCESSIBLE | WRITTEN).all():
            self._refuse(offsets, state, ins)
        return positions

    def writable(self, offsets: np.ndarray, width: int, ins: Instruction) -> np.ndarray:
        """Positions of what is about to be written."""
        positions = self._positions(offsets, width, ins)
        state = self._shadows[width].take(positions).view(np.uint8)
        if not (state & ACCESSIBLE).all():
            self._refuse(offsets, state | WRITTEN, ins)
        return positions

    def write(self, positions: np.ndarray, width: int, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(silent, kept): which of the units changed nothing, and which are there in the end.

        Of several units for one position, one counts as the change.
        """
        view, count = self._views[width], len(positions)
        unchanged = _same(view.take(positions), units)
        unchanged &= (self._shadows[width].take(positions).view(np.uint8).reshape(count, -1) & WRITTEN).all(1)
        view[positions] = units
        self.mark(positions, width, ACCESSIBLE | WRITTEN)
        kept = _same(view.take(positions), units)
        numbers = np.arange(count, dtype=np.int32)
        self._stamps[positions] = numbers
        return kept & (unchanged | (self._stamps.take(positions) != numbers)), kept

    def mark(self, positions: np.ndarray, width: int, state: int) -> None:
        """Change the shadow of what is accessible."""
        self._shadows[width][positions] = np.full(width, state, np.uint8).view(_TYPES[width])[0]

    def _positions(self, offsets: np.ndarray, width: int, ins: Instruction) -> np.ndarray:
        if (offsets & np.uint64(width - 1)).any():
            bad = offsets[np.flatnonzero(offsets & np.uint64(width - 1))[0]]
            raise MemoryFault(f"{self.describe(int(bad))} is no multiple of {width} bytes: {ins}")
        if len(offsets) and int(offsets.max()) >= len(self.bytes):
            raise MemoryFault(f"{width} bytes {self.describe(int(offsets.max()))}, out of bounds: {ins}")
        return (offsets >> np.uint64(width.bit_length() - 1)).astype(np.intp)

    def _refuse(self, offsets: np.ndarray, state: np.ndarray, ins: Instruction) -> None:
        bad = np.flatnonzero(state != ACCESSIBLE | WRITTEN)[0]
        width = len(state) // len(offsets)
        where = self.describe(int(offsets[bad // width]) + int(bad % width))
        problem = "that nobody has written" if state[bad] & ACCESSIBLE else "out of bounds"
        raise MemoryFault(f"a byte {where}, {problem}: {ins}")


def _same(some: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether units have the same bits."""
    if some.itemsize < 16:
        return some == other
    return (some.view(np.uint64) == other.view(np.uint64)).reshape(-1, 2).all(1)


# Far from 0, and from what fits into 32 bits.
GLOBAL_BASE = 1 << 40
_GUARD = 512


class GlobalMemory(Memory):
    """The storages of tensors beside one another, each aligned as it is; what is between them is out of bounds.

    tensors: by name. fresh: addresses of storages that nobody has written yet.
    """

    space = "global"

    def __init__(self, tensors: list[tuple[str, Tensor]], fresh: set[int]) -> None:
        self._starts: dict[int, int] = {}
        self._storages: list[torch.UntypedStorage] = []
        self._names: list[tuple[int, int, str]] = []
        end = _GUARD
        for _, tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._starts and storage.nbytes():
                start = -(-end // _GUARD) * _GUARD + storage.data_ptr() % _GUARD
                self._starts[storage.data_ptr()] = start
                self._storages.append(storage)
                end = start + storage.nbytes() + _GUARD
        super().__init__(end + _GUARD, GLOBAL_BASE, self._describe)
        for storage in self._storages:
            self._of(storage)[...] = _bytes(storage)
        for name, tensor in tensors:
            self._open(name, tensor, fresh)

    def address(self, tensor: Tensor) -> int:
        """Of a tensor's first element."""
        storage = tensor.untyped_storage()
        start = self._starts.get(storage.data_ptr(), 0)
        return self.base + start + tensor.storage_offset() * tensor.element_size()

    def write_back(self) -> None:
        """Into the tensors."""
        for storage in self._storages:
            _bytes(storage)[...] = self._of(storage)

    def saved(self) -> tuple[np.ndarray, np.ndarray]:
        """A copy of everything."""
        return self.bytes.copy(), self.shadow.copy()

    def restore(self, copies: tuple[np.ndarray, np.ndarray]) -> None:
        """Make it as it was."""
        self.bytes[...], self.shadow[...] = copies

    def _of(self, storage: torch.UntypedStorage) -> np.ndarray:
        start = self._starts[storage.data_ptr()]
        return self.bytes[start : start + storage.nbytes()]

    def _open(self, name: str, tensor: Tensor, fresh: set[int]) -> None:
        """The tensor's elements, not the gaps between its rows, may be accessed."""
        if tensor.numel() == 0:
            return
        size = tensor.element_size()
        start = self.address(tensor) - self.base
        shape = (*tensor.shape, size)
        strides = (*(stride * size for stride in tensor.stride()), 1)
        state = ACCESSIBLE if tensor.untyped_storage().data_ptr() in fresh else ACCESSIBLE | WRITTEN
        np.lib.stride_tricks.as_strided(self.shadow[start:], shape, strides)[...] = state
        length = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
        self._names.append((start, start + length, name))

    def _describe(self, offset: int) -> str:
        for start, end, name in self._names:
            if start <= offset < end:
                return f"at {name} + {offset - start}"
        start, end, name = min(self._names, key=lambda n: min(abs(n[0] - offset), abs(n[1] - offset)))
        side = f"{offset - end} bytes behind" if offset >= end else f"{start - offset} bytes before"
        return f"{side} {name}"


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


# Programs do not begin at 0 there.
SHARED_BASE = 1024


class SharedMemory(Memory):
    """One array for every block that runs at the same time."""

    space = "shared"

    def __init__(self, size: int, blocks: int, threads: int) -> None:
        self.size = -(-size // 16) * 16
        super().__init__(blocks * self.size, SHARED_BASE, self._describe)
        self._origin = np.repeat(np.arange(blocks, dtype=np.uint64) * np.uint64(self.size), threads)
        self.reset()

    def offsets(self, addresses: np.ndarray, lanes: np.ndarray | slice, ins: Instruction) -> np.ndarray:
        """Offsets among the bytes of all blocks."""
        offsets = addresses - np.uint64(self.base)
        if len(offsets) and int(offsets.max()) >= self.size:
            raise MemoryFault(f"shared memory of {self.size} bytes, byte {int(offsets.max())}, out of bounds: {ins}")
        return offsets + self._origin[lanes]

    def reset(self) -> None:
        """As blocks find it when they begin."""
        self.bytes[...] = 0xA5
        self.shadow[...] = ACCESSIBLE

    def _describe(self, offset: int) -> str:
        return f"at shared memory + {offset % self.size}"
