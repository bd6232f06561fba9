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
def to_tf32(x):
    """float32 rounded to nearest even with 10 explicit bits of mantissa; tensor cores would truncate."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return tl.where(is_finite(x), rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def leading(x, TF32: tl.constexpr, BF16: tl.constexpr):
    """The leading term of float32, as an operand."""
    if TF32:
        return to_tf32(x)
    else:
        return x.to(tl.bfloat16).to(BF16)


@triton.jit
def multiply(a, b, total, MODE: tl.constexpr, BF16: tl.constexpr):
    """total + a @ b; a: (M, K), b: (K, N), total: (M, N), all float32.

    BF16: the dtype of bfloat16 operands: float32 in the interpreter, which cannot multiply bfloat16.
    """
    if MODE == "ieee":
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        TF32: tl.constexpr = MODE == "tf32" or MODE == "tf32x3"
        a_high = leading(a, TF32, BF16)
        b_high = leading(b, TF32, BF16)
        if MODE != "tf32" and MODE != "bf16":
            a_low = leading(a - a_high.to(tl.float32), TF32, BF16)
            b_low = leading(b - b_high.to(tl.float32), TF32, BF16)
            # Small terms first.
            if MODE == "bf16x4":
                total = tl.dot(a_low, b_low, total, input_precision="tf32")
            total = tl.dot(a_low, b_high, total, input_precision="tf32")
            total = tl.dot(a_high, b_low, total, input_precision="tf32")
        return tl.dot(a_high, b_high, total, input_precision="tf32")
