"""Matrices that the threads of a warp hold together: how they come from shared memory, and their products.

Tensor cores truncate. Products of operands are exact here; their sum with the accumulator is exact, too, and truncated
to float32 once per instruction. Where approximate instructions err as far as they may, the terms are first aligned with
the largest of them and truncated to the 24 bits of float32, as the least exact tensor cores do.
"""

import numpy as np

from emulator import rounding
from emulator.accesses import located, put
from emulator.faults import UnknownInstruction
from emulator.instructions import Form, Run, instruction
from emulator.parsing import Instruction, Vector
from emulator.races import READ
from emulator.registers import Active
from emulator.state import State
from emulator.types import Type, type_of
from emulator.warps import together

_WORD = Type("b", 32)


def _matrices(form: Form, operand: object) -> tuple[int, bool, tuple]:
    """(matrices, whether they are transposed, registers) of ldmatrix and stmatrix."""
    form.required("sync")
    form.required("aligned")
    form.required("m8n8")
    count = int(form.required("x1", "x2", "x4")[1:])
    transposed = form.flag("trans")
    form.required("shared", "shared::cta")
    if form.type() != Type("b", 16) or not isinstance(operand, Vector) or len(operand.items) != count:
        raise UnknownInstruction("matrices")
    return count, transposed, operand.items


def _rows(active: Active, count: int) -> Active:
    """The lanes whose addresses count: one for each of the rows of all matrices."""
    return active.only(np.arange(len(active.mask)) % 32 < 8 * count)


@instruction("ldmatrix")
def load_matrices(state: State, ins: Instruction, form: Form) -> Run:
    count, transposed, items = _matrices(form, ins.operands[0])
    outs = [state.registers.write(item, _WORD) for item in items]
    memory, log, locate = located(state, ins.operands[1], "shared", ins)

    def run(active: Active) -> None:
        together(state, ins, active)
        rows = _rows(active, count)
        positions = memory.readable(locate(rows), 16, ins)
        log.add(positions, 16, state.rows[rows.lanes], READ, ins)
        entries = memory.view(16).take(positions).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            entries = entries.swapaxes(2, 3)
        words = np.ascontiguousarray(entries).view(np.uint32).reshape(-1, count, 32)
        for i, out in enumerate(outs):
            out[active.lanes] = words[:, i].ravel()

    return run


@instruction("stmatrix")
def store_matrices(state: State, ins: Instruction, form: Form) -> Run:
    count, transposed, items = _matrices(form, ins.operands[1])
    values = [state.registers.read(item, _WORD) for item in items]
    memory, log, locate = located(state, ins.operands[0], "shared", ins)

    def run(active: Active) -> None:
        together(state, ins, active)
        words = np.stack([value[active.lanes].reshape(-1, 32) for value in values], 1)
        entries = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            entries = entries.swapaxes(2, 3)
        rows = _rows(active, count)
        put(state, memory, log, locate(rows), 16, np.ascontiguousarray(entries).reshape(-1, 8), rows, ins)

    return run


@instruction("mma")
def multiply(state: State, ins: Instruction, form: Form) -> Run:
    """D = A B + C for every warp: (16, 8) = (16, K) (K, 8)."""
    form.required("sync")
    form.required("aligned")
    shape = form.required("m16n8k4", "m16n8k8", "m16n8k16")
    form.required("row")
    form.required("col")
    names = ins.modifiers[-4:]
    form.types()
    if names[0] != "f32" or names[3] != "f32" or names[1] != names[2] or names[1] not in ("tf32", "bf16", "f16"):
        raise UnknownInstruction(f".{' .'.join(names)}")
    depth = int(shape.split("k")[1])
    registers = state.registers
    left, right, added = ([registers.read(item, _WORD) for item in operand.items] for operand in ins.operands[1:])
    outs = [registers.write(item, Type("f", 32)) for item in ins.operands[0].items]
    per_word = 1 if names[1] == "tf32" else 2
    if (len(left), len(right), len(added), len(outs)) != (depth // 2 // per_word, depth // 4 // per_word, 4, 4):
        raise UnknownInstruction("registers of matrices")
    lane = np.arange(32)
    group, place = lane // 4, lane % 4

    def run(active: Active) -> None:
        together(state, ins, active)
        lanes = active.lanes
        sums = np.zeros((active.mask.sum() // 32, 16, 8))
        for i, word in enumerate(added):
            sums[:, group + 8 * (i // 2), place * 2 + i % 2] = word.view(np.float32)[lanes].reshape(-1, 32)
        a, b = (fragments(words, lanes, rows, depth, names[1]) for words, rows in ((left, 16), (right, 8)))
        product = accumulated(a, b, sums, state.inexact)
        for i, out in enumerate(outs):
            out[lanes] = product[:, group + 8 * (i // 2), place * 2 + i % 2].ravel()

    return run


def fragments(words: list[np.ndarray], lanes: np.ndarray | slice, rows: int, depth: int, name: str) -> np.ndarray:
    """(warps, rows, depth) operands in registers: word r has rows r % (rows / 8) and a part of the depth."""
    lane = np.arange(32)
    parts = []
    for r, word in enumerate(words):
        values = terms(word[lanes].reshape(-1, 32), name)  # (warps, 32, per word)
        column = lane[:, None] % 4 * values.shape[2] + np.arange(values.shape[2])
        parts.append(
            (lane[:, None] // 4 + 8 * (r % (rows // 8)), column + 4 * values.shape[2] * (r // (rows // 8)), values)
        )
    matrix = np.zeros((len(parts[0][2]), rows, depth))
    for row, column, values in parts:
        matrix[:, row, column] = values
    return matrix


def terms(words: np.ndarray, name: str) -> np.ndarray:
    """(..., 1 or 2) values of operands in registers; tf32 has ten bits of mantissa, the rest is ignored."""
    if name == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    type_ = type_of(name)
    assert type_ is not None
    return rounding.from_bfloat16(halves) if type_.kind == "bf" else halves.view(np.float16)


def accumulated(left: np.ndarray, right: np.ndarray, sums: np.ndarray, inexact: bool) -> np.ndarray:
    """sums + left @ right', truncated to float32; left: (n, M, K), right: (n, N, K), sums: (n, M, N)."""
    if not inexact:
        return rounding.narrow(sums + left @ right.swapaxes(1, 2), np.float32, "rz")
    addends = left[:, :, None] * right[:, None]  # (n, M, N, K)
    addends = np.concatenate([addends, sums[..., None]], -1)
    largest = np.abs(addends).max(-1, keepdims=True)
    unit = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 23)
    aligned = np.where(np.isfinite(largest), np.trunc(addends / unit) * unit, addends)
    return rounding.narrow(aligned.sum(-1), np.float32, "rz")
