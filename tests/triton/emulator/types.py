"""The types of instructions, and how arrays of registers are seen in them."""

import re
from dataclasses import dataclass

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


@dataclass(frozen=True)
class Type:
    """`.s32`, `.f16x2`: kind is one of s, u, b, f, bf, pred; tf32 is float32 with bits to spare."""

    kind: str
    bits: int
    count: int = 1

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "bf")

    @property
    def width(self) -> int:
        """Bits of all of it."""
        return self.bits * self.count

    @property
    def dtype(self) -> type:
        """How NumPy calls one of it; bfloat16 are its bits."""
        if self.kind == "pred":
            return np.bool_
        return {"s": SIGNED, "f": FLOAT}.get(self.kind, UNSIGNED)[self.bits]

    def __str__(self) -> str:
        name = "pred" if self.kind == "pred" else f"{self.kind}{self.bits}"
        return name + (f"x{self.count}" if self.count > 1 else "")


PREDICATE = Type("pred", 1)


def type_of(name: str) -> Type | None:
    """The type of this name, if it is one."""
    if name == "pred":
        return PREDICATE
    if name == "tf32":
        return Type("f", 32)
    match = re.fullmatch(r"(bf|[subf])(8|16|32|64)(?:x(\d))?", name)
    return Type(match[1], int(match[2]), int(match[3] or 1)) if match else None
