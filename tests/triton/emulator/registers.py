"""Registers as arrays of one entry per lane, seen in the types of the instructions that use them."""

from collections.abc import Callable

import numpy as np

from emulator.faults import UnknownInstruction
from emulator.parsing import Immediate, Kernel, Negated, Operand, Register, Symbol
from emulator.types import PREDICATE, SIGNED, UNSIGNED, Type


class Active:
    """The lanes that execute an instruction.

    where: True where all lanes that still run do, else a bool per lane. What has left may be overwritten; arithmetic
    is then done without a mask, which is several times faster.
    """

    def __init__(self, mask: np.ndarray, alone: bool = False) -> None:
        self.mask = mask
        self.where = True if alone else mask
        self._lanes: np.ndarray | slice | None = None
        self._doubled: np.ndarray | bool | None = None

    @property
    def lanes(self) -> np.ndarray | slice:
        """An index of their entries in arrays."""
        if self._lanes is None:
            self._lanes = slice(None) if self.mask.all() else np.flatnonzero(self.mask)
        return self._lanes

    @property
    def doubled(self) -> np.ndarray | bool:
        """`where`, of registers that hold two values."""
        if self._doubled is None:
            self._doubled = True if self.where is True else np.repeat(self.mask, 2)
        return self._doubled

    def only(self, condition: np.ndarray) -> "Active":
        """Those of them for which the condition holds."""
        return Active(self.mask & condition)


class Registers:
    """The registers of all lanes.

    Arrays never move, so that what is bound to them once stays so.
    """

    def __init__(self, kernel: Kernel, lanes: int, special: dict[str, np.ndarray], symbols: dict[str, int]) -> None:
        self.lanes = lanes
        self._special = special
        self._symbols = symbols
        self._arrays: dict[str, np.ndarray] = {}
        self._constants: dict[tuple[int, Type], np.ndarray] = {}
        for bits in set(kernel.registers.values()):
            names = [name for name, width in kernel.registers.items() if width == bits]
            dtype = np.bool_ if bits == 1 else UNSIGNED[bits]
            self._arrays.update(zip(names, np.zeros((len(names), lanes), dtype), strict=True))

    def bits(self, name: str) -> np.ndarray:
        """A register as unsigned integers."""
        if name not in self._arrays:
            raise UnknownInstruction(f"register {name}")
        return self._arrays[name]

    def scratch(self, type_: Type) -> np.ndarray:
        """An array like a register that no instruction names."""
        return np.zeros(self.lanes * type_.count, type_.dtype)

    def read(self, operand: Operand, type_: Type) -> np.ndarray:
        """The values of an operand; of a wider register, its low bits. Values of packed types follow one another."""
        if isinstance(operand, Negated):
            raise UnknownInstruction(f"!{operand.register.name} as a value")
        if isinstance(operand, Immediate):
            return self._constant(operand.value, type_)
        if isinstance(operand, Symbol):
            if operand.name not in self._symbols:
                raise UnknownInstruction(f"symbol {operand.name}")
            return self._constant(self._symbols[operand.name], type_)
        if not isinstance(operand, Register):
            raise UnknownInstruction(f"{operand} as a value")
        array = self._special[operand.name] if operand.name in self._special else self.bits(operand.name)
        if array.dtype == np.bool_ or type_ == PREDICATE:
            if array.dtype != np.bool_ or type_ != PREDICATE:
                raise UnknownInstruction(f"{operand.name} as .{type_}")
            return array
        return self._view(operand.name, array, type_)

    def write(self, operand: Operand, type_: Type) -> np.ndarray:
        """The array of a result that is as wide as its register."""
        if operand == Register("_"):
            return self.scratch(type_)
        if not isinstance(operand, Register):
            raise UnknownInstruction(f"{operand} as a result")
        array = self.bits(operand.name)
        width = 1 if array.dtype == np.bool_ else 8 * array.itemsize
        if width != type_.width:
            raise UnknownInstruction(f"{width} bits of {operand.name} for a result of .{type_}")
        return array if type_ == PREDICATE else self._view(operand.name, array, type_)

    def extended(self, operand: Operand, type_: Type) -> Callable[[np.ndarray, Active], None]:
        """A function that writes results into a register that may be wider: signed ones with their sign."""
        if operand == Register("_"):
            return lambda values, active: None
        if not isinstance(operand, Register):
            raise UnknownInstruction(f"{operand} as a result")
        out = self.bits(operand.name)
        if out.dtype == np.bool_ or 8 * out.itemsize < type_.width or type_.count > 1:
            raise UnknownInstruction(f"{operand.name} for a result of .{type_}")
        if type_.kind == "s":
            out = out.view(SIGNED[8 * out.itemsize])

            def put(values: np.ndarray, active: Active) -> None:
                np.copyto(out, values, where=active.where)

        else:
            bits = UNSIGNED[type_.bits]

            def put(values: np.ndarray, active: Active) -> None:
                np.copyto(out, values.view(bits), where=active.where)

        return put

    def _constant(self, value: int, type_: Type) -> np.ndarray:
        key = (value, type_)
        if key not in self._constants:
            if type_ == PREDICATE:
                array = np.full(self.lanes, value != 0)
            else:
                entry = np.array([value & ((1 << type_.width) - 1)], UNSIGNED[type_.width]).view(type_.dtype)
                array = np.tile(entry, self.lanes)
            array.flags.writeable = False
            self._constants[key] = array
        return self._constants[key]

    def _view(self, name: str, array: np.ndarray, type_: Type) -> np.ndarray:
        width = 8 * array.itemsize
        if type_.width > width:
            raise UnknownInstruction(f"{width} bits of {name} as .{type_}")
        view = array.view(type_.dtype)
        if type_.width == width:
            return view
        if type_.count > 1:
            raise UnknownInstruction(f"{width} bits of {name} as .{type_}")
        return view[:: width // type_.bits]
