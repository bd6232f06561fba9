"""Corrections of the bias, one function for the CPU kernels and for CUDA: their digits, and no steps at all."""

import math
from decimal import Decimal, getcontext

import host_kernels
import pytest
import torch

import moment_ops as mo
from moment_ops.ops.averages import moving_weights

COLUMNS = 12


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999, 0.9999])
def test_bias_corrections_keep_the_digits_of_a_double(module, beta):
    """1 - beta**step formed of a rounded power has lost four digits at beta = 0.9999 and step = 1."""
    getcontext().prec = 40
    for step in (1, 2, 3, 10, 100, 1000, 10**4, 10**6):
        exact = 1 - (Decimal(beta).ln() * step).exp()
        step_size, root = module.adam_step(1.0, beta, beta, step)
        assert abs(Decimal(1 / step_size) / exact - 1) <= 4 * Decimal(2) ** -53
        assert abs(Decimal(root) / exact.sqrt() - 1) <= 4 * Decimal(2) ** -53


def test_a_beta_of_zero_needs_no_correction(module):
    for step in (1, 2, 1000):
        assert module.adam_step(0.25, 0.0, 0.0, step) == (0.25, 1.0)


def in_python(decay, step):
    past, batch = moving_weights([decay, 1.0], torch.tensor(step))
    return past.item(), batch.item()


@pytest.mark.parametrize("where", ["csrc", "python"])
@pytest.mark.parametrize("decay", [1e-3, 0.5, 0.9, 0.999, 1 - 1e-9, 1 - 2.0**-53])
def test_weights_of_a_moving_average_keep_the_digits_of_a_double(module, decay, where):
    getcontext().prec = 60
    weights = module.moving_weights if where == "csrc" else in_python
    for step in (1, 2, 3, 10, 1000, 10**6):
        exact = (1 - Decimal(decay)) / (1 - (Decimal(decay).ln() * step).exp())
        past, batch = weights(decay, step)
        assert abs(Decimal(batch) / exact - 1) <= 4 * Decimal(2) ** -53
        assert abs(Decimal(past) - (1 - exact)) <= 4 * Decimal(2) ** -53


@pytest.mark.parametrize("where", ["csrc", "python"])
def test_without_decay_the_past_has_no_weight(module, where):
    weights = module.moving_weights if where == "csrc" else in_python
    assert [weights(0.0, step) for step in (1, 2, 1000)] == [(0.0, 1.0)] * 3


def match(backend, module, input, target, options, state, update):
    """(loss, grad_mean) of means alone."""
    targets, scales, weights = (target, None), (1.0, 1.0), (None, None)
    if backend == "cuda on the host":
        arguments = (targets, scales, weights, 1.0, "adam", options, state, update)
        loss, _, grad, _ = host_kernels.match_(module, input, None, None, *arguments)
        return loss, grad
    with mo.backend(backend):
        arguments = (target, None, *scales, *weights, 1.0, "adam", options, state, update)
        loss, _, grad, _ = torch.ops.moment_ops.match_.features(input, 1, *arguments)
        return loss, grad


@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda on the host"])
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.999), (0.5, 0.0), (0.5, 0.999)])
def test_before_any_step_an_average_is_used_as_it_is(backend, betas, module):
    """The corrections of step 0 are infinite or not a number; none of that reaches loss, gradient or state."""
    x, target, average = torch.randn(5, COLUMNS), torch.randn(COLUMNS), torch.rand(COLUMNS)
    state = [average.clone(), torch.zeros(COLUMNS), torch.zeros(COLUMNS), torch.zeros(1, dtype=torch.int64)]
    before = [s.clone() for s in state]
    loss, grad = match(backend, module, [x], target, [0.1, *betas, 1e-8, 2.0], state, update=False)
    assert math.isclose(loss.item(), (average.double() * (target.double() - x.double().mean(0))).sum(), abs_tol=1e-5)
    assert torch.equal(grad, -average)
    assert all(torch.equal(now, then) for now, then in zip(state, before, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda on the host"])
def test_betas_of_zero_make_steps_by_the_sign(backend, module):
    x, target = torch.randn(5, COLUMNS), torch.randn(COLUMNS)
    state = [*(torch.zeros(COLUMNS) for _ in range(3)), torch.zeros(1, dtype=torch.int64)]
    match(backend, module, [x], target, [0.1, 0.0, 0.0, 0.0, 2.0], state, update=True)
    assert torch.allclose(state[0], 0.1 * (target - x.mean(0)).sign(), rtol=1e-5)
    assert state[-1].item() == 1
