"""The emulator's instructions against their definition: Python's integers, exact rationals, known bit patterns."""

import operator
from fractions import Fraction

import numpy as np
import pytest
import torch
from emulator.snippets import evaluate

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S8, S16, S32, S64 = np.int8, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64


def edges(dtype, seed=0, count=40):
    """Random integers, among them the least and largest."""
    info = np.iinfo(dtype)
    generator = np.random.default_rng(seed)
    values = generator.integers(info.min, info.max, count, dtype, endpoint=True)
    small = generator.integers(0, 40, count // 2).astype(dtype)
    ends = np.array([info.min, info.max, 0, 1, info.max - 1, info.min + 1], dtype)
    return generator.permutation(np.concatenate([values, small, ends, ends]))


def floats(dtype, seed=0, count=64):
    """Random floats of every size, subnormal ones, zeros, infinities and NaN among them."""
    bits = np.random.default_rng(seed).integers(0, 1 << 8 * np.dtype(dtype).itemsize, count, np.uint64)
    bits = bits.astype({2: U16, 4: U32, 8: U64}[np.dtype(dtype).itemsize])
    info = np.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, info.max, info.smallest_subnormal, info.smallest_normal]
    return np.random.default_rng(seed).permutation(np.concatenate([bits.view(dtype), np.array(special, dtype)]))


def near_one(dtype, seed=0, count=200):
    """Floats whose sums and products are neither too large nor too small."""
    return np.random.default_rng(seed).normal(size=count).astype(dtype)


def wrapped(value, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    return np.array(value & (1 << bits) - 1, np.uint64).astype(f"u{bits // 8}").view(dtype)[()]


def assert_same(actual, expected):
    """Equal to the last bit; NaN is NaN."""
    assert actual.dtype == expected.dtype
    numbers = ~np.isnan(expected) if expected.dtype.kind == "f" else np.ones(len(expected), bool)
    bits = f"u{expected.itemsize}"
    np.testing.assert_array_equal(actual.view(bits)[numbers], expected.view(bits)[numbers])
    assert np.isnan(actual[~numbers]).all()


def towards_zero(x, y):
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) if y else -1


def bits_of(x, first, count, width, signed):
    """bfe, of a Python integer."""
    x &= (1 << width) - 1
    sign = x >> min(first + count - 1, width - 1) & 1 if signed and count else 0
    result = sum((x >> first + i & 1 if first + i < width else sign) << i for i in range(min(count, width)))
    return result - (1 << count) if sign and 0 < count < width else result


