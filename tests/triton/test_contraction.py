"""No kernel compares, or subtracts, what is equal in an interpreter alone: fused, approximate or flushed on a GPU."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
import triton.language as tl
from emulated.contracted import arguments, launch
from emulator.hazards import hazards
from emulator.launcher import compiled
from emulator.parsing import parse
from emulator.snippets import kernel_of
from specs.catalogue import SPECS
from specs.resources import ARCHITECTURES

from moment_ops.kernels._launch import Launch

CASES = [(spec, architecture) for spec in SPECS for architecture in spec.architectures]


@pytest.mark.parametrize(
    ("spec", "architecture"), CASES, ids=[f"{spec.name}, sm_{architecture}" for spec, architecture in CASES]
)
def test_kernels_are_free_of_hazards(spec, architecture):
    found = hazards(compiled(spec.launch(), architecture).kernel)
    assert not found, "\n".join(map(str, found))


@triton.jit
def compare(x, y, out, SIZE: tl.constexpr, WHICH: tl.constexpr):
    lane = tl.arange(0, SIZE)
    a, b = tl.load(x + lane), tl.load(y + lane)
    if WHICH == "recomputed":
        product = tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=r,r,r", [a, b], tl.float32, True, 1)
        result = product + 1.0 == a * b + 1.0
    elif WHICH == "quotient":
        result = a / b == 3.0
    elif WHICH == "root":
        result = tl.sqrt(a) == b
    elif WHICH == "flushed root":
        result = tl.sqrt(a) == 0.0
    elif WHICH == "power":
        result = 1.0 - tl.exp2(a) > b
    elif WHICH == "quotient and zero":
        result = a / b == 0.0
    elif WHICH == "finite quotient":
        result = tl.abs(a / b) < float("inf")
    elif WHICH == "rounded root":
        result = tl.sqrt_rn(a) == b
    elif WHICH == "difference":
        result = a * b - b * a == 0.0
    elif WHICH == "number":
        result = a == a
    tl.store(out + lane, result.to(tl.int32))


def found_in(which, architecture):
    values = {"x": torch.ones(128), "y": torch.ones(128), "out": torch.zeros(128, dtype=torch.int32)}
    code = compiled(Launch(compare, 1, {**values, "SIZE": 128, "WHICH": which}, 4), architecture)
    return [hazard.kind for hazard in hazards(code.kernel)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_test_for_finite_values_by_their_difference_is_found(architecture):
    (hazard,) = hazards(compiled(launch(arguments()), architecture).kernel)
    assert hazard.kind == "a difference of equal values, fused"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("which", "kind"),
    [
        ("difference", "a difference of equal values, fused"),
        ("recomputed", "a comparison of equal values, rounded differently"),
        ("quotient", "a test for equality of what div.full.f32 returns"),
        ("root", "a test for equality of what sqrt.approx.ftz.f32 returns"),
        ("flushed root", "a test for equality of what sqrt.approx.ftz.f32 returns"),
        ("power", "1 - 2**x"),
    ],
)
def test_a_hazard_is_found(which, kind, architecture):
    assert found_in(which, architecture) == [kind]


@pytest.mark.parametrize("which", ["quotient and zero", "finite quotient", "rounded root", "number"])
def test_what_is_exact_is_no_hazard(which):
    assert found_in(which, 80) == []


SNIPPETS = {
    "neg.f32 %r9, %r3; fma.rn.f32 %r5, %r1, %r2, %r9;": True,
    "neg.f32 %r9, %r1; fma.rn.f32 %r5, %r2, %r9, %r3;": True,
    "mov.b32 %r9, %r3; neg.f32 %r8, %r9; fma.rn.f32 %r5, %r2, %r1, %r8;": True,
    "sub.f32 %r5, %r3, %r3;": True,
    "mul.f32 %r9, %r2, %r1; sub.f32 %r5, %r3, %r9;": True,
    "fma.rn.f32 %r8, %r1, %r2, %r4; add.f32 %r9, %r3, %r4; sub.f32 %r5, %r9, %r8;": True,
    "fma.rn.f32 %r8, %r1, %r2, %r4; add.f32 %r9, %r3, %r4; setp.eq.f32 %p1, %r9, %r8;": True,
    "neg.f32 %r9, %r3; fma.rn.f32 %r5, %r1, %r4, %r9;": False,
    "fma.rn.f32 %r5, %r1, %r2, %r3;": False,
    "sub.f32 %r5, %r4, %r4;": False,
    "setp.eq.f32 %p1, %r3, %r3;": False,
    "fma.rn.f32 %r8, %r1, %r2, %r4; add.f32 %r9, %r3, %r1; setp.eq.f32 %p1, %r9, %r8;": False,
}


@pytest.mark.parametrize("text", SNIPPETS)
def test_differences_are_found_in_any_order_and_through_moves_and_signs(text):
    """%r3 is %r1 * %r2; others are loaded."""
    loads = " ".join(f"ld.global.b32 %r{i}, [%d0];" for i in (1, 2, 4))
    body = f"{loads} mul.f32 %r3, %r1, %r2; {text}"
    assert bool(hazards(parse(kernel_of(body, 1)))) == SNIPPETS[text]
