"""The operators `moments` and `moments_backward`."""

import pytest
import torch
from helpers import (
    DTYPES,
    SHAPES,
    assert_close,
    assert_moments,
    assert_same_bits,
    exact_moments,
    make_features,
    mean_bound,
    mean_error,
    statistics_dtype,
    var_bound,
    var_error,
)

import moment_ops as mo
from moment_ops.ops.moments import moments, moments_backward

pytestmark = pytest.mark.usefixtures("backend")


def backward_in_float64(features, mean, count, grad_mean, grad_var, grad=None, dim=0, correction=1, scale=1.0):
    """`[grad +] scale * (grad_mean / N + 2 grad_var / (N - c) (x - mean))`, layer by layer."""
    outputs, offset = [], 0
    for i, x in enumerate(features):
        rows = x.double().movedim(dim, 0)
        shape, columns = rows.shape[1:], rows[0].numel()

        def packed(vector, offset=offset, columns=columns, shape=shape):
            return vector[offset : offset + columns].double().reshape(shape)

        dx = torch.zeros_like(rows)
        if grad_mean is not None:
            dx = dx + scale * packed(grad_mean) / int(count[i])
        if grad_var is not None:
            dx = dx + scale * 2 * packed(grad_var) / (int(count[i]) - correction) * (rows - packed(mean))
        dx = dx.movedim(0, dim)
        outputs.append(dx if grad is None else dx + grad[i].double())
        offset += columns
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 7, 8, 9, 17, 64, 511, 513, 1030])
def test_moments_of_many_layers_equal_those_in_float64(rows, dtype):
    features = make_features(rows, dtype=dtype)
    assert_moments(mo.moments(features), features)


@pytest.mark.parametrize("correction", [0, 1, 2, 5])
def test_the_correction_is_subtracted_from_the_rows(correction):
    features = make_features(9)
    m = mo.moments(features, correction=correction)
    assert m.correction == correction
    assert_moments(m, features, correction)


def test_columns_are_packed_layer_after_layer_in_row_major_order():
    features = [
        torch.arange(12.0).view(1, 3, 4).repeat(2, 1, 1),
        torch.arange(12.0, 17.0).view(1, 5).repeat(2, 1),
    ]
    assert mo.moments(features).mean.tolist() == list(range(17))


def test_a_layer_has_the_same_moments_alone_and_in_a_group():
    features = make_features(33)
    together = mo.moments(features)
    alone = [mo.moments(x) for x in features]
    assert_same_bits(together.mean, torch.cat([m.mean for m in alone]))
    assert_same_bits(together.var, torch.cat([m.var for m in alone]))


def test_every_layer_has_its_count():
    m = mo.moments(make_features(6))
    assert m.count.dtype == torch.int64
    assert m.count.tolist() == [6] * len(SHAPES)


def test_means_alone_are_the_means_with_variances():
    features = make_features(10)
    alone = mo.moments(features, var=False)
    assert alone.var is None
    assert_same_bits(alone.mean, mo.moments(features).mean)


@pytest.mark.parametrize("dim", [1, 2, -1, -2])
def test_another_dimension_can_be_reduced(dim):
    features = [torch.randn(4, 6, 6), torch.randn(2, 6, 6) + 3]
    m = mo.moments(features, dim=dim)
    mean, var = exact_moments(features, dim=dim)
    assert mean_error(m.mean, mean, var) <= mean_bound(torch.float32)
    assert var_error(m.var, var) <= var_bound(torch.float32)
    assert m.shapes == tuple(tuple(x.mean(dim).shape) for x in features)
    assert m.count.tolist() == [6, 6]


def test_the_last_dimension_of_layers_of_different_ranks_can_be_reduced():
    features = [torch.randn(3, 7), torch.randn(2, 4, 7)]
    mean, var = exact_moments(features, dim=-1)
    m = mo.moments(features, dim=-1)
    assert mean_error(m.mean, mean, var) <= mean_bound(torch.float32)
    assert m.shapes == ((3,), (2, 4))