INTEGERS = [
    ("add.s32 {y}, {0}, {1}", (S32, S32), S32, operator.add),
    ("add.s64 {y}, {0}, {1}", (S64, S64), S64, operator.add),
    ("add.s16 {y}, {0}, {1}", (S16, S16), S16, operator.add),
    ("sub.u32 {y}, {0}, {1}", (U32, U32), U32, operator.sub),
    ("sub.s64 {y}, {0}, {1}", (S64, S64), S64, operator.sub),
    ("mul.lo.s32 {y}, {0}, {1}", (S32, S32), S32, operator.mul),
    ("mul.lo.s64 {y}, {0}, {1}", (S64, S64), S64, operator.mul),
    ("mul.hi.s32 {y}, {0}, {1}", (S32, S32), S32, lambda x, y: x * y >> 32),
    ("mul.hi.u32 {y}, {0}, {1}", (U32, U32), U32, lambda x, y: x * y >> 32),
    ("mul.hi.s64 {y}, {0}, {1}", (S64, S64), S64, lambda x, y: x * y >> 64),
    ("mul.hi.u64 {y}, {0}, {1}", (U64, U64), U64, lambda x, y: x * y >> 64),
    ("mul.wide.s16 {y}, {0}, {1}", (S16, S16), S32, operator.mul),
    ("mul.wide.s32 {y}, {0}, {1}", (S32, S32), S64, operator.mul),
    ("mul.wide.u32 {y}, {0}, {1}", (U32, U32), U64, operator.mul),
    ("mad.lo.s32 {y}, {0}, {1}, {2}", (S32, S32, S32), S32, lambda x, y, z: x * y + z),
    ("mad.hi.u32 {y}, {0}, {1}, {2}", (U32, U32, U32), U32, lambda x, y, z: (x * y >> 32) + z),
    ("mad.wide.s32 {y}, {0}, {1}, {2}", (S32, S32, S64), S64, lambda x, y, z: x * y + z),
    ("mad.wide.u32 {y}, {0}, 8192, {1}", (U32, U64), U64, lambda x, z: x * 8192 + z),
    ("div.s32 {y}, {0}, {1}", (S32, S32), S32, towards_zero),
    ("div.s64 {y}, {0}, {1}", (S64, S64), S64, towards_zero),
    ("div.u32 {y}, {0}, {1}", (U32, U32), U32, lambda x, y: x // y if y else -1),
    ("rem.s32 {y}, {0}, {1}", (S32, S32), S32, lambda x, y: x - y * towards_zero(x, y) if y else -1),
    ("rem.u64 {y}, {0}, {1}", (U64, U64), U64, lambda x, y: x % y if y else -1),
    ("min.s32 {y}, {0}, {1}", (S32, S32), S32, min),
    ("max.s32 {y}, {0}, {1}", (S32, S32), S32, max),
    ("min.u64 {y}, {0}, {1}", (U64, U64), U64, min),
    ("max.u16 {y}, {0}, {1}", (U16, U16), U16, max),
    ("abs.s32 {y}, {0}", (S32,), S32, abs),
    ("neg.s64 {y}, {0}", (S64,), S64, operator.neg),
    ("and.b32 {y}, {0}, -4", (U32,), U32, lambda x: x & -4),
    ("or.b64 {y}, {0}, {1}", (U64, U64), U64, operator.or_),
    ("xor.b16 {y}, {0}, {1}", (U16, U16), U16, operator.xor),
    ("not.b32 {y}, {0}", (U32,), U32, operator.invert),
    ("shl.b32 {y}, {0}, {1}", (U32, U32), U32, lambda x, n: x << n if n < 32 else 0),
    ("shl.b64 {y}, {0}, 32", (U64,), U64, lambda x: x << 32),
    ("shr.u32 {y}, {0}, {1}", (U32, U32), U32, lambda x, n: x >> min(n, 32)),
    ("shr.s32 {y}, {0}, {1}", (S32, U32), S32, lambda x, n: x >> min(n, 32)),
    ("shr.s64 {y}, {0}, {1}", (S64, U32), S64, lambda x, n: x >> min(n, 64)),
    ("shr.s16 {y}, {0}, 1", (S16,), S16, lambda x: x >> 1),
    ("shf.l.wrap.b32 {y}, {0}, {1}, {2}", (U32, U32, U32), U32, lambda x, y, n: ((y << 32 | x) << n % 32) >> 32),
    ("shf.r.clamp.b32 {y}, {0}, {1}, {2}", (U32, U32, U32), U32, lambda x, y, n: (y << 32 | x) >> min(n, 32)),
    ("bfe.u32 {y}, {0}, 3, 4", (U32,), U32, lambda x: x >> 3 & 15),
    ("bfe.s32 {y}, {0}, 2, 1", (S32,), S32, lambda x: -(x >> 2 & 1)),
    ("bfe.s32 {y}, {0}, {1}, {2}", (S32, U32, U32), S32, lambda x, p, n: bits_of(x, p & 255, n & 255, 32, True)),
    ("bfe.u32 {y}, {0}, {1}, {2}", (U32, U32, U32), U32, lambda x, p, n: bits_of(x, p & 255, n & 255, 32, False)),
    ("bfi.b32 {y}, {0}, {1}, 5, 9", (U32, U32), U32, lambda x, y: y & ~(511 << 5) | (x & 511) << 5),
    ("bfi.b32 {y}, {0}, {1}, 0, 32", (U32, U32), U32, lambda x, y: x),
    ("prmt.b32 {y}, {0}, {1}, 0x7610U", (U32, U32), U32, lambda x, y: x & 0xFFFF | y & 0xFFFF0000),
    ("prmt.b32 {y}, {0}, 0, 0x7773U", (U32,), U32, lambda x: x >> 24),
    ("prmt.b32 {y}, {0}, 0, 0x888BU", (U32,), U32, lambda x: (x >> 31) * 255 | (x >> 7 & 1) * 0xFFFFFF00),
    ("lop3.b32 {y}, {0}, {1}, {2}, 0xE8", (U32, U32, U32), U32, lambda x, y, z: x & y | y & z | x & z),
    ("popc.b64 {y}, {0}", (U64,), U32, lambda x: x.bit_count()),
    ("clz.b32 {y}, {0}", (U32,), U32, lambda x: 32 - x.bit_length()),
    ("brev.b32 {y}, {0}", (U32,), U32, lambda x: int(f"{x:032b}"[::-1], 2)),
    ("cvt.s16.s8 {y}, {0}", (U16,), S16, lambda x: int(np.uint8(x & 255).view(S8))),
    ("cvt.s32.s8 {y}, {0}", (U32,), S32, lambda x: int(np.uint8(x & 255).view(S8))),
    ("cvt.u16.u32 {y}, {0}", (U32,), U16, int),
    ("cvt.u32.u16 {y}, {0}", (U16,), U32, int),
    ("cvt.s64.s32 {y}, {0}", (S32,), S64, int),
    ("cvt.u64.u32 {y}, {0}", (U32,), U64, int),
    ("cvt.u32.u64 {y}, {0}", (U64,), U32, int),
    ("mov.b32 {%h0, %h1}, {0}; mov.b32 {y}, {%h1, %h0}", (U32,), U32, lambda x: x >> 16 | (x & 0xFFFF) << 16),
    ("mov.b64 {_, %r9}, {0}; mov.b32 {y}, %r9", (U64,), U32, lambda x: x >> 32),
    ("setp.lo.u32 %p1, {0}, {1}; selp.b32 {y}, {0}, {1}, %p1", (U32, U32), U32, min),
    ("setp.gt.and.s32 %p1, {0}, 5, !%p0; selp.b32 {y}, 1, 0, %p1", (S32,), S32, lambda x: int(x > 5)),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "types", "out", "function"), INTEGERS, ids=[case[0] for case in INTEGERS])
