"""What is particular to the covariances' Triton kernels: tiles, chunks and blocks of rows, precisions, the triangle."""

import pytest
import test_covariance
import torch
import triton
import triton.language as tl
from helpers import assert_close, assert_same_bits, make_features
from test_covariance import (  # noqa: F401
    BOUNDS,
    LAYOUTS,
    OPS,
    correlated,
    exact,
    relative_error,
    test_channels_last_gradients_have_the_strides_of_their_input,
    test_correction_and_second_moments,
    test_too_few_rows_give_nan,
)

import moment_ops as mo
from moment_ops.kernels import (
    _architectures,
    _covariance_plan,
    _launch,
    _tiles,
    covariance,
    covariance_backward,
    covariance_match,
)
from moment_ops.kernels._records import Shifts
from moment_ops.kernels._triangle import block_pair, packed_block
from moment_ops.ops import triangle
from moment_ops.ops.covariance import covariance_match_backward

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Up to a comma, names are kinds.
AVERAGES = {
    "none": [],
    "moving": [0.9, 0.0],
    "moving, corrected": [0.9, 1.0],
    "adam": [1e-2, 0.5, 0.999, 1e-8, 0.1],
}


@pytest.fixture
def plan(monkeypatch):
    """Sets names of the plan, for small shapes to be cut as large ones are."""

    def change(**values):
        for name, value in values.items():
            modules = (_architectures, _tiles, _covariance_plan, covariance, covariance_match, covariance_backward)
            named = [module for module in modules if hasattr(module, name)]
            assert named, f"no planner has {name}"
            for module in named:
                monkeypatch.setattr(module, name, value)
        _covariance_plan._groups.cache_clear()

    yield change
    _covariance_plan._groups.cache_clear()


@pytest.fixture(params=[80, 90, 100, "gfx90a", "gfx942"])
def architecture(request, plan):
    """Modes and tiles of every architecture."""
    plan(architecture_of=lambda device: request.param)
    return request.param


def triangle_groups(features, precision):
    """The plan of the interpreter's launches."""
    mode = _architectures.product_mode(precision, features[0].dtype, True, 0)
    tile = _tiles.forward_tile(mode, 0, len(features[0]), [x.shape[1] for x in features])
    return _covariance_plan.triangle_groups(features, tile, 0)


@triton.jit
def located(out, width, blocks, tiles, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    row, column = block_pair(index, blocks + index * 0)
    offset, stride = packed_block(width + index * 0, row, column)
    values = (row, column, offset, stride)
    for i in tl.static_range(4):
        tl.store(out + index * 4 + i, values[i].to(tl.int64), mask=index < tiles)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 256, 300, 640, 700, 1153])
def test_tiles_are_all_blocks_of_the_triangle_and_lie_where_it_says(width):
    blocks = triangle.blocks(width)
    tiles = blocks * (blocks + 1) // 2
    out = torch.zeros(tiles, 4, dtype=torch.int64)
    located[(1,)](out, width, blocks, tiles, SIZE=64)
    assert {(row, column) for row, column, *_ in out.tolist()} == {
        (i, j) for i in range(blocks) for j in range(i, blocks)
    }
    packed = torch.zeros(triangle.size(width))
    for row, column, offset, stride in out.tolist():
        block = triangle.diagonal(packed, width, row)
        if row != column:
            block = triangle.panel(packed, width, row)[:, (column - row - 1) * 128 :]
        assert (block.storage_offset(), block.stride(0)) == (offset, stride)


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(2, 1, 0), (3, 129, 0), (40, 300, 0), (2, 129, 1), (40, 300, 1), (40, 5, 2), (33, 130, 2)],
)
def test_it_is_the_covariance_of_the_same_numbers_in_float64(rows, width, dtype):
    test_covariance.test_it_is_the_covariance_of_the_same_numbers_in_float64(width, rows, DTYPES[dtype])


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [*((precision, torch.float32) for precision in BOUNDS), ("ieee", torch.bfloat16), ("ieee", torch.float16)],
)
def test_every_precision_on_every_architecture(architecture, precision, dtype):
    x = correlated(70, 150, 3.0).to(dtype)
    cov = mo.covariance(x, precision=precision)
    assert torch.equal(cov, cov.mT)
    error = relative_error(cov, exact(x))
    assert error <= BOUNDS[precision]
    if precision != "ieee" and dtype == torch.float32:
        mode = _architectures.product_mode(precision, dtype, True, architecture)
        assert error >= BOUNDS[mode] / 100, "the precision is not what its name says"


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_rows_are_folded_without_a_seam(dtype):
    x = make_features(1100, [(40,)], dtype)[0]
    (group,) = triangle_groups([x], "ieee")
    assert group.chunks == 9
    assert relative_error(mo.covariance(x), exact(x)) <= 1e-6


