"""wgmma: products of four warps, of one operand in registers and one in shared memory, that are done when waited for.

Everything happens as late as it may: operands in registers are read, and sums written, at the wait. Shared memory is
accessed by another proxy than loads and stores use, and sees their stores behind a proxy fence only.
"""

from dataclasses import dataclass

import numpy as np

from emulator.faults import Divergence, UnknownInstruction
from emulator.instructions import Form, Run, instruction
from emulator.matrices import accumulated, fragments, terms
from emulator.parsing import Immediate, Instruction, Register, Vector
from emulator.races import ASYNC_READ
from emulator.registers import Active
from emulator.state import Product, State
from emulator.types import PREDICATE, Type
from emulator.warps import together

_WORD = Type("b", 32)
# Bytes of a row that is swizzled, by the two highest bits of a descriptor.
_SWIZZLES = {1: 128, 2: 64, 3: 32}


@dataclass(frozen=True)
class _Shape:
    columns: int
    depth: int
    size: int
    name: str
    transposed: bool  # columns are neighbours in memory, not the summed dimension


@instruction("wgmma")
def warpgroup(state: State, ins: Instruction, form: Form) -> Run:
    kind = form.required("mma_async", "fence", "commit_group", "wait_group")
    form.required("sync")
    form.required("aligned")
    if kind == "mma_async":
        return _multiply(state, ins, form)
    if kind == "fence":
        return lambda active: _all_four(state, ins, active)
    if kind == "commit_group":

        def commit(active: Active) -> None:
            _all_four(state, ins, active)
            state.product_groups[active.mask] += 1

        return commit
    allowed = ins.operands[0].value
    return lambda active: _wait(state, active, allowed)


def _all_four(state: State, ins: Instruction, active: Active) -> None:
    together(state, ins, active)
    warps = active.mask.reshape(-1, 128)
    if (warps.any(1) != warps.all(1)).any():
        raise Divergence(f"only some warps of four at {ins}")