def test_integers_are_those_of_python_cut_to_their_width(instruction, types, out, function):
    if "!%p0" in instruction:
        instruction = "setp.ne.s32 %p0, 0, 0; " + instruction
    inputs = [edges(type_, seed) for seed, type_ in enumerate(types)]
    expected = [wrapped(function(*map(int, values)), out) for values in zip(*inputs, strict=True)]
    assert_same(evaluate(instruction, *inputs, out=out), np.array(expected, out))


@pytest.mark.parametrize(("name", "function"), [("add", np.add), ("sub", np.subtract), ("max", np.maximum)])
def test_packed_integers_are_pairs_of_integers(name, function):
    pairs = [np.random.default_rng(seed).integers(-(1 << 15), 1 << 15, 80).astype(np.int16) for seed in range(2)]
    result = evaluate(f"{name}.s16x2 {{y}}, {{0}}, {{1}}", *(x.view(U32) for x in pairs), out=U32)
    assert_same(result.view(np.int16), function(*pairs))


def rounded(exact, dtype, mode="rn"):
    """The float nearest to a rational, ties to even; or the next one towards zero, down, or up."""
    info = np.finfo(dtype)
    # The float behind the largest, as if exponents went on, is infinity; so is what comes after it.
    beyond = Fraction(2) ** info.maxexp
    exact = min(max(exact, -beyond * (1 - Fraction(1, 1 << 60))), beyond * (1 - Fraction(1, 1 << 60)))
    with np.errstate(over="ignore"):
        guess = np.array(float(exact) if abs(exact) < Fraction(float(info.max)) else float(info.max), dtype)[()]
        guess = np.copysign(guess, dtype(1 if exact >= 0 else -1))
        near = [guess, np.nextafter(guess, dtype(-np.inf)), np.nextafter(guess, dtype(np.inf))]
    value = {x: Fraction(float(x)) if np.isfinite(x) else beyond * (1 if x > 0 else -1) for x in near}
    if mode == "rz":
        mode = "rm" if exact > 0 else "rp"
    if mode == "rm":
        return max((x for x in near if value[x] <= exact), key=value.get)
    if mode == "rp":
        return min((x for x in near if value[x] >= exact), key=value.get)
    even = {2: U16, 4: U32, 8: U64}[info.dtype.itemsize]
    return min(near, key=lambda x: (abs(value[x] - exact), int(np.array(x).view(even)) & 1))


