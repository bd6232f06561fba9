"""cvt: between integers and floats of all widths."""

import numpy as np

from emulator import rounding
from emulator.faults import UnknownInstruction
from emulator.floats import canonical, widened
from emulator.instructions import Form, Run, instruction
from emulator.parsing import Instruction
from emulator.registers import Active
from emulator.state import State
from emulator.types import Type

_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def convert(state: State, ins: Instruction, form: Form) -> Run:
    integral = form.one_of(*_INTEGRAL)
    mode = form.one_of("rn", "rz", "rm", "rp", "rna")
    tf32 = "tf32" in ins.modifiers
    result, source = form.types()
    if tf32:
        return _to_tf32(state, ins, mode)
    if result.count == 2:
        return _pack(state, ins, form, result, source, mode)
    if result.is_float and source.is_float:
        return _float_to_float(state, ins, form, result, source, mode, integral)
    if mode == "rna" or (not source.is_float and integral) or (source.is_float and not integral):
        raise UnknownInstruction(f"rounding of .{result}.{source}")
    x = state.registers.read(ins.operands[1], source)
    put = state.registers.extended(ins.operands[0], result)
    if not source.is_float and not result.is_float:
        if mode:
            raise UnknownInstruction(f".{mode}")
        return lambda active: put(x.astype(result.dtype), active)
    if result.is_float:
        return _integer_to_float(put, x, result, source, mode)
    ftz = form.flag("ftz")

    def to_integer(active: Active) -> None:
        values = rounding.flush(x) if ftz else widened(x, source)
        put(rounding.to_integer(_INTEGRAL[integral](values), result.kind, result.bits).astype(result.dtype), active)

    return to_integer


def _integer_to_float(put, x: np.ndarray, result: Type, source: Type, mode: str | None) -> Run:
    if result.kind == "bf" or mode is None or (source.bits == 64 and (mode != "rn" or result.bits == 16)):
        raise UnknownInstruction(f"rounding of .{result}.{source}")
    if mode == "rn" and result.bits > 16:
        return lambda active: put(x.astype(result.dtype), active)
    return lambda active: put(rounding.narrow(x.astype(np.float64), result.dtype, mode), active)


def _float_to_float(
    state: State, ins: Instruction, form: Form, result: Type, source: Type, mode: str | None, integral: str | None
) -> Run:
    x = state.registers.read(ins.operands[1], source)
    put = state.registers.extended(ins.operands[0], result)
    ftz, saturated = form.flag("ftz"), form.flag("sat")
    narrower = result.bits < source.bits
    if narrower != (mode is not None) or (integral and result != source) or mode == "rna":
        raise UnknownInstruction(f"rounding of .{result}.{source}")
    if result.bits == source.bits and result != source:
        raise UnknownInstruction(f".{result}.{source}")

    def run(active: Active) -> None:
        values = widened(x, source)
        if ftz and values.dtype == np.float32:
            values = rounding.flush(values)
        if integral:
            values = _INTEGRAL[integral](values)
        if saturated:
            values = np.fmin(np.fmax(values, np.zeros_like(values)), np.ones_like(values))
        if result.kind == "bf":
            values = _bfloat16(values, mode or "rn")
        elif narrower:
            values = rounding.narrow(values.astype(np.float64), result.dtype, mode or "rn")
        else:
            values = values.astype(result.dtype)
        if ftz and values.dtype == np.float32:
            values = rounding.flush(values)
        put(values, active)

    return canonical(state, ins, result, run)


def _bfloat16(values: np.ndarray, mode: str) -> np.ndarray:
    if mode == "rn" and values.dtype == np.float32:
        return rounding.bfloat16(values)
    if mode == "rn":
        return rounding.odd_bfloat16(values.astype(np.float64))
    if mode == "rz" and values.dtype == np.float32:
        bits = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), bits)
    raise UnknownInstruction(f".{mode}.bf16")


def _to_tf32(state: State, ins: Instruction, mode: str | None) -> Run:
    """Ten bits of mantissa, ties away from zero."""
    if mode != "rna":
        raise UnknownInstruction(f".{mode}.tf32")
    x = state.registers.read(ins.operands[1], Type("u", 32))
    out = state.registers.write(ins.operands[0], Type("u", 32))

    def run(active: Active) -> None:
        finite = (x & 0x7F800000) != 0x7F800000
        np.copyto(out, np.where(finite, (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000), x), where=active.where)

    return run


def _pack(state: State, ins: Instruction, form: Form, result: Type, source: Type, mode: str | None) -> Run:
    """Two floats as one register: the first operand is the high half."""
    if source != Type("f", 32) or result.bits != 16 or mode not in ("rn", "rz"):
        raise UnknownInstruction(f".{mode}.{result}.{source}")
    high, low = (state.registers.read(operand, source) for operand in ins.operands[1:3])
    out = state.registers.write(ins.operands[0], result)

    def run(active: Active) -> None:
        for half, x in ((out[0::2], low), (out[1::2], high)):
            if result.kind == "bf":
                narrow = _bfloat16(x, mode)
            else:
                narrow = rounding.narrow(x.astype(np.float64), np.float16, mode)
            np.copyto(half, narrow, where=active.where)

    return run
