"""What nvcc made of the CUDA kernels, run without a GPU: the PTX inside the extension, in the emulator.

The host side is the operators' own (csrc/device/column_launch.h); it describes its launches instead of running them.
"""

import ctypes
import functools
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from emulator.execution import Schedule, execute
from emulator.memory import GlobalMemory
from emulator.parsing import Kernel, parse
from specs import machine_code
from torch import Tensor


@functools.cache
def texts(library: Path) -> dict[str, str]:
    """The PTX of every kernel in the library, each a module of its own, by symbol."""
    command = [machine_code.tool("cuobjdump"), "--dump-ptx", str(library)]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for module in dump.split("Fatbin ptx code:")[1:]:
        head, *entries = re.split(r"^(?=\.visible \.entry )", module, flags=re.M)
        shared = re.findall(r"^\.shared [^;]*;", head, re.M)
        for entry in entries:
            symbol, begin = re.findall(r"\.entry (\w+)", entry)[0], entry.index("{\n") + 2
            found[symbol] = _untyped(entry[:begin] + "\n".join(shared) + "\n" + entry[begin:])
    return found


def _untyped(entry: str) -> str:
    """Arguments as bytes, whatever they hold; and accesses to global memory as such, also where nvcc does not know."""
    entry = re.sub(r"(\.shared \.align \d+) \.u8", r"\1 .b8", entry)
    entry = re.sub(r"\.ptr( \.\w+)? \.align \d+ ", "", entry)
    return re.sub(r"\b(ld|st)(\.[bfsu]\d+)", r"\1.global\2", entry)


@functools.lru_cache(maxsize=64)
def parsed(library: Path, symbol: str) -> Kernel:
    """The kernel of this symbol."""
    return parse(texts(library)[symbol])


def _memory(address: int, size: int) -> Tensor:
    """Bytes of this process."""
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))


def _arrays(arguments: Iterable[Any]) -> Iterator[np.ndarray]:
    """Those among the arguments, and in their lists."""
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _arrays(argument)


class EmulatedModule:
    """Takes the place of the module of host_module.py, which describes launches to it, for host_kernels.py."""

    def __init__(self, module: ModuleType, library: Path, schedule: Schedule | None = None) -> None:
        self._module, self._library, self._schedule = module, library, schedule or Schedule()
        self._buffers: list[tuple[str, Tensor]] = []
        self.Layer = module.Layer

    def __getattr__(self, name: str) -> Any:
        def call(layers: Any, dtype: str, *arguments: Any) -> Any:
            self._buffers = []
            for layer in layers if isinstance(layers, list) else [layers]:
                self._open_layer(layer, getattr(torch, dtype).itemsize)
            for array in _arrays(arguments):
                self._open(array.ctypes.data, array.nbytes)
            self._module.record_with(self._launch, self._open)
            try:
                return getattr(self._module, name)(layers, dtype, *arguments)
            finally:
                self._module.record_with(None, None)

        return call

    def _open(self, address: int, size: int) -> None:
        """Memory that kernels may access."""
        if size > 0:
            self._buffers.append((f"array {len(self._buffers)}", _memory(address, size)))

    def _open_layer(self, layer: Any, itemsize: int) -> None:
        """Its rows, and not what is between them."""
        row = layer.columns * itemsize
        tensors = {
            "x": (layer.x, layer.row_stride),
            "grad": (layer.grad, layer.grad_stride),
            "out": (layer.out, layer.out_stride),
        }
        for name, (address, stride) in tensors.items():
            if address != 0:
                whole = _memory(address, (layer.rows - 1) * stride * itemsize + row)
                rows = whole.as_strided((layer.rows, row), (stride * itemsize, 1))
                self._buffers.append((f"{name} {len(self._buffers)}", rows))

    def _launch(self, symbol: str, blocks: int, threads: int, arguments: list[bytes]) -> None:
        memory = GlobalMemory(self._buffers, set())
        moved = [int.from_bytes(self._moved(argument, memory), "little") for argument in arguments]
        execute(parsed(self._library, symbol), moved, memory, blocks, threads // 32, 0, self._schedule)
        memory.write_back()

    def _moved(self, argument: bytes, memory: GlobalMemory) -> bytes:
        """An argument whose pointers are addresses of the emulator: no other number is an address of this process."""
        words = np.frombuffer(argument, np.uint64)
        moved = words.copy()
        for _, tensor in self._buffers:
            begin = tensor.data_ptr()
            inside = (words >= begin) & (words < begin + tensor.untyped_storage().nbytes())
            moved[inside] = words[inside] - np.uint64(begin) + np.uint64(memory.address(tensor))
        return moved.tobytes()