def fused(a, b, c, dtype, mode="rn"):
    """a * b + c, exactly, and rounded once."""
    result = []
    with np.errstate(all="ignore"):
        wide = [v.astype(F64) for v in (a, b, c)]
    for x, y, z in zip(*wide, strict=True):
        exact = None
        if np.isfinite([x, y, z]).all():
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        with np.errstate(all="ignore"):
            result.append(rounded(exact, dtype, mode) if exact else dtype(x * y + z))
    return np.array(result, dtype)


def nearly_halfway(dtype):
    """Triples whose a * b + c is in the middle between two floats, or beside it by less than most formats can tell.

    (1 + e) (2 - 2 e) is 2 - 2 e**2, which twice the digits do not hold beside 1.
    """
    eps = np.finfo(dtype).eps
    a = np.array([1, 1 + eps, 1, 1 + eps], dtype)
    b = np.array([eps / 2, (2 - 2 * eps) * (eps / 4), eps / 2, (2 - 2 * eps) * (eps / 4)], dtype)
    c = np.array([1, 1, 1 + eps, 1 + eps], dtype)
    return np.concatenate([a, -a, a, -a]), np.tile(b, 4), np.concatenate([c, -c, -c, c])


@pytest.mark.parametrize(("type_", "dtype"), [("f32", F32), ("f64", F64), ("f16", F16)])
@pytest.mark.parametrize("values", [floats, near_one])
def test_a_fused_multiply_add_is_rounded_once(type_, dtype, values):
    a, b, c = (values(dtype, seed) for seed in range(3))
    # What cancels, too: the rounding of the product is left.
    with np.errstate(all="ignore"):
        c[: len(c) // 2] = -(a * b)[: len(c) // 2]
    assert_same(evaluate(f"fma.rn.{type_} {{y}}, {{0}}, {{1}}, {{2}}", a, b, c, out=dtype), fused(a, b, c, dtype))


@pytest.mark.parametrize(("type_", "dtype"), [("f32", F32), ("f64", F64), ("f16", F16)])
def test_a_fused_multiply_add_nearly_in_the_middle_between_two_floats_is_rounded_once(type_, dtype):
    a, b, c = nearly_halfway(dtype)
    assert_same(evaluate(f"fma.rn.{type_} {{y}}, {{0}}, {{1}}, {{2}}", a, b, c, out=dtype), fused(a, b, c, dtype))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    a, b, c = (near_one(F32, seed) for seed in range(3))
    assert_same(evaluate(f"fma.{mode}.f32 {{y}}, {{0}}, {{1}}, {{2}}", a, b, c, out=F32), fused(a, b, c, F32, mode))
    ones = np.ones_like(a)
    assert_same(evaluate(f"add.{mode}.f32 {{y}}, {{0}}, {{1}}", a, b, out=F32), fused(a, ones, b, F32, mode))
    assert_same(evaluate(f"mul.{mode}.f32 {{y}}, {{0}}, {{1}}", a, b, out=F32), fused(a, b, 0 * c, F32, mode))


PLAIN = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div.rn": np.divide}


@pytest.mark.parametrize(
    ("opcode", "type_", "dtype"),
    [
        (opcode, *of)
        for opcode in PLAIN
        for of in (("f32", F32), ("f64", F64), ("f16", F16))
        if opcode != "div.rn" or of[1] != F16
    ],
)
def test_arithmetic_is_that_of_ieee_754(opcode, type_, dtype):
    a, b = floats(dtype, 1), floats(dtype, 2)
    with np.errstate(all="ignore"):
        expected = PLAIN[opcode](a, b)
    assert_same(evaluate(f"{opcode}.{type_} {{y}}, {{0}}, {{1}}", a, b, out=dtype), expected)


def test_ftz_flushes_subnormal_operands_and_results():
    tiny, normal = F32(2.0**-130), F32(2.0**-126)
    a = np.array([tiny, -tiny, normal, normal], F32)
    b = np.array([1.0, 1.0, 0.5, 1.0], F32)
    product = evaluate("mul.ftz.f32 {y}, {0}, {1}", a, b, out=F32)
    assert_same(product, np.array([0.0, -0.0, 0.0, normal], F32))
    assert_same(evaluate("mul.f32 {y}, {0}, {1}", a, b, out=F32), a * b)
    assert_same(evaluate("cvt.rmi.ftz.f32.f32 {y}, {0}", -np.abs(a), out=F32), np.array([-0.0, -0.0, -1, -1], F32))


def bf16(x):
    """Bits of the nearest bfloat16, by torch."""
    return torch.from_numpy(np.ascontiguousarray(x, F32)).to(torch.bfloat16).view(torch.int16).numpy().view(U16)


def of_bf16(bits):
    return torch.from_numpy(bits.view(S16).copy()).view(torch.bfloat16)


def bf16_bits(seed, count=200):
    bits = np.random.default_rng(seed).integers(0, 1 << 16, count).astype(U16)
    return np.where(np.isnan(of_bf16(bits).float().numpy()), U16(0x3F80), bits)


def torch_bits(x):
    return x.view(torch.int16).numpy().view(U16)


def assert_same_bf16(actual, expected):
    assert_same(of_bf16(actual).float().numpy(), expected.float().numpy())


@pytest.mark.parametrize("opcode", ["add", "sub", "mul"])
def test_packed_bfloat16_is_that_of_torch(opcode):
    a, b = bf16_bits(1), bf16_bits(2)
    result = evaluate(f"{opcode}.bf16x2 {{y}}, {{0}}, {{1}}", a.view(U32), b.view(U32), out=U32).view(U16)
    assert_same_bf16(result, getattr(torch, opcode)(of_bf16(a), of_bf16(b)))


def test_packed_fused_multiply_adds_of_bfloat16_are_rounded_once():
    a, b, c = (bf16(near_one(F32, seed)) for seed in range(3))
    # 1.75 * 37 / 64 is in the middle between two of them; c is beyond the digits of float32.
    a[:3], b[:3], c[:3] = bf16([1.75] * 3), bf16([37 / 64] * 3), bf16([0, 2.0**-40, -(2.0**-40)])
    result = evaluate("fma.rn.bf16x2 {y}, {0}, {1}, {2}", *(x.view(U32) for x in (a, b, c)), out=U32).view(U16)
    wide = [of_bf16(x).double().numpy() for x in (a, b, c)]
    expected = []
    for x, y, z in zip(*wide, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = int(bf16(np.array([float(exact)]))[0])
        candidates = [(near + i) & 0xFFFF for i in (-1, 0, 1)]
        value = {i: Fraction(of_bf16(np.array([i], U16)).item()) for i in candidates}
        expected.append(min(candidates, key=lambda i: (abs(value[i] - exact), i & 1)))
    np.testing.assert_array_equal(result, np.array(expected, U16))


def test_packed_halves_are_pairs_of_halves():
    a, b, c = (near_one(F16, seed) for seed in range(3))
    added = evaluate("add.f16x2 {y}, {0}, {1}", a.view(U32), b.view(U32), out=U32).view(F16)
    assert_same(added, a + b)
    result = evaluate("fma.rn.f16x2 {y}, {0}, {1}, {2}", *(x.view(U32) for x in (a, b, c)), out=U32).view(F16)
    assert_same(result, fused(a, b, c, F16))


def test_packed_floats_are_pairs_of_floats():
    a, b, c = (near_one(F32, seed) for seed in range(3))
    result = evaluate("fma.rn.f32x2 {y}, {0}, {1}, {2}", *(x.view(U64) for x in (a, b, c)), out=U64).view(F32)
    assert_same(result, fused(a, b, c, F32))


def test_sums_of_a_float_and_a_narrower_one_are_those_of_floats():
    a, b = bf16(near_one(F32)), near_one(F32, 1)
    wide = of_bf16(a).float().numpy()
    assert_same(evaluate("sub.rn.f32.bf16 {y}, {0}, {1}", a, b, out=F32), wide - b)
    half = near_one(F16)
    assert_same(evaluate("add.rn.f32.f16 {y}, {0}, {1}", half, b, out=F32), half.astype(F32) + b)


def test_extrema_prefer_numbers_and_know_the_sign_of_zero():
    nan = np.nan
    a = np.array([0.0, -0.0, nan, 1.0, nan, -np.inf], F32)
    b = np.array([-0.0, 0.0, 2.0, nan, nan, 3.0], F32)
    assert_same(evaluate("max.f32 {y}, {0}, {1}", a, b, out=F32), np.array([0.0, 0.0, 2.0, 1.0, nan, 3.0], F32))
    assert_same(evaluate("min.f32 {y}, {0}, {1}", a, b, out=F32), np.array([-0.0, -0.0, 2, 1, nan, -np.inf], F32))
    assert_same(evaluate("max.NaN.f32 {y}, {0}, {1}", a, b, out=F32), np.array([0, 0, nan, nan, nan, 3], F32))


def test_signs_are_flipped_and_dropped_of_zeros_and_infinities_too():
    a = np.array([0.0, -0.0, -np.inf, 1.5], F32)
    assert_same(evaluate("neg.f32 {y}, {0}", a, out=F32), np.array([-0.0, 0.0, np.inf, -1.5], F32))
    assert_same(evaluate("abs.f32 {y}, {0}", a, out=F32), np.array([0.0, 0.0, np.inf, 1.5], F32))
    assert_same(evaluate("copysign.f32 {y}, {0}, {1}", a, np.full(4, 2.0, F32), out=F32), np.array([2, -2, -2, 2], F32))


def test_a_nan_that_is_looked_at_as_bits_is_that_of_a_gpu():
    zeros = np.zeros(1, F32)
    text = "div.full.f32 %r9, {0}, {1}; mov.b32 {y}, %r9; and.b32 {y}, {y}, -1"
    assert evaluate(text, zeros, zeros, out=U32)[0] == 0x7FFFFFFF


FUNCTIONS = {
    "div.full.f32 {y}, {0}, {1}": (lambda x, y: x / y, 2),
    "div.approx.f32 {y}, {0}, {1}": (lambda x, y: x / y, 2),
    "rcp.approx.f32 {y}, {0}": (lambda x, y: 1 / x, 1),
    "sqrt.approx.f32 {y}, {0}": (lambda x, y: np.sqrt(x), 1),
    "rsqrt.approx.f32 {y}, {0}": (lambda x, y: 1 / np.sqrt(x), 2),
    "ex2.approx.f32 {y}, {0}": (lambda x, y: np.exp2(x), 2),
    "lg2.approx.f32 {y}, {0}": (lambda x, y: np.log2(x), 2),
    "sqrt.rn.f32 {y}, {0}": (lambda x, y: np.sqrt(x), 0),
    "rcp.rn.f32 {y}, {0}": (lambda x, y: 1 / x, 0),
}


@pytest.mark.parametrize("instruction", FUNCTIONS)
@pytest.mark.parametrize("inexact", [False, True])
def test_approximations_err_by_as_much_as_they_may_and_only_where_they_are_told_to(instruction, inexact):
    function, units = FUNCTIONS[instruction]
    a, b = np.abs(near_one(F32)), near_one(F32, 1)
    exact = function(a.astype(F64), b.astype(F64)).astype(F32)
    result = evaluate(instruction, a, *([b] if "{1}" in instruction else []), out=F32, inexact=inexact)
    distance = np.abs(result.view(S32).astype(S64) - exact.view(S32))
    assert distance.max() == (units if inexact else 0)


@pytest.mark.parametrize(("opcode", "signs"), [("add", (1, 1)), ("sub", (1, -1)), ("minus", (-1, 1))])
def test_products_are_fused_with_sums_where_the_assembler_may_and_it_is_told_to(opcode, signs):
    a, b, c = (near_one(F32, seed) for seed in range(3))
    operands = "{2}, %r9" if opcode == "minus" else "%r9, {2}"
    text = f"mul.f32 %r9, {{0}}, {{1}}; {opcode.replace('minus', 'sub')}.f32 {{y}}, {operands}"
    exact = fused(F32(signs[0]) * a, b, F32(signs[1]) * c, F32)
    plain = F32(signs[0]) * (a * b) + F32(signs[1]) * c
    assert (exact != plain).any()
    assert_same(evaluate(text, a, b, c, out=F32), plain)
    assert_same(evaluate(text, a, b, c, out=F32, inexact=True), exact)
    # Not where the text says how to round, or a factor has changed.
    assert_same(evaluate(text.replace("mul.f32", "mul.rn.f32"), a, b, c, out=F32, inexact=True), plain)
    changed = text.replace("; ", "; mov.b32 {0}, 0; ", 1)
    assert_same(evaluate(changed, a, b, c, out=F32, inexact=True), plain)


@pytest.mark.parametrize("inexact", [False, True])
def test_a_gross_reciprocal_of_float64_has_its_upper_half(inexact):
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, -1e-310, 1.7e308, 2.0], F64)
    a = np.concatenate([near_one(F64), special])
    result = evaluate("rcp.approx.ftz.f64 {y}, {0}", a, out=F64, inexact=inexact)
    numbers = ~np.isnan(result)
    assert not (result.view(U64)[numbers] & U64(2**32 - 1)).any()
    error = np.abs(result[:-9] * a[:-9] - 1).max()
    assert 2.0**-21 < error < 2.0**-18
    expected = np.array([np.inf, -np.inf, 0.0, -0.0, np.nan, np.inf, -np.inf, 0.0], F64)
    assert_same(result[-9:-1], expected)


