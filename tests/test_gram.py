"""`gram` and its backward: products of rows, against float64, and what the operators promise."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close, assert_same_bits, epsilon, leaves, make_features, statistics_dtype

import moment_ops as mo
from moment_ops.ops import backends, extension
from moment_ops.ops.gram import gram

OPS = torch.ops.moment_ops
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One panel with and without padding, one column, several panels, more rows than a block.
CASES = {
    "small": ((3, 2), (5, 8)),
    "one column": ((3, 2), (1,)),
    "one group": ((4,), (7, 1030)),
    "three groups": ((5, 1, 2), (3, 2049)),
    "several panels": ((2, 3), (40_000,)),
    "several blocks": ((70, 80), (300,)),
}


def make_groups(case, dtype=torch.float32):
    counts, widths = CASES[case]
    groups = [make_features(n, [(w,) for w in widths], dtype, seed) for seed, n in enumerate(counts)]
    # A shift for every group; the operator takes its own for each.
    shift = [[x[0].to(statistics_dtype(dtype)) for x in features] for features in groups]
    return groups, shift


def flat(nested):
    return [x for features in nested for x in features]


def exact_gram(groups, shift):
    shifted = [
        torch.cat([x.double() - less.double() for x, less in zip(layer, of_layer, strict=True)])
        for layer, of_layer in zip(zip(*groups, strict=True), zip(*shift, strict=True), strict=True)
    ]
    return torch.stack([z @ z.mT for z in shifted])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_products_of_all_rows_less_the_shift(case, dtype):
    groups, shift = make_groups(case, dtype)
    actual = gram(groups, shift)
    assert actual.dtype == torch.float64
    assert torch.equal(actual, actual.mT)
    exact = exact_gram(groups, shift)
    # Every sum is over at most 1,024 products in the statistics' dtype; then the panels are added in float64.
    for layer, expected in zip(actual, exact, strict=True):
        bound = 32 * epsilon(statistics_dtype(dtype)) * expected.diagonal().max()
        assert (layer - expected).abs().max() <= bound


@pytest.mark.usefixtures("backend")
def test_sums_of_more_columns_than_one_product_has_are_in_float64():
    """Integers whose products fill float32 in 1,024 columns, and overflow its digits in more."""
    x = torch.randint(0, 128, (3, 40_000)).float()
    exact = (x.double() @ x.double().mT)[None]
    assert exact.max() > 10 * 2**24
    assert torch.equal(gram([[x]], [[torch.zeros(40_000)]]), exact)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_products(case, dtype):
    groups, shift = make_groups(case, dtype)
    wide = [leaves([x.double() for x in features]) for features in groups]
    groups = [leaves(features) for features in groups]
    rows = [x for features in groups for x in features]
    exact = exact_gram(wide, shift)
    weight = torch.randn_like(exact)
    expected = torch.autograd.grad((exact * weight).sum(), [x for features in wide for x in features])
    actual = torch.autograd.grad((gram(groups, shift) * weight).sum(), rows)
    for x, ours, theirs in zip(rows, actual, expected, strict=True):
        assert ours.stride() == x.stride()
        assert ours.dtype == dtype
        assert_close(ours, theirs, rows=exact.shape[-1])


@pytest.mark.usefixtures("backend")
def test_only_the_rows_that_want_gradients_get_them():
    groups, shift = make_groups("three groups")
    groups[0][1].requires_grad_()
    groups[2][0].requires_grad_()
    both = [groups[0][1], groups[2][0]]
    exact = exact_gram(groups, shift)
    expected = torch.autograd.grad(exact.square().sum(), both)
    for ours, theirs in zip(torch.autograd.grad(gram(groups, shift).square().sum(), both), expected, strict=True):
        assert_close(ours, theirs, rows=10)
    wanted = [False, True, False, False, True, False]
    rows = [x.detach() for features in groups for x in features]
    assert len(OPS.gram_backward(torch.ones_like(exact), rows, flat(shift), wanted)) == 2


LAYOUTS = {
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns outermost": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    groups, shift = make_groups("several panels")
    groups = [[LAYOUTS[layout](x) for x in features] for features in groups]
    dense = [[x.contiguous() for x in features] for features in groups]
    assert_same_bits(gram(groups, shift), gram(dense, shift))
    total = sum(len(features[0]) for features in groups)
    grad = torch.randn(1, total, total, dtype=torch.float64)
    rows, dense_rows = ([x for features in g for x in features] for g in (groups, dense))
    wanted = [True] * len(rows)
    assert_same_bits(
        [g.contiguous() for g in OPS.gram_backward(grad, rows, flat(shift), wanted)],
        OPS.gram_backward(grad, dense_rows, flat(shift), wanted),
    )


@pytest.mark.usefixtures("backend")
def test_twice_differentiable():
    groups = [[x.double().requires_grad_() for x in make_features(n, ((3,), (2,)))] for n in (3, 2)]
    shift = [[torch.randn(3).double(), torch.randn(2).double()] for _ in groups]
    rows = [x for features in groups for x in features]

    def function(*rows):
        return gram([rows[:2], rows[2:]], shift)

    assert torch.autograd.gradcheck(function, rows)
    assert torch.autograd.gradgradcheck(function, rows)
    # Gradients of the gradient, where one side is a constant.
    constant = [x.detach() for x in rows[2:]]
    assert torch.autograd.gradgradcheck(lambda *x: gram([x, constant], shift), rows[:2])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("wants_gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_keep_the_contract_of_torch(wants_gradient, dtype):
    groups, shift = make_groups("small", dtype)
    rows = [x.requires_grad_(wants_gradient) for features in groups for x in features]
    torch.library.opcheck(OPS.gram.default, (rows, flat(shift), 2))
    grad = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=wants_gradient)
    for wanted in ([True] * 4, [True, False, False, True], [False] * 4):
        torch.library.opcheck(OPS.gram_backward.default, (grad, rows, flat(shift), wanted))


def test_lower_precision_of_matrix_products_does_not_reach_them():
    groups, shift = make_groups("several panels")
    rows = [x for features in groups for x in features]
    grad = torch.randn(1, 5, 5, dtype=torch.float64)

    def results():
        return [gram(groups, shift), *OPS.gram_backward(grad, rows, flat(shift), [True] * 2)]

    expected = results()
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        setting = torch.backends.mkldnn.matmul.fp32_precision
        assert_same_bits(results(), expected)
        assert torch.backends.mkldnn.matmul.fp32_precision == setting
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(results(), expected)
    finally:
        torch.set_float32_matmul_precision(previous)


def digest() -> str:
    """Of results of every size at which the library of matrix products is known to change its mind."""
    sums = hashlib.sha256()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for rows in (*range(1, 36), 48, 63, 65, 100, 128, 130, 257):
            for width in (1, 30, 511, 1024, 1500, 5000) if rows < 40 else (700, 3000):
                first, second = make_features(rows, [(width,)], dtype), make_features(rows // 2, [(width,)], dtype, 1)
                shift = [[first[0][0].to(statistics_dtype(dtype))]] * 2
                matrix = gram([first, second], shift)
                grads = OPS.gram_backward(matrix, first + second, flat(shift), [True, True])
                for result in (matrix, *grads):
                    sums.update(result.double().numpy().tobytes())
    return sums.hexdigest()


def test_the_same_bits_with_one_thread_and_with_two():
    results = set()
    for threads in (1, 2):
        code = f"import torch; torch.set_num_threads({threads}); import test_gram; print(test_gram.digest())"
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        results.add(
            subprocess.run(
                [sys.executable, "-c", code],
                cwd=Path(__file__).parent,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    assert len(results) == 1


def test_the_cpu_needs_no_extension(monkeypatch):
    groups, shift = make_groups("small")
    monkeypatch.setattr(extension, "_reason", "the C++ extension is not built")
    assert backends.select("gram", groups[0][0]) == "cpu"
    with mo.backend("cpu"):
        actual = gram(groups, shift)
    with mo.backend("reference"):
        assert not torch.equal(actual, gram(groups, shift))
