"""Matrices of warps and their products, against NumPy."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from test_emulator import F16, F32, F64, S16, S32, U16, U32, assert_same, bf16, of_bf16, rounded

from emulator import snippets
from emulator.execution import Schedule
from emulator.faults import Race

LANES = np.arange(32)


def matrix_product(a, b, c, types, inexact=False):
    """a (16, K) times b (8, K) transposed, plus c (16, 8), by one warp; operands are 32-bit words of K entries."""
    depth, per_word = a.shape[1], 4 // a.itemsize
    g, t = LANES // 4, LANES % 4
    columns = [t * per_word + 4 * per_word * half for half in range(2)]
    left = [pack(a, g + 8 * i, columns[half], per_word) for half in range(2) for i in range(2)]
    right = [pack(b, g, columns[half], per_word) for half in range(2)]
    added = [c[g + 8 * (i // 2), t * 2 + i % 2].view(U32) for i in range(4)]
    table = np.stack([*left, *right, *added], 1)  # (32, 10)
    inputs, outputs = torch.from_numpy(table.view(S32).copy()), torch.zeros(32, 4)
    loads = "\n".join(f"ld.global.b32 %r{10 + i}, [%d2 + {4 * i}];" for i in range(10))
    stores = "\n".join(f"st.global.b32 [%d3 + {4 * i}], %r{30 + i};" for i in range(4))
    name = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{types}.{types}.f32"
    body = f"""
      mad.wide.u32 %d2, %r0, 40, %d0;
      mad.wide.u32 %d3, %r0, 16, %d1;
      {loads}
      {name} {{%r30, %r31, %r32, %r33}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
      {stores}"""
    snippets.run(body, [inputs, outputs], schedule=Schedule(inexact=inexact))
    result = np.zeros((16, 8), F32)
    for i in range(4):
        result[g + 8 * (i // 2), t * 2 + i % 2] = outputs.numpy()[:, i]
    return result


def pack(matrix, rows, columns, per_word):
    """Words of neighbours in a row."""
    parts = [matrix[rows, columns + j] for j in range(per_word)]
    return np.ascontiguousarray(np.stack(parts, 1)).view(U32).ravel()


@pytest.mark.parametrize("types", ["tf32", "bf16", "f16"])
def test_products_of_matrices_are_those_of_their_operands_truncated_to_float32(types):
    generator = np.random.default_rng(0)
    depth = 8 if types == "tf32" else 16
    a, b = generator.normal(size=(16, depth)).astype(F32), generator.normal(size=(8, depth)).astype(F32)
    c = generator.normal(size=(16, 8)).astype(F32)
    if types == "tf32":
        # The hardware ignores what has no place in its operands.
        operands = [(x.view(U32) & U32(0xFFFFE000)).view(F32) for x in (a, b)]
        words = [a, b]
    elif types == "bf16":
        words = [bf16(x).reshape(x.shape) for x in (a, b)]
        operands = [of_bf16(x).float().numpy() for x in words]
    else:
        words = operands = [x.astype(F16) for x in (a, b)]
    exact = operands[0].astype(F64) @ operands[1].astype(F64).T + c
    expected = np.array([rounded(Fraction(float(x)), F32, "rz") for x in exact.ravel()], F32).reshape(16, 8)
    assert_same(matrix_product(*words, c, types), expected)
    least = matrix_product(*words, c, types, inexact=True)
    largest = np.maximum(np.abs(operands[0]).max() * np.abs(operands[1]).max(), np.abs(c).max())
    assert np.abs(least - expected).max() <= depth * 2.0**-23 * largest
    assert (least != expected).any()


def test_sums_of_tensor_cores_are_truncated():
    one = np.zeros((16, 16), F16)
    one[:, 0] = 1
    three_quarters = np.zeros((8, 16), F16)
    three_quarters[:, 0] = 0.75 * 2.0**-12
    c = np.full((16, 8), 2.0**11, F32)
    assert (matrix_product(one, three_quarters, c, "f16") == c).all()
    assert (matrix_product(one, three_quarters, -c, "f16") > -c).all()


def test_matrices_come_from_rows_in_shared_memory_and_go_back():
    """Four matrices of 8 x 8 halves; transposed by ldmatrix, and back by stmatrix."""
    entries = torch.arange(4 * 64, dtype=torch.int16)
    plain, transposed, back = (torch.zeros(4 * 64, dtype=torch.int16) for _ in range(3))
    stores = "\n".join(
        f"st.global.v4.b32 [%d{5 + i}], {{%r{20 + 10 * i}, %r{21 + 10 * i}, %r{22 + 10 * i}, %r{23 + 10 * i}}};"
        for i in range(2)
    )
    body = f"""
      mul.wide.u32 %d4, %r0, 16;
      add.s64 %d5, %d1, %d4;
      add.s64 %d6, %d2, %d4;
      add.s64 %d7, %d3, %d4;
      add.s64 %d4, %d0, %d4;
      ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d4];
      shl.b32 %r5, %r0, 4;
      mov.b32 %r6, data;
      add.s32 %r5, %r5, %r6;
      st.shared.v4.b32 [%r5], {{%r1, %r2, %r3, %r4}};
      ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r5];
      ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%r30, %r31, %r32, %r33}}, [%r5];
      {stores}
      stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r5 + 512], {{%r30, %r31, %r32, %r33}};
      ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r5 + 512];
      st.global.v4.b32 [%d7], {{%r1, %r2, %r3, %r4}};"""
    snippets.run(body, [entries, plain, transposed, back], shared=1024)
    matrices = entries.view(4, 8, 8)
    # A thread has two neighbours of a row, of every matrix.
    assert torch.equal(plain.view(32, 4, 2).permute(1, 0, 2).reshape(4, 8, 8), matrices)
    assert torch.equal(transposed.view(32, 4, 2).permute(1, 0, 2).reshape(4, 8, 8), matrices.mT)
    assert torch.equal(back, entries)


WARPGROUP = """
  mov.b32 %r1, data;
  {stores}
  bar.sync 0;
  {fence}
  cvt.u64.u32 %d4, %r1;
  shr.u64 %d4, %d4, 4;
  or.b64 %d4, %d4, {descriptor};
  wgmma.fence.sync.aligned;
  {before}
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
    {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}}, %d4, {scale}, 1, 1, 0;
  wgmma.commit_group.sync.aligned;
  {late}
  wgmma.wait_group.sync.aligned 0;
  mad.wide.u32 %d5, %r0, 16, %d2;
  st.global.v4.b32 [%d5], {{%r20, %r21, %r22, %r23}};"""


def warpgroup_product(a, b, scale="0", before="", late="", fence="fence.proxy.async.shared::cta;"):
    """a (64, 16) times b (8, 16) transposed: b lies in rows of 32 bytes, swizzled."""
    row, column = np.divmod(np.arange(128), 16)
    address = row * 32 + column * 2
    address ^= (address >> 7 & 1) << 4
    memory = np.zeros(128, U16)
    memory[address // 2] = b[row, column]
    g, t = LANES // 4, LANES % 4
    words = np.zeros((128, 4), U32)
    for warp in range(4):
        for half in range(2):
            for i in range(2):
                words[32 * warp + LANES, i + 2 * half] = pack(a, 16 * warp + g + 8 * i, 2 * t + 8 * half, 2)
    inputs = torch.from_numpy(words.view(S32).copy())
    stored, out = torch.from_numpy(memory.view(S16).copy()), torch.zeros(128, 4)
    stores = """
      mad.wide.u32 %d5, %r0, 16, %d0;
      ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d5];
      mad.wide.u32 %d5, %r0, 2, %d1;
      ld.global.b16 %h0, [%d5];
      shl.b32 %r2, %r0, 1;
      add.s32 %r2, %r2, %r1;
      st.shared.b16 [%r2], %h0;"""
    body = WARPGROUP.format(stores=stores, fence=fence, descriptor=3 << 62 | 16 << 32 | 1 << 16, before=before,
                            scale=scale, late=late)  # fmt: skip
    snippets.run(body, [inputs, stored, out], warps=4, shared=256)
    result = np.zeros((64, 8), F32)
    for warp in range(4):
        for i in range(4):
            result[16 * warp + g + 8 * (i // 2), 2 * t + i % 2] = out.numpy()[32 * warp + LANES, i]
    return result


def warpgroup_operands():
    generator = np.random.default_rng(0)
    a, b = (bf16(generator.normal(size=(n, 16)).astype(F32)).reshape(n, 16) for n in (64, 8))
    wide = [of_bf16(x).double() for x in (a, b)]
    return a, b, (wide[0] @ wide[1].T).numpy()


def test_products_of_four_warps_take_an_operand_from_swizzled_shared_memory():
    a, b, exact = warpgroup_operands()
    expected = np.array([rounded(Fraction(float(x)), F32, "rz") for x in exact.ravel()], F32).reshape(64, 8)
    assert_same(warpgroup_product(a, b), expected)


def test_products_of_four_warps_are_there_when_they_were_waited_for():
    a, b, exact = warpgroup_operands()
    zeros = " ".join(f"mov.b32 %r{20 + i}, 0;" for i in range(4))
    late = " ".join(f"mov.b32 %r{10 + i}, 0;" for i in range(4))
    set_ = "setp.eq.s32 %p1, 0, 0;"
    np.testing.assert_allclose(warpgroup_product(a, b, scale="%p1", before=set_ + zeros), exact, rtol=1e-5, atol=1e-6)
    # Operands that are overwritten before the wait are lost.
    assert (warpgroup_product(a, b, scale="%p1", before=set_ + zeros, late=late) == 0).all()


def test_products_of_four_warps_see_stores_behind_a_proxy_fence_alone():
    a, b, _ = warpgroup_operands()
    with pytest.raises(Race, match="asynchronous read"):
        warpgroup_product(a, b, fence="")