def test_square_roots_of_float64_are_rounded_to_nearest():
    a = np.abs(near_one(F64))
    assert_same(evaluate("sqrt.rn.f64 {y}, {0}", a, out=F64), np.sqrt(a))


LARGE = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.75, 3e9, -3e9, 5e9, 1e20, -1e20, np.inf, -np.inf, np.nan]
I31, I63 = 2**31 - 1, 2**63 - 1
CONVERSIONS = [
    ("cvt.rzi.s32.f32", F32, S32, [0, 0, 0, 1, 2, 0, -1, -2, I31, ~I31, I31, I31, ~I31, I31, ~I31, 0]),
    ("cvt.rni.s32.f32", F32, S32, [0, 0, 0, 2, 2, 0, -2, -3, I31, ~I31, I31, I31, ~I31, I31, ~I31, 0]),
    ("cvt.rmi.s32.f32", F32, S32, [0, 0, 0, 1, 2, -1, -2, -3, I31, ~I31, I31, I31, ~I31, I31, ~I31, 0]),
    ("cvt.rpi.s32.f64", F64, S32, [0, 0, 1, 2, 3, 0, -1, -2, I31, ~I31, I31, I31, ~I31, I31, ~I31, ~I31]),
    ("cvt.rzi.u32.f32", F32, U32, [0, 0, 0, 1, 2, 0, 0, 0, 3000000000, 0, 2**32 - 1, 2**32 - 1, 0, 2**32 - 1, 0, 0]),
    ("cvt.rzi.s64.f64", F64, S64,
     [0, 0, 0, 1, 2, 0, -1, -2, 3 * 10**9, -3 * 10**9, 5 * 10**9, I63, ~I63, I63, ~I63, ~I63]),
    ("cvt.rzi.u64.f32", F32, U64, [0, 0, 0, 1, 2, 0, 0, 0, 3 * 10**9, 0, 5 * 10**9, 2**64 - 1, 0, 2**64 - 1, 0, 2**63]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "source", "out", "expected"), CONVERSIONS, ids=[case[0] for case in CONVERSIONS])