@pytest.mark.parametrize("chunk_rows", [1100, 640])
@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_blocks_of_rows_are_promoted_without_a_seam(plan, chunk_rows, precision):
    plan(PROMOTED_ROWS=256, _chunk_rows=lambda rows, tiles, slots: chunk_rows)
    x = make_features(1100, [(40,)])[0]
    (group,) = triangle_groups([x], precision)
    assert group.long
    assert relative_error(mo.covariance(x, precision=precision), exact(x)) <= BOUNDS[precision]


@pytest.mark.parametrize("ratio", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(3000, 8), (300, 130)])
def test_means_far_from_zero_cost_no_digits(shape, ratio):
    test_covariance.test_means_far_from_zero_cost_no_digits(shape, ratio)


def test_independent_columns_far_from_zero_cost_no_digits():
    test_covariance.test_independent_columns_far_from_zero_cost_no_digits((300, 300))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.7, 10.0, 60.0])
def test_features_of_16_bits_lose_nothing_on_tensor_cores(dtype, ratio):
    """Shifted by their means as they are, they would have more bits than two bfloat16 have, at 2e-6 and more."""
    x = (torch.randn(120, 130) * 3 + 3 * ratio * torch.randn(130).sign()).to(dtype)
    assert relative_error(mo.covariance(x), exact(x)) <= 3e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_shift_leaves_of_a_mean_is_an_eighth_of_the_deviation(dtype):
    x = (torch.randn(300, 200) * torch.logspace(-9, 3, 200) + torch.randn(200)).to(dtype)
    mean, shift, rest, scale = torch.empty(4, 200)
    for launch in covariance.shifts_launches([x], mean, Shifts(shift, rest, scale)):
        _launch.start([launch], x.device)
    exact_mean = x.double().mean(0)
    std = x.double().std(0, correction=0)
    assert (scale == 1).all()
    assert ((shift.double() + rest.double() - exact_mean).abs() <= 1e-12 * exact_mean.abs() + 1e-6 * std).all()
    assert (rest.double().abs() <= std / 8 + 1e-6 * exact_mean.abs()).all()


