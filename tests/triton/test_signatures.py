"""Calls that differ in numbers alone are compiled once: in batch size, decay, learning rate and weights."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from specs.resources import specialization

from moment_ops.kernels import covariance, covariance_backward, covariance_match, gram, match, moments, relu_moments
from moment_ops.ops import triangle
from moment_ops.ops.averages import AVERAGES
from moment_ops.ops.records import CovarianceMatch, Match

BATCHES = (1, 64, 65)
# So many that programs take the same tiles, however many rows there are.
COLUMNS = 1 << 20
WIDTH = 4096
OPTIONS = {
    "none": [[]],
    "moving": [[0.0, 0.0], [0.5, 1.0], [0.9, 0.0], [1.0, 1.0], [-2.0, 64.0]],
    "adam": [[1e-3, 0.5, 0.999, 1e-8, 0.05], [1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 0.9, 0.5, 1e-4, 64.0]],
}
SCALES = (0.0, 1.0, 0.7, 64.0)
AVERAGED = [(average_kind, var) for average_kind in AVERAGES for var in (True, False)]


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def state_of(average_kind, columns, quantities):
    kind = AVERAGES[average_kind]
    state = [empty(columns) for _ in range(quantities * len(kind.vectors))]
    if kind.has_started:
        state.append(empty(columns, dtype=torch.bool))
    return [*state, empty(dtype=torch.int64)] if state else []


def assert_compiled_once(calls):
    """calls: lists of launches."""
    first, *others = [[specialization(launch, 90) for launch in call] for call in calls]
    assert others
    for other in others:
        assert str(other) == str(first)


def matches(average_kind, var):
    """Matches of all options and scales."""
    for options in OPTIONS[average_kind]:
        for scale in SCALES:
            state = state_of(average_kind, COLUMNS, 1 + var)
            target_var = empty(COLUMNS) if var else None
            scales = scale, 1 - scale, None, target_var, scale / 3
            yield Match(empty(COLUMNS), target_var, *scales, average_kind, options, state, bool(state))


@pytest.mark.parametrize(("average_kind", "var"), AVERAGED)
def test_a_match_of_moments(average_kind, var):
    mean = empty(COLUMNS)
    grads = [mean, mean if var else None]
    given = mean if var else None
    assert_compiled_once(match.match_launches(mean, given, m, empty(), *grads) for m in matches(average_kind, var))


@pytest.mark.parametrize(("average_kind", "var"), AVERAGED)
def test_a_match_of_features(average_kind, var):
    mean = empty(COLUMNS)
    grads = [mean, mean if var else None]
    assert_compiled_once(
        match.match_features_launches([empty(rows, COLUMNS)], correction, m, empty(), mean, *grads)
        for rows, correction in zip(BATCHES, (0, 1, 0), strict=True)
        for m in matches(average_kind, var)
    )


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_a_match_of_covariances(average_kind):
    size = triangle.size(WIDTH)

    def call(rows, options, weight):
        state = state_of(average_kind, size, 1)
        m = CovarianceMatch([empty(size)], [weight], average_kind, options, state, bool(state), True)
        x, mean, grad = [empty(rows, WIDTH)], empty(WIDTH), empty(size)
        return covariance_match.covariance_match_launches(x, 0, m, empty(), mean, grad, 90)[-1:]

    assert_compiled_once(
        call(rows, options, weight) for rows in BATCHES for options in OPTIONS[average_kind] for weight in SCALES
    )


def test_moments():
    mean = empty(COLUMNS)
    assert_compiled_once(moments.moments_launches([empty(rows, COLUMNS)], 0, mean, mean) for rows in BATCHES)


def test_shifts_of_covariances():
    mean = empty(COLUMNS)
    shifts = covariance.shifts_of(mean)
    assert_compiled_once(covariance.shifts_launches([empty(n, COLUMNS)], mean, shifts) for n in BATCHES)


def test_relu_moments():
    mean = empty(COLUMNS)
    assert_compiled_once(
        relu_moments.relu_moments_launches(x, None, 0, x, mean, mean) for x in (empty(n, COLUMNS) for n in BATCHES)
    )


def test_moments_backward():
    mean, count, scale = empty(COLUMNS), empty(1, dtype=torch.int64), empty()
    assert_compiled_once(
        moments.backward_launches([], mean, mean, [x], mean, count, 0, scale, [x])
        for x in (empty(rows, COLUMNS) for rows in BATCHES)
    )


def test_covariances_and_their_backward():
    cov, mean = empty(WIDTH, WIDTH), empty(WIDTH)
    batches = [empty(rows, WIDTH) for rows in BATCHES]
    assert_compiled_once(covariance.covariance_launches(x, 0, True, "ieee", cov, mean, 90)[-1:] for x in batches)
    assert_compiled_once(
        covariance_backward.backward_launches(cov, mean, [x], mean, None, 0, True, "ieee", [x], 90) for x in batches
    )


def test_gram_matrices_and_their_backward():
    def call(rows):
        groups = [empty(rows, WIDTH), empty(rows + 1, WIDTH)]
        shift = [empty(WIDTH), empty(WIDTH)]
        total = 2 * rows + 1
        factors = empty(1, total, -(-total // 4) * 4)
        return [
            *gram.gram_launches(groups, shift, 1, empty(1, total, total, dtype=torch.float64), 90),
            *gram.backward_launches(factors, groups, shift, [True, True], groups, 90),
        ]

    assert_compiled_once(call(rows) for rows in BATCHES)