def test_floats_become_integers_that_saturate(name, source, out, expected):
    assert_same(evaluate(f"{name} {{y}}, {{0}}", np.array(LARGE, source), out=out), np.array(expected, out))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("name", "source", "dtype"), [("f32.f64", F64, F32), ("f16.f32", F32, F16)])
def test_floats_are_narrowed_in_every_direction(mode, name, source, dtype):
    near = np.concatenate([near_one(source), near_one(source) * 2.0 ** (np.finfo(dtype).minexp)]).astype(source)
    near = np.concatenate([near, np.array([1e300 if source == F64 else 1e30, -1e30], source)])
    expected = np.array([rounded(Fraction(float(x)), dtype, mode) for x in near], dtype)
    assert_same(evaluate(f"cvt.{mode}.{name} {{y}}, {{0}}", near, out=dtype), expected)


def test_integers_become_the_nearest_floats():
    x = edges(S64)
    expected = np.array([rounded(Fraction(int(v)), F32) for v in x], F32)
    assert_same(evaluate("cvt.rn.f32.s64 {y}, {0}", x, out=F32), expected)
    assert_same(evaluate("cvt.rn.f64.u64 {y}, {0}", x.view(U64), out=F64), x.view(U64).astype(F64))
    down = np.array([rounded(Fraction(int(v)), F32, "rm") for v in edges(S32)], F32)
    assert_same(evaluate("cvt.rm.f32.s32 {y}, {0}", edges(S32), out=F32), down)


