"""Matrix products of float32 operands in named precisions, on tensor cores but for "ieee".

- "ieee": float32.
- "tf32", "tf32x3": operands rounded to 11 significant bits, or split into two such terms.
- "bf16", "bf16x3", "bf16x4": operands rounded to bfloat16, or split into two; with three products that of the two small
  terms is dropped, with four nothing is: operands of 16 bits are then multiplied exactly.

Tensor cores truncate the sums they accumulate. Products of a few rows are summed there, and added up in float32 with
rounding to nearest by the caller.
"""

import triton
import triton.language as tl

from moment_ops.kernels._common import is_finite


@triton.jit
def rounded(x, BITS: tl.constexpr):
    """float32 rounded to nearest, ties away from zero, to a mantissa without its last BITS bits; a NaN may become 0.

    In integers: conversions to bfloat16 and back take four times as long.
    """
    bits = x.to(tl.int32, bitcast=True) + (1 << (BITS - 1))
    return (bits & -(1 << BITS)).to(tl.float32, bitcast=True)


@triton.jit
def to_tf32(x):
    """Rounded to 10 explicit bits of mantissa; tensor cores would truncate."""
    return tl.where(is_finite(x), rounded(x, 13), x)


@triton.jit
def to_bf16(x, BF16: tl.constexpr):
    """Rounded to bfloat16, as an operand."""
    return x.to(tl.bfloat16).to(BF16)


@triton.jit
def terms(x, TF32: tl.constexpr, BF16: tl.constexpr):
    """(high, low) operands whose sum is x to twice their bits; where x is not finite, the low one is NaN."""
    if TF32:
        high = rounded(x, 13)
        return high, rounded(x - high, 13)
    else:
        high = rounded(x, 16)
        return to_bf16(high, BF16), to_bf16(x - high, BF16)


@triton.jit
def multiply(a, b, total, MODE: tl.constexpr, BF16: tl.constexpr):
    """total + a @ b; a: (M, K), b: (K, N), total: (M, N), all float32.

    BF16: the dtype of bfloat16 operands: float32 in the interpreter, which cannot multiply bfloat16.
    """
    if MODE == "ieee":
        return tl.dot(a, b, total, input_precision="ieee")
    elif MODE == "tf32":
        return tl.dot(to_tf32(a), to_tf32(b), total, input_precision="tf32")
    elif MODE == "bf16":
        return tl.dot(to_bf16(a, BF16), to_bf16(b, BF16), total, input_precision="ieee")
    else:
        TF32: tl.constexpr = MODE == "tf32x3"
        PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
        a_high, a_low = terms(a, TF32, BF16)
        b_high, b_low = terms(b, TF32, BF16)
        # Small terms first.
        if MODE == "bf16x4":
            total = tl.dot(a_low, b_low, total, input_precision=PRECISION)
        total = tl.dot(a_low, b_high, total, input_precision=PRECISION)
        total = tl.dot(a_high, b_low, total, input_precision=PRECISION)
        return tl.dot(a_high, b_high, total, input_precision=PRECISION)


@triton.jit
def promote(total, part):
    """total + part, rounded to nearest. Not `+`: Triton would sum the products of `part` on top of `total`."""
    return tl.fma(part, tl.full(part.shape, 1.0, tl.float32), total)
