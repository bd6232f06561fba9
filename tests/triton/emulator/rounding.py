"""What IEEE 754 says and NumPy has not: fused multiply-add, bfloat16, directed rounding, flushed subnormal numbers."""

from fractions import Fraction

import numpy as np

from emulator.types import UNSIGNED

_TIE_MASK, _TIE = np.uint64(0x1FFFFFFF), np.uint64(0x10000000)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(UNSIGNED[8 * x.itemsize])


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a + b rounded, its error), exactly (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a * b rounded, its error), exactly where nothing overflows or underflows (Dekker, Veltkamp)."""
    product = a * b
    parts = []
    for x in (a, b):
        scaled = x * 134217729.0
        high = scaled - (scaled - x)
        parts.append((high, x - high))
    (a_high, a_low), (b_high, b_low) = parts
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """A rounded value whose error is known, rounded to odd instead: it can be rounded again without a second error."""
    bits = _bits(rounded).copy()
    inexact = np.isfinite(rounded) & (error != 0) & (bits & 1 == 0)
    # Away from zero where the error has the value's sign, or the value is a zero of that sign.
    outwards = (error > 0) != np.signbit(rounded)
    bits[inexact & outwards] += 1
    bits[inexact & ~outwards] -= 1
    return bits.view(rounded.dtype)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32 with one rounding.

    Products are exact in float64. The sum is rounded there first, which shows where it is rounded onto the middle
    between two neighbours, or where the result is subnormal: it is rounded to odd then.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    doubtful = (total.view(np.uint64) & _TIE_MASK) == _TIE
    small = np.abs(total) < 2.0**-125
    if small.any():
        doubtful |= small & (total != 0)
    if doubtful.any():
        _, error = two_sum(product, c.astype(np.float64))
        total = np.where(doubtful, to_odd(total, error), total)
    return total.astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float64 with one rounding (Boldo & Melquiond 2008); exact rationals where parts would underflow."""
    plain = a * b + c
    high, low = two_product(a, b)
    upper, upper_error = two_sum(c, low)
    total, total_error = two_sum(high, upper)
    result = total + to_odd(*two_sum(total_error, upper_error))
    special = (a == 0) | (b == 0) | ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    result = np.where(special, plain, result)
    large = (np.abs(np.stack([a, b, c, high])) > 2.0**990).any(0)
    for i in np.flatnonzero((large | (np.abs(high) < 2.0**-900)) & ~special):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        # A sum that cancels is the plain one.
        result[i] = _rounded(exact) if exact else plain[i]
    return result


def _rounded(exact: Fraction) -> float:
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return float("inf") if exact > 0 else -float("inf")


def odd_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of values of 24 bits or fewer, in float64, rounded to odd."""
    product = np.multiply(a, b, dtype=np.float64)
    return to_odd(*two_sum(product, c.astype(np.float64)))


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd."""
    return to_odd(*two_sum(a.astype(np.float64), b.astype(np.float64)))


def narrow(wide: np.ndarray, dtype: type, mode: str) -> np.ndarray:
    """float64 rounded to a narrower float: rn, rz (to zero), rm (down), rp (up)."""
    nearest = wide.astype(dtype)
    if mode == "rn":
        return nearest
    back = nearest.astype(np.float64)
    below, above = np.array(-np.inf, dtype), np.array(np.inf, dtype)
    down = np.where(back > wide, np.nextafter(nearest, below), nearest)
    up = np.where(back < wide, np.nextafter(nearest, above), nearest)
    if mode == "rz":
        return np.where(np.signbit(wide), up, down)
    return down if mode == "rm" else up


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 rounded to the nearest bfloat16, to even; NaN is 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 with the value of these bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def odd_bfloat16(wide: np.ndarray) -> np.ndarray:
    """float64 that was rounded to odd, as the nearest bfloat16."""
    single = wide.astype(np.float32)
    return bfloat16(to_odd(single, wide - single.astype(np.float64)))


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).smallest_normal, np.copysign(np.zeros((), x.dtype), x), x)


def to_integer(x: np.ndarray, kind: str, bits: int) -> np.ndarray:
    """Integral floats as integers of 64 bits: saturated, NaN as PTX says."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind == "s" else (0, (1 << bits) - 1)
    wide = x.astype(np.float64)
    # The highest integer need not be a float; whatever is above it saturates, the rest converts exactly.
    above, below, missing = wide >= float(high + 1), wide < float(low), np.isnan(wide)
    result = np.where(above | below | missing, 0.0, wide).astype(np.uint64 if kind == "u" else np.int64)
    result[above], result[below] = high, low
    if bits == 64 or x.dtype == np.float64:
        result[missing] = 1 << (bits - 1) if kind == "u" else low
    return result