def test_bfloat16_is_rounded_to_nearest_even_and_its_nan_is_0x7fff():
    x = floats(F32, count=500)
    ties = (np.arange(64, dtype=U32) << 15 | 0x3F800000).view(F32)
    x = np.concatenate([x, ties])
    result = evaluate("cvt.rn.bf16.f32 {y}, {0}", x, out=U16)
    expected = bf16(x)
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(result[numbers], expected[numbers])
    assert (result[~numbers] == 0x7FFF).all()
    assert_same(evaluate("cvt.f32.bf16 {y}, {0}", expected, out=F32), of_bf16(expected).float().numpy())


def test_pairs_are_packed_with_the_first_operand_on_top():
    high, low = near_one(F32), near_one(F32, 1)
    packed = evaluate("cvt.rn.bf16x2.f32 {y}, {0}, {1}", high, low, out=U32)
    np.testing.assert_array_equal(packed, bf16(high).astype(U32) << 16 | bf16(low))
    packed = evaluate("cvt.rn.f16x2.f32 {y}, {0}, {1}", high, low, out=U32).view(F16)
    assert_same(packed, np.stack([low, high], 1).astype(F16).ravel())


def test_tf32_rounds_ties_away_from_zero():
    x = np.array([0x3F801000, 0x3F800FFF, 0xBF801000, 0x7F800000], U32)
    expected = np.array([0x3F802000, 0x3F800000, 0xBF802000, 0x7F800000], U32)
    assert_same(evaluate("cvt.rna.tf32.f32 {y}, {0}", x, out=U32), expected)


