"""What holds for moments of any features: order, splitting, shifts and scales."""

import pytest
import torch
from helpers import assert_moments, assert_same_bits, epsilon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moment_ops as mo

pytestmark = pytest.mark.usefixtures("backend")

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
rows = st.integers(2, 70)
shapes = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)


def draw(rows, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((rows, *shape), generator=generator) for shape in shapes]


def near(first, second, size):
    """Equal up to 32 roundings of numbers of the given size."""
    return bool(((first - second).abs() <= 32 * epsilon(first.dtype) * size).all())


@few
@given(rows, shapes, seeds)
def test_moments_of_any_shapes_are_exact(rows, shapes, seed):
    features = draw(rows, shapes, seed)
    m = mo.moments(features)
    assert m.shapes == tuple(shapes)
    assert_moments(m, features)


@few
@given(rows, shapes, seeds)
def test_the_order_of_rows_does_not_matter(rows, shapes, seed):
    features = draw(rows, shapes, seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    plain, permuted = mo.moments(features), mo.moments([x[order] for x in features])
    assert near(plain.mean, permuted.mean, plain.var.sqrt() + plain.mean.abs())
    assert near(plain.var, permuted.var, plain.var)


@few
@given(rows, shapes, seeds, st.data())
def test_parts_merge_to_the_whole(rows, shapes, seed, data):
    features = draw(rows, shapes, seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1), max_size=4)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    parts = [mo.moments(list(part)) for part in zip(*(x.split(sizes) for x in features), strict=True)]
    merged = mo.Moments.merge(*parts)
    assert_moments(merged, features)
    assert merged.count.tolist() == [rows] * len(shapes)


@few
@given(rows, shapes, seeds, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_exactly(rows, shapes, seed, exponent):
    features = draw(rows, shapes, seed)
    factor = 2.0**exponent
    plain, scaled = mo.moments(features), mo.moments([x * factor for x in features])
    assert_same_bits(scaled.mean, plain.mean * factor)
    assert_same_bits(scaled.var, plain.var * factor**2)


@few
@given(rows, shapes, seeds)
def test_a_change_of_sign_leaves_the_variance(rows, shapes, seed):
    features = draw(rows, shapes, seed)
    plain, negated = mo.moments(features), mo.moments([-x for x in features])
    assert_same_bits(negated.mean, -plain.mean)
    assert_same_bits(negated.var, plain.var)


@few
@given(rows, shapes, seeds, st.integers(-1000, 1000))
def test_a_shift_moves_the_mean_and_leaves_the_variance(rows, shapes, seed, shift):
    # Multiples of 2^-10 stay exact when shifted.
    features = [(x * 1024).round() / 1024 for x in draw(rows, shapes, seed)]
    plain, shifted = mo.moments(features), mo.moments([x + shift for x in features])
    assert near(shifted.mean, plain.mean + shift, plain.mean.abs() + plain.var.sqrt() + abs(shift))
    assert_same_bits(shifted.var, plain.var)


@few
@given(rows, shapes, seeds)
def test_a_batch_twice_has_the_same_mean_and_nearly_the_same_variance(rows, shapes, seed):
    features = draw(rows, shapes, seed)
    plain = mo.moments(features, correction=0)
    doubled = mo.moments([torch.cat([x, x]) for x in features], correction=0)
    assert near(plain.mean, doubled.mean, plain.mean.abs() + plain.var.sqrt())
    assert near(plain.var, doubled.var, plain.var)


@few
@given(rows, shapes, seeds)
def test_gradients_of_mean_and_variance_are_orthogonal_to_what_they_ignore(rows, shapes, seed):
    """The variance does not feel a shift of all rows: its gradient sums to zero over them; that of the mean to one."""
    features = [x.requires_grad_() for x in draw(rows, shapes, seed)]
    m = mo.moments(features)
    of_var = torch.autograd.grad(m.var.sum(), features, retain_graph=True)
    for g, x, (mean, _) in zip(of_var, features, m.layers(), strict=True):
        # The mean is rounded, and every row is multiplied by 2 / (rows - 1) after it is subtracted.
        rounding = 2 / (rows - 1) * mean.detach().abs()
        assert near(g.sum(0), torch.zeros_like(x[0]), rows * (g.abs().amax(0) + rounding))
    for g, x in zip(torch.autograd.grad(m.mean.sum(), features), features, strict=True):
        assert near(g.sum(0), torch.ones_like(x[0]), torch.ones_like(x[0]))


@few
@given(rows, shapes, seeds)
def test_a_loss_is_zero_at_its_target_and_positive_elsewhere(rows, shapes, seed):
    features = draw(rows, shapes, seed)
    m = mo.moments(features)
    assert mo.moment_loss(m, m).item() == 0
    assert mo.moment_loss([x + 1 for x in features], m).item() > 0