def _multiply(state: State, ins: Instruction, form: Form) -> Run:
    """D = A B + D, (64, N) = (64, K) (K, N)."""
    result, left, descriptor, *rest = ins.operands
    shape = _shape(ins, form, rest)
    registers = state.registers
    if not isinstance(left, Vector) or not isinstance(result, Vector) or len(left.items) != 4:
        raise UnknownInstruction("operands in shared memory")
    words = [registers.read(item, _WORD) for item in left.items]
    sums = [registers.write(item, Type("f", 32)) for item in result.items]
    if len(sums) != shape.columns // 2:
        raise UnknownInstruction(f"{len(sums)} registers for {shape.columns} columns")
    descriptors = registers.read(descriptor, Type("u", 64))
    scale = rest[0] if isinstance(rest[0], Register | Immediate) else None
    if scale is None or rest[1:3] != [Immediate(1), Immediate(1)]:
        raise UnknownInstruction("scales")
    added = registers.read(scale, PREDICATE)

    def complete(active: Active, product: Product) -> None:
        groups = np.flatnonzero(active.mask[::128])
        right = _operand(state, ins, product.descriptors[groups], groups, shape)
        lanes = active.lanes
        depth = shape.depth
        a = fragments(words, lanes, 16, depth, shape.name).reshape(-1, 64, depth)
        column = np.arange(len(sums)) // 4 * 8 + np.arange(len(sums)) % 2
        row = np.arange(len(sums)) // 2 % 2 * 8
        lane = np.arange(128)
        rows = (lane // 32 * 16 + lane % 32 // 4)[:, None] + row  # (128, sums)
        columns = (lane % 4 * 2)[:, None] + column
        before = np.stack([total[lanes].reshape(-1, 128) for total in sums], -1)
        c = np.zeros((len(groups), 64, shape.columns))
        c[:, rows, columns] = np.where(product.added[groups][:, None, None], before, np.float32(0))
        values = accumulated(a, right, c, state.inexact)[:, rows, columns]
        for i, total in enumerate(sums):
            total[lanes] = values[..., i].ravel()

    def run(active: Active) -> None:
        _all_four(state, ins, active)
        first = np.arange(0, registers.lanes, 128)
        for values in (descriptors, added):
            if (values.reshape(-1, 128) != values[first][:, None])[active.mask[first]].any():
                raise Divergence(f"four warps that differ in their operands: {ins}")
        product = Product(active.mask.copy(), state.product_groups.copy(), descriptors[first], added[first], complete)
        # It may be early, too.
        groups = np.flatnonzero(active.mask[first])
        _operand(state, ins, product.descriptors[groups], groups, shape)
        state.products.append(product)

    return run


def _shape(ins: Instruction, form: Form, rest: list) -> _Shape:
    names = ins.modifiers[-3:]
    form.types()
    kinds = {("f32", "bf16", "bf16"): (16, 2), ("f32", "f16", "f16"): (16, 2), ("f32", "tf32", "tf32"): (8, 4)}
    if names not in kinds:
        raise UnknownInstruction(f".{' .'.join(names)}")
    depth, size = kinds[names]
    shapes = {f"m64n{columns}k{depth}": columns for columns in range(8, 257, 8)}
    columns = shapes[form.required(*shapes)]
    transposed = rest[3:]
    if len(transposed) != (1 if size == 2 else 0):
        raise UnknownInstruction(f"{len(transposed)} flags of operands")
    return _Shape(columns, depth, size, names[1], bool(transposed and transposed[0].value))


def _operand(state: State, ins: Instruction, descriptors: np.ndarray, groups: np.ndarray, shape: _Shape) -> np.ndarray:
    """(groups, N, K) from shared memory, in pieces of 16 bytes."""
    memory = state.shared_memory
    addresses = np.stack([_addresses(int(descriptor), shape) for descriptor in descriptors])
    per_group = addresses[0].size
    lanes = np.repeat(128 * groups, per_group)
    positions = memory.readable(memory.offsets(addresses.ravel(), lanes, ins), 16, ins)
    for warp in range(4):
        state.shared_log.add(positions, 16, state.rows[lanes + 32 * warp], ASYNC_READ, ins)
    pieces = memory.view(16).take(positions).view(np.uint32).reshape(*addresses.shape, 4)
    values = terms(pieces, shape.name).reshape(*addresses.shape, -1).astype(np.float64)
    if shape.transposed:  # (groups, N / 8, K, 8)
        return values.swapaxes(2, 3).reshape(len(groups), shape.columns, shape.depth)
    return values.reshape(len(groups), shape.columns, shape.depth)


def _addresses(descriptor: int, shape: _Shape) -> np.ndarray:
    """(N, K / pieces) or, transposed, (N / pieces, K) addresses of 16 bytes each."""
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    mode = descriptor >> 62
    if mode not in _SWIZZLES or descriptor >> 49 & 7:
        raise UnknownInstruction(f"descriptor {descriptor:#x}")
    swizzle = _SWIZZLES[mode]
    per_piece = 16 // shape.size
    if shape.transposed:
        piece = np.arange(shape.columns // per_piece)[:, None]
        k = np.arange(shape.depth)
        per_row = swizzle // 16
        offset = piece // per_row * leading + piece % per_row * 16 + k // 8 * stride + k % 8 * swizzle
    else:
        n = np.arange(shape.columns)[:, None]
        piece = np.arange(shape.depth // per_piece)
        offset = n // 8 * stride + n % 8 * swizzle + piece * 16
    address = start + offset
    return (address ^ ((address >> 7 & (swizzle // 16 - 1)) << 4)).astype(np.uint64)


def _wait(state: State, active: Active, allowed: int) -> None:
    """Do what the active lanes have committed, but for the last `allowed` groups, in order."""
    remaining = []
    for product in state.products:
        done = product.mask & active.mask & (product.groups < state.product_groups - allowed)
        if done.any():
            product.complete(Active(done), product)
        if (product.mask & ~done).any():
            product.mask = product.mask & ~done
            remaining.append(product)
    state.products = remaining
