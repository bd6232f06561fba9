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
    """float32 rounded to nearest, ties away from zero, without the last BITS bits of the mantissa.

    In integers: a conversion to bfloat16 and back takes four times as long. A NaN may become a zero.
    """
    return ((x.to(tl.int32, bitcast=True) + (1 << (BITS - 1))) & -(1 << BITS)).to(tl.float32, bitcast=True)


@triton.jit
def multiply(a, b, total, MODE: tl.constexpr, BF16: tl.constexpr):
    """total + a @ b; a: (M, K), b: (K, N), total: (M, N), all float32.

    BF16: the dtype of bfloat16 operands: float32 in the interpreter, which cannot multiply bfloat16.
    """
    if MODE == "ieee":
        return tl.dot(a, b, total, input_precision="ieee")
    TF32: tl.constexpr = MODE == "tf32" or MODE == "tf32x3"
    if TF32:
        BITS: tl.constexpr = 13
        OPERAND: tl.constexpr = tl.float32
    else:
        BITS: tl.constexpr = 16
        OPERAND: tl.constexpr = BF16
    if MODE == "bf16":
        return tl.dot(a.to(tl.bfloat16).to(BF16), b.to(tl.bfloat16).to(BF16), total)
    a_high = rounded(a, BITS)
    b_high = rounded(b, BITS)
    if MODE == "tf32":
        a_high = tl.where(is_finite(a), a_high, a)
        b_high = tl.where(is_finite(b), b_high, b)
    else:
        a_low = a - a_high
        b_low = b - b_high
        if TF32:
            a_low = rounded(a_low, BITS)
            b_low = rounded(b_low, BITS)
        else:
            a_low = a_low.to(tl.bfloat16).to(BF16)
            b_low = b_low.to(tl.bfloat16).to(BF16)
        a_high = a_high.to(OPERAND)
        b_high = b_high.to(OPERAND)
        if MODE == "bf16x4":
            total = tl.dot(a_low, b_low, total, input_precision="tf32")
        total = tl.dot(a_low, b_high, total, input_precision="tf32")
        total = tl.dot(a_high, b_low, total, input_precision="tf32")
    return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def promoted(total, part):
    """total + part, rounded to nearest. Not `+`: Triton would sum the products of `part` on top of `total`."""
    return tl.fma(part, tl.full(part.shape, 1.0, tl.float32), total)