COMPARISONS = {"eq": (0, 1, 0, 0), "ne": (1, 0, 1, 0), "lt": (1, 0, 0, 0), "le": (1, 1, 0, 0), "gt": (0, 0, 1, 0),
               "ge": (0, 1, 1, 0), "equ": (0, 1, 0, 1), "neu": (1, 0, 1, 1), "ltu": (1, 0, 0, 1), "leu": (1, 1, 0, 1),
               "gtu": (0, 0, 1, 1), "geu": (0, 1, 1, 1), "num": (1, 1, 1, 0), "nan": (0, 0, 0, 1)}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize(("type_", "dtype"), [("f32", F32), ("f64", F64), ("f16", F16)])
def test_comparisons_with_a_nan_are_false_and_unordered_ones_true(name, type_, dtype):
    """Less, equal, greater, not a number."""
    a, b = np.array([1, 2, 3, np.nan], dtype), np.array([2, 2, 2, 2], dtype)
    result = evaluate(f"setp.{name}.{type_} {{y}}, {{0}}, {{1}}", a, b, out=np.bool_)
    np.testing.assert_array_equal(result, np.array(COMPARISONS[name], bool))


def test_comparisons_of_pairs_have_two_results():
    a, b = bf16([1, 3, -2, 0]), bf16([2, 2, -2, 1])
    text = "setp.le.bf16x2 %p1|%p2, {0}, {1}; selp.b16 %h0, 1, 0, %p1; selp.b16 %h1, 1, 0, %p2; mov.b32 {y}, {%h0, %h1}"
    assert evaluate(text, a.view(U32), b.view(U32), out=U32).view(U16).tolist() == [1, 0, 1, 1]


def test_a_comparison_may_have_its_negation_as_a_second_result():
    text = "setp.lt.s32 %p1|%p2, {0}, 3; selp.b32 %r9, 1, 0, %p1; selp.b32 {y}, 2, %r9, %p2"
    assert evaluate(text, np.arange(5, dtype=S32), out=S32).tolist() == [1, 1, 1, 2, 2]