@pytest.mark.parametrize("dim", [(0, 2, 3), (-1, 0, -2), (2, 3), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_dimensions_can_be_pooled(dim, dtype):
    x = make_features(6, [(3, 5, 4)], dtype)[0]
    m = mo.moments(x, dim=dim)
    mean, var = x.double().mean(dim), x.double().var(dim)
    assert m.shapes == (tuple(mean.shape),)
    assert m.count.tolist() == [x.numel() // mean.numel()]
    assert mean_error(m.mean, mean.reshape(-1), var.reshape(-1)) <= mean_bound(dtype)
    assert var_error(m.var, var.reshape(-1)) <= var_bound(dtype)


def test_channels_of_layers_of_different_sizes_can_be_pooled():
    features = [torch.randn(4, 3, 5, 5), torch.randn(4, 2, 2, 2)]
    m = mo.moments(features, dim=(0, 2, 3))
    assert m.count.tolist() == [100, 16]
    assert m.shapes == ((3,), (2,))
    expected = torch.cat([x.double().var((0, 2, 3)) for x in features])
    assert var_error(m.var, expected) <= var_bound(torch.float32)


def test_pooled_gradients_equal_those_of_torch():
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    m = mo.moments(x, dim=(0, 2, 3))
    ours = torch.autograd.grad((m.var * m.mean.exp()).sum(), x)[0]
    theirs = torch.autograd.grad((x.var((0, 2, 3)) * x.mean((0, 2, 3)).exp()).sum(), x)[0]
    assert_close(ours, theirs, rows=x.shape[0])


@pytest.mark.parametrize(("rows", "columns"), [(3, 16385), (2, 40000), (70001, 1), (5000, 33), (40000, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_and_tall_layers_are_cut_without_a_seam(rows, columns, dtype):
    features = [*make_features(rows, [(columns,)], dtype), *make_features(rows, [(2,)], dtype, seed=5)]
    assert_moments(mo.moments(features), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_exactly(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = values[values.isfinite()]
    assert torch.equal(mo.moments(finite[None]).mean, finite.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_rounded_to_the_nearest_16_bit_value(dtype):
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    halfway = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(dtype).float().view(torch.int32) + 0x1000
    scaled = torch.randn(100_000) * 2.0 ** torch.randint(-26, 17, (100_000,))
    values = torch.cat([bits.view(torch.float32), halfway.view(torch.float32), scaled])
    # Products with b = 0 turn infinite values into NaN in no implementation that matters: a alone is rounded.
    values = values[values.isfinite()]
    x = torch.zeros(1, values.numel(), dtype=dtype)
    count = torch.ones(1, dtype=torch.int64)
    (dx,) = moments_backward([x], torch.zeros_like(values), count, values, None)
    assert_same_bits(dx[0], values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ["mean", "var", "both"])
@pytest.mark.parametrize("added", [False, True])
def test_backward_is_grad_plus_a_plus_b_times_x_minus_mean(dtype, parts, added):
    features = make_features(7, dtype=dtype)
    mean, _, count = moments(features)
    grad_mean = torch.randn_like(mean) if parts != "var" else None
    grad_var = torch.randn_like(mean) if parts != "mean" else None
    grad = [torch.randn_like(x) for x in features] if added else None
    got = moments_backward(features, mean, count, grad_mean, grad_var, grad=grad or ())
    for dx, exact in zip(got, backward_in_float64(features, mean, count, grad_mean, grad_var, grad), strict=True):
        assert dx.dtype == dtype
        assert_close(dx, exact)


@pytest.mark.parametrize("dim", [1, -1])
def test_backward_over_another_dimension(dim):
    features = [torch.randn(4, 6, 6), torch.randn(2, 6, 6)]
    mean, _, count = moments(features, dim)
    grad_mean, grad_var = torch.randn_like(mean), torch.randn_like(mean)
    got = moments_backward(features, mean, count, grad_mean, grad_var, dim=dim)
    for dx, exact in zip(got, backward_in_float64(features, mean, count, grad_mean, grad_var, dim=dim), strict=True):
        assert_close(dx, exact)


def test_backward_takes_the_rows_of_the_statistic_from_count():
    features = make_features(5)
    mean, _, _ = moments(features)
    count = torch.tensor([50, 60, 70, 80])
    grad_mean, grad_var = torch.randn_like(mean), torch.randn_like(mean)
    got = moments_backward(features, mean, count, grad_mean, grad_var)
    for dx, exact in zip(got, backward_in_float64(features, mean, count, grad_mean, grad_var), strict=True):
        assert_close(dx, exact)


@pytest.mark.parametrize("correction", [0, 2])
def test_backward_scales_and_corrects(correction):
    features = make_features(5)
    mean, _, count = moments(features, correction=correction)
    grad_mean, grad_var, scale = torch.randn_like(mean), torch.randn_like(mean), torch.tensor(-2.5)
    got = moments_backward(features, mean, count, grad_mean, grad_var, correction=correction, scale=scale)
    exact = backward_in_float64(features, mean, count, grad_mean, grad_var, correction=correction, scale=-2.5)
    for dx, expected in zip(got, exact, strict=True):
        assert_close(dx, expected)


def test_backward_of_nothing_is_zero():
    features = make_features(3)
    mean, _, count = moments(features)
    assert all(not dx.any() for dx in moments_backward(features, mean, count, None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_of_large_layers_equals_that_of_small_ones(dtype):
    """Large gradients are written past the caches, in pieces."""
    rows, columns = 17, 800_003
    x = torch.randn(rows, columns).to(dtype)
    mean, _, count = moments([x])
    grad_mean, grad_var, grad = (
        torch.randn_like(mean),
        torch.randn_like(mean),
        torch.randn(rows, columns).to(dtype),
    )
    (whole,) = moments_backward([x], mean, count, grad_mean, grad_var, grad=[grad])
    for part in (slice(0, 9_001), slice(399_999, 412_345), slice(790_000, columns)):
        (piece,) = moments_backward(
            [x[:, part].contiguous()],
            mean[part].contiguous(),
            count,
            grad_mean[part].contiguous(),
            grad_var[part].contiguous(),
            grad=[grad[:, part].contiguous()],
        )
        assert_same_bits(whole[:, part], piece)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_reach_the_features_as_in_torch(dtype):
    features = [x.requires_grad_() for x in make_features(12, dtype=dtype)]
    columns = sum(x[0].numel() for x in features)
    weights = torch.randn(2, columns, dtype=statistics_dtype(dtype))
    m = mo.moments(features)
    ours = torch.autograd.grad((weights[0] * m.mean + weights[1] * m.var).sum(), features)
    mean, var = exact_moments(features)
    theirs = torch.autograd.grad((weights[0].double() * mean + weights[1].double() * var).sum(), features)
    for got, expected in zip(ours, theirs, strict=True):
        assert_close(got, expected, rows=12)


def test_the_features_are_left_as_they_are():
    features = make_features(6)
    before = [x.clone() for x in features]
    mean, _, count = moments(features)
    moments_backward(features, mean, count, mean, mean)
    assert_same_bits(features, before)
