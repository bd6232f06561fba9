"""What is particular to the Gram matrices' Triton kernels: tiles over several tensors, chunks, blocks, launches."""

import pytest
import test_gram
import torch
from helpers import assert_close, assert_same_bits, epsilon, make_features
from test_gram import LAYOUTS, OPS, exact_gram, flat

import moment_ops as mo
from moment_ops.kernels import _gram_plan, _launch
from moment_ops.kernels import gram as kernels
from moment_ops.kernels._tiles import gram_tile
from moment_ops.ops.gram import gram

pytestmark = pytest.mark.usefixtures("backend")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# One row of tiles and several, groups that share a tile and groups that end in one, tails of columns.
CASES = [("small", F32), ("small", F16), ("one column", BF16), ("one group", F32), ("three groups", BF16),
         ("several blocks", F32)]  # fmt: skip


@pytest.fixture
def plan(monkeypatch):
    """Sets names of the plan, for small shapes to be cut as large ones are."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(_gram_plan, name, value)
        _gram_plan._batches.cache_clear()

    yield change
    _gram_plan._batches.cache_clear()


def make_groups(counts, widths, dtype=F32):
    groups = [make_features(n, [(w,) for w in widths], dtype, seed) for seed, n in enumerate(counts)]
    return groups, [[x[0].float() for x in features] for features in groups]


def assert_products(actual, groups, shift):
    assert torch.equal(actual, actual.mT)
    for layer, expected in zip(actual, exact_gram(groups, shift), strict=True):
        assert (layer - expected).abs().max() <= 32 * epsilon(F32) * expected.diagonal().max()


def assert_gradients(groups, shift):
    """The backward of all rows, for a random gradient that is not symmetric."""
    features, total = len(groups[0]), sum(len(x[0]) for x in groups)
    grad = torch.randn(features, total, total, dtype=torch.float64)
    rows = flat(groups)
    got = OPS.gram_backward(grad, rows, flat(shift), [True] * len(rows))
    for i in range(features):
        z = torch.cat([g[i].double() - s[i].double() for g, s in zip(groups, shift, strict=True)])
        expected = (grad[i] + grad[i].mT) @ z
        for x, dx, part in zip(
            rows[i::features], got[i::features], expected.split([len(g[i]) for g in groups]), strict=True
        ):
            assert dx.dtype == x.dtype
            assert_close(dx, part, rows=total)


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_products_of_all_rows_less_the_shift(case, dtype):
    test_gram.test_products_of_all_rows_less_the_shift(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_gradients_of_products(case, dtype):
    test_gram.test_gradients_of_products(case, dtype)


@pytest.mark.parametrize("programs", [1, 2, 528])
def test_sums_of_more_columns_than_a_block_are_in_float64(plan, programs):
    """Integers whose products fill float32 in 1,024 columns; in one chunk of blocks, in two chunks, in many."""
    plan(_PROGRAMS=programs)
    x = torch.randint(0, 128, (3, 5001)).float()
    exact = (x.double() @ x.double().mT)[None]
    assert exact.max() > 24e6
    assert torch.equal(gram([[x]], [[torch.zeros(5001)]]), exact)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_chunks_of_several_tiles_are_folded_where_they_belong(plan, dtype):
    plan(PROMOTED_COLUMNS=64, _PROGRAMS=24)
    groups, shift = make_groups((70, 80), (304, 64), dtype)
    batches = _gram_plan.triangle_batches(flat(groups), flat(shift), 2, gram_tile("ieee", 0), 0)
    assert {batch.chunk_blocks for batch in batches} == {2}
    assert_products(gram(groups, shift), groups, shift)


def test_products_below_the_diagonal_of_a_tile_are_not_used():
    """On GPUs they may have other bits."""
    rows, out = make_features(70, [(5,)])[0], torch.empty(1, 70, 70, dtype=torch.float64)
    _, sums = launches = kernels.gram_launches([rows], [rows[0]], 1, out, 0)
    assert [launch.programs for launch in launches] == [3, 12]
    tiles = sums.arguments["partials"].normal_().view(3, 64, 64)
    _launch.start([sums], out.device)
    expected = torch.cat([torch.cat([tiles[0], tiles[1]], 1), torch.cat([tiles[1].mT, tiles[2]], 1)])[:70, :70]
    upper = expected.triu()
    assert torch.equal(out[0], upper + upper.triu(1).mT)


def test_layers_of_several_launches(plan):
    """Two layers a launch; one of the layers has columns that are no multiple of 128 bits."""
    plan(most_layers=lambda architecture: 4)
    groups, shift = make_groups((3, 2), (8, 5, 16, 24))
    batches = _gram_plan.triangle_batches(flat(groups), flat(shift), 4, gram_tile("ieee", 0), 0)
    assert sorted(batch.layers for batch in batches) == [(0, 2), (1,), (3,)]
    assert_products(gram(groups, shift), groups, shift)
    assert_gradients(groups, shift)


def test_a_list_of_layers_is_two_launches_forward_and_one_backward(monkeypatch):
    launches = []
    run = _launch.start
    monkeypatch.setattr(_launch, "start", lambda calls, device: launches.append(len(calls)) or run(calls, device))
    groups, shift = make_groups((3, 2), (8, 16, 24))
    gram(groups, shift)
    assert_gradients(groups, shift)
    assert launches == [2, 1]


@pytest.mark.parametrize("dtypes", [(F32,), (F32, BF16)], ids=str)
def test_groups_that_are_too_many_or_differ_in_dtype_are_joined(dtypes):
    counts = (2, 1, 3, 2, 1, 1, 2, 1, 1) if len(dtypes) == 1 else (3, 2)
    groups, shift = make_groups(counts, (20, 7))
    groups[1] = [x.to(dtypes[-1]) for x in groups[1]]
    assert_products(gram(groups, shift), groups, shift)
    assert_gradients(groups, shift)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    groups, shift = make_groups((5, 3), (72,))
    groups = [[LAYOUTS[layout](x) for x in features] for features in groups]
    dense = [[x.contiguous() for x in features] for features in groups]
    assert_same_bits(gram(groups, shift), gram(dense, shift))
    grad = torch.randn(1, 8, 8, dtype=torch.float64)
    expected = OPS.gram_backward(grad, flat(dense), flat(shift), [True] * 2)
    actual = OPS.gram_backward(grad, flat(groups), flat(shift), [True] * 2)
    for x, ours, theirs in zip(flat(groups), actual, expected, strict=True):
        assert ours.stride() == torch.empty_like(x).stride()
        assert_same_bits(ours.contiguous(), theirs)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_shift_of_any_float32_costs_no_digits(dtype):
    groups, _ = make_groups((4, 3), (130,), dtype)
    shift = [[torch.randn(130)] for _ in groups]
    assert_products(gram(groups, shift), groups, shift)
    assert_gradients(groups, shift)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_value_that_is_not_finite_spoils_its_row_alone(dtype, value):
    groups, shift = make_groups((3, 70), (40,), dtype)
    clean = gram(groups, shift)[0]
    groups[1][0][66, 7] = value
    actual = gram(groups, shift)[0]
    others = torch.arange(73) != 69
    assert_same_bits(actual[others][:, others], clean[others][:, others])
    assert not actual[69].isfinite().any()
    assert not actual[:, 69].isfinite().any()


def test_tiles_of_which_nothing_is_wanted_write_nothing():
    groups, shift = make_groups((130, 2), (40,))
    grad = torch.randn(1, 132, 132, dtype=torch.float64)
    every = OPS.gram_backward(grad, flat(groups), flat(shift), [True, True])
    for wanted in ([True, False], [False, True]):
        (part,) = OPS.gram_backward(grad, flat(groups), flat(shift), wanted)
        assert_same_bits(part, every[wanted.index(True)])


def test_only_the_rows_that_want_gradients_get_them():
    groups, shift = make_groups((5, 1, 2), (3, 20))
    grad = torch.randn(2, 8, 8, dtype=torch.float64)
    every = OPS.gram_backward(grad, flat(groups), flat(shift), [True] * 6)
    wanted = [False, True, False, False, True, False]
    assert_same_bits(OPS.gram_backward(grad, flat(groups), flat(shift), wanted), [every[1], every[4]])
    assert OPS.gram_backward(grad, flat(groups), flat(shift), [False] * 6) == []


def test_a_second_run_gives_the_same_bits(plan):
    plan(PROMOTED_COLUMNS=64)
    groups, shift = make_groups((60, 10), (300,))
    assert_same_bits(gram(groups, shift), gram(groups, shift))


def test_maps_of_samples_through_the_public_surface():
    maps = torch.randn(3, 5, 4, 6).bfloat16().requires_grad_()
    wide = maps.detach().double().requires_grad_()
    actual, flattened = mo.gram_matrix(maps), wide.flatten(2)
    expected = flattened @ flattened.mT
    assert_close(actual, expected, rows=24)
    weight = torch.randn_like(expected)
    (ours,) = torch.autograd.grad((actual * weight).sum(), maps)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), wide)
    assert_close(ours, theirs, rows=24)


def test_operators_keep_the_contract_of_torch():
    test_gram.test_operators_keep_the_contract_of_torch(True, F32)


def test_float64_runs_elsewhere():
    groups, shift = make_groups((3, 2), (4,))
    groups = [[x.double() for x in features] for features in groups]
    with mo.backend("triton"), pytest.raises(RuntimeError, match="float64"):
        gram(groups, shift)
