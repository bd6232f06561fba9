"""Kernels of a few lines of PTX, for tests of the emulator."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from emulator.execution import Schedule, execute
from emulator.machine import Result
from emulator.memory import GlobalMemory
from emulator.parsing import parse

_REGISTERS = ".reg .pred %p<16>;\n.reg .b16 %h<32>;\n.reg .b32 %r<160>;\n.reg .b64 %d<32>;"


def kernel_of(body: str, pointers: int, shared: int = 0) -> str:
    """A kernel whose %d0, %d1, ... are its pointers and whose %r0 is the thread; `data` is its shared memory."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(pointers))
    loads = "\n".join(f"ld.param.b64 %d{i}, [p{i}];" for i in range(pointers))
    memory = f".shared .align 128 .b8 data[{shared}];" if shared else ""
    return (
        f".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry snippet({parameters})\n"
        f"{{\n{_REGISTERS}\n{memory}\n{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def run(
    body: str,
    tensors: Sequence[Tensor],
    programs: int = 1,
    warps: int = 1,
    shared: int = 0,
    fresh: Sequence[Tensor] = (),
    schedule: Schedule | None = None,
) -> Result:
    """Run a kernel on tensors, which are called a, b, c, ..."""
    names = [chr(ord("a") + i) for i in range(len(tensors))]
    unwritten = {tensor.untyped_storage().data_ptr() for tensor in fresh}
    memory = GlobalMemory(list(zip(names, tensors, strict=True)), unwritten)
    kernel = parse(kernel_of(body, len(tensors), shared))
    result = execute(kernel, list(tensors), memory, programs, warps, 0, schedule or Schedule())
    memory.write_back()
    return result


_PREFIX = {1: "h", 2: "h", 4: "r", 8: "d"}


def evaluate(instruction: str, *inputs: np.ndarray, out: type | str, inexact: bool = False) -> np.ndarray:
    """The results of an instruction, a lane per value; `{y}` stands for the result and `{0}`, `{1}`, ... for inputs.

    Predicates are given, and returned, as bytes.
    """
    dtype = np.dtype(out)
    count = len(inputs[0])
    padded = -(-count // 32) * 32
    arrays = [np.concatenate([x, x[:1].repeat(padded - count)]) for x in inputs]
    tensors = [torch.from_numpy(x.view(np.uint8).copy()) for x in [*arrays, np.zeros(padded, dtype)]]
    lines, names = [], {}
    for i, (x, name) in enumerate(zip([*arrays, np.zeros(padded, dtype)], [*map(str, range(len(arrays))), "y"],
                                      strict=True)):  # fmt: skip
        lines.append(f"mad.wide.u32 %d{20 + i}, %r0, {x.itemsize}, %d{i};")
        register = f"%{_PREFIX[x.itemsize]}{10 + i}"
        names[name] = register
        if name != "y":
            type_ = "u8" if x.itemsize == 1 else f"b{8 * x.itemsize}"
            lines.append(f"ld.global.{type_} {register}, [%d{20 + i}];")
            if x.dtype == np.bool_:
                lines.append(f"setp.ne.s16 %p{i}, {register}, 0;")
                names[name] = f"%p{i}"
    register, type_ = names["y"], f"b{8 * dtype.itemsize}"
    store = f"st.global.{type_} [%d{20 + len(arrays)}], {register};"
    if dtype == np.bool_:
        names["y"] = "%p15"
        store = f"selp.b16 {register}, 1, 0, %p15;\nst.global.b8 [%d{20 + len(arrays)}], {register};"
    text = instruction
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    run("\n".join([*lines, text + ";", store]), tensors, warps=padded // 32, schedule=Schedule(inexact=inexact))
    return tensors[-1].numpy().view(dtype)[:count].copy()