@pytest.mark.parametrize("rows", [2, 513])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_column_has_no_covariance(rows, dtype):
    test_covariance.test_a_constant_column_has_no_covariance(rows, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_spoils_its_row_and_column_alone(dtype, value):
    (x,) = make_features(40, [(150,)], dtype)
    clean = mo.covariance(x)
    x[7, 130] = value
    cov = mo.covariance(x)
    others = torch.arange(150) != 130
    assert_same_bits(cov[others][:, others], clean[others][:, others])
    assert not cov[130].isfinite().any()
    assert not cov[:, 130].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_nothing(layout):
    test_covariance.test_layouts_change_nothing(layout)


def test_columns_that_are_not_aligned_are_read_narrowly():
    storage = make_features(9, [(65,)])[0]
    x = storage[:, 1:]
    (group,) = triangle_groups([x], "ieee")
    assert group.vector == 1
    assert_same_bits(mo.covariance(x), mo.covariance(x.contiguous()))


def layers_of(rows, widths, dtype=torch.float32):
    return make_features(rows, [(width,) for width in widths], dtype)


def symmetric_matrices(widths, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(width, width, generator=generator, dtype=torch.float64) for width in widths]
    return [(m + m.mT).to(dtype) for m in matrices]


def new_state(average_kind, widths, dtype):
    if average_kind == "none":
        return []

    def packed(seed, function=lambda m: m):
        return torch.cat([triangle.pack(function(m)) for m in symmetric_matrices(widths, seed)]).to(dtype)

    step = torch.tensor(3)
    if average_kind.startswith("moving"):
        return [packed(5), packed(6) > 0, step]
    return [packed(5), packed(6), packed(7, torch.Tensor.abs), step]


def match(features, average_kind, dtype, update=True, keep=True, precision="ieee", full=(0,)):
    """(loss, mean, grad, state) of `covariance_match_`, with the target of some layers full, of others packed."""
    widths = [x.shape[1] for x in features]
    targets = symmetric_matrices(widths, 4, dtype)
    targets = [t if i in full else triangle.pack(t) for i, t in enumerate(targets)]
    state = new_state(average_kind, widths, dtype)
    weights = [0.5 + i for i in range(len(features))]
    kind, options = average_kind.partition(",")[0], AVERAGES[average_kind]
    results = OPS.covariance_match_(features, 1, targets, weights, kind, options, state, update, keep, precision)
    return [*results, *state]


def expected_match(features, average_kind, **options):
    """In float64, by plain PyTorch."""
    with mo.backend("reference"):
        return match([x.double() for x in features], average_kind, torch.float64, **options)


def assert_matched(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        if ours.is_floating_point() and ours.numel():
            assert_close(ours, theirs, rows=100)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize(("update", "keep"), [(True, True), (False, True), (True, False)])
def test_loss_derivative_and_state_of_several_layers(average_kind, update, keep):
    features = layers_of(20, (130, 7))
    got = match(features, average_kind, torch.float32, update, keep)
    assert_matched(got, expected_match(features, average_kind, update=update, keep=keep))


@pytest.mark.parametrize("average_kind", ["none", "adam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_features_are_matched_in_float32(average_kind, dtype):
    features = layers_of(40, (130, 8), dtype)
    assert_matched(match(features, average_kind, torch.float32), expected_match(features, average_kind))


@pytest.mark.parametrize("average_kind", ["none", "adam"])
def test_chunks_of_rows_are_matched_once(average_kind):
    features = layers_of(300, (40, 70))
    assert_matched(
        match(features, average_kind, torch.float32, full=(1,)), expected_match(features, average_kind, full=(1,))
    )


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_a_loss_over_several_launches_is_one_loss(plan, average_kind):
    plan(most_layers=lambda architecture: 2)
    features = layers_of(9, [8, 16, 24, 3])
    groups = triangle_groups(features, "ieee")
    assert len(groups) == 3
    assert_matched(match(features, average_kind, torch.float32), expected_match(features, average_kind))


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_tiles_of_every_architecture_are_matched(architecture, average_kind):
    features = layers_of(20, (150,), torch.bfloat16)
    assert_matched(match(features, average_kind, torch.float32), expected_match(features, average_kind))


@pytest.mark.parametrize("average_kind", ["moving", "adam"])
def test_an_entry_that_is_not_finite_leaves_its_state_untouched(average_kind):
    features = layers_of(20, (150,))
    features[0][3, 140] = float("nan")
    before = new_state(average_kind, [150], torch.float32)
    got = match(features, average_kind, torch.float32)
    assert got[0].isnan()
    spoiled = torch.zeros(150, 150)
    spoiled[140] = spoiled[:, 140] = 1
    spoiled = triangle.pack(spoiled) != 0
    for new, old in zip(got[3:-1], before[:-1], strict=True):
        assert torch.equal(new[spoiled], old[spoiled])
        assert average_kind == "moving" or not torch.equal(new[~spoiled], old[~spoiled])


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("rows", [33, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_of_packed_matrices(plan, dtype, rows, few):
    plan(processors=lambda architecture: few)
    features = layers_of(rows, (150, 5), dtype)
    matrices = symmetric_matrices((150, 5), 8, torch.float32)
    grad = torch.cat([triangle.pack(m) for m in matrices])
    mean = torch.cat([x.double().mean(0) for x in features]).float()
    grad_mean = torch.randn(155)
    got = covariance_match_backward(
        features, mean, grad, grad_mean, scale=torch.tensor(-1.5), correction=1, precision="ieee"
    )
    for dx, x, m, g, c in zip(got, features, mean.split([150, 5]), grad_mean.split([150, 5]), matrices, strict=True):
        assert dx.dtype == dtype
        expected = g.double() / rows - 3 / (rows - 1) * (x.double() - m.double()) @ c.double()
        assert_close(dx, expected, rows=150)


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_backward_in_every_precision(architecture, precision):
    x = make_features(70, [(200,)])[0]
    grad, mean = torch.randn(200, 200), x.mean(0)
    dx = OPS.covariance_backward(grad, None, x, mean, 1, True, precision)
    wide = grad.double() + grad.double().mT
    expected = (x.double() - mean.double()) @ wide / 69
    error = relative_error(dx, expected)
    assert error <= BOUNDS[precision]
    mode = _architectures.gradient_mode(precision, torch.float32, architecture)
    assert mode == "ieee" or error >= BOUNDS[mode] / 100


@pytest.mark.parametrize("parts", ["grad", "mean", "both", "none"])
@pytest.mark.parametrize("centered", [True, False])
def test_the_backward_of_a_full_matrix(parts, centered):
    x = make_features(11, [(7, 20)])[0].flatten(1)
    grad = torch.randn(140, 140) if parts in ("grad", "both") else None
    grad_mean = torch.randn(140) if parts in ("mean", "both") else None
    mean = x.mean(0)
    got = OPS.covariance_backward(grad, grad_mean, x, mean, 1, centered, "ieee")
    with mo.backend("reference"):
        wide = [None if t is None else t.double() for t in (grad, grad_mean, x, mean)]
        assert_close(got, OPS.covariance_backward(*wide, 1, centered, "ieee"), rows=140)


def test_the_loss_and_its_gradients_through_the_public_surface():
    x = make_features(33, [(140,)])[0]
    target = torch.eye(140)
    layer = x.clone().requires_grad_()
    loss = mo.covariance_loss(layer, target)
    (dx,) = torch.autograd.grad(loss, layer)
    wide = x.double().requires_grad_()
    with mo.backend("reference"):
        expected = mo.covariance_loss(wide, target.double())
        (gradient,) = torch.autograd.grad(expected, wide)
    assert_close(loss, expected, rows=140)
    assert_close(dx, gradient, rows=140)


def test_a_second_run_gives_the_same_bits():
    features = layers_of(300, (40, 8))
    assert_same_bits(match(features, "adam", torch.float32), match(features, "adam", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 2)])
def test_operators_keep_the_contract_of_torch(dtype, shape):
    test_covariance.test_operators_keep_the_contract_of_torch(dtype, shape, True)


@pytest.mark.parametrize("average_kind", ["none", "adam"])
def test_the_matching_operator_keeps_the_contract_of_torch(average_kind):
    test_covariance.test_the_matching_operator_keeps_the_contract_of_torch(average_kind, True, average_kind == "adam")


def test_a_list_of_layers_is_two_launches_forward_and_one_backward(monkeypatch):
    launches = []
    run = _launch.start
    monkeypatch.setattr(_launch, "start", lambda calls, device: launches.append(len(calls)) or run(calls, device))
    features = layers_of(9, (16, 8, 24))
    _, mean, grad, *_ = match(features, "none", torch.float32)
    covariance_match_backward(features, mean, grad, None, scale=None, correction=1, precision="ieee")
    assert launches == [2, 1]


def test_float64_runs_elsewhere():
    with mo.backend("triton"), pytest.raises(RuntimeError, match="float64"):
        mo.covariance(torch.randn(4, 3, dtype=torch.float64))
