"""The CUDA tap's own sources, compiled for the host: one pass, the plain network's output, exact moments of it."""

import host_kernels
import pytest
import torch
from helpers import DTYPES, epsilon, exact_moments, mean_bound, mean_error, statistics_dtype, var_bound, var_error


def features(shape, dtype, channels_last=False):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    x.view(-1)[:3] = torch.tensor([-0.0, float("inf"), 0.0], dtype=dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


SHAPES = {"small": (5, 3, 2, 2), "chunks": (1100, 4, 3, 2), "wide": (20, 16, 8, 8), "flat": (70, 9)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_output_is_relu_and_the_moments_are_of_it(module, shape, dtype, has_bias, channels_last):
    x = features(shape, dtype, channels_last and len(shape) == 4)
    bias = torch.randn(shape[1]).to(dtype) if has_bias else None
    y, mean, var = host_kernels.relu_moments(module, x, bias)
    before = x if bias is None else x + bias.view(-1, *[1] * (len(shape) - 2))
    assert torch.equal(y, torch.relu(before))
    assert y.stride() == x.stride()
    finite = torch.isfinite(mean)
    exact_mean, exact_var = exact_moments([y])
    assert finite.sum() >= mean.numel() - 1
    assert mean_error(mean[finite], exact_mean[finite], exact_var[finite]) <= mean_bound(dtype)
    assert var_error(var[finite], exact_var[finite]) <= var_bound(dtype)


def test_what_is_not_a_number_passes(module):
    x = torch.randn(6, 8)
    x[2, 3] = float("nan")
    y, mean, _ = host_kernels.relu_moments(module, x)
    assert torch.equal(y.isnan(), x.isnan())
    assert mean.isnan().sum() == 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["all", "moments", "gradient", "mean"])
def test_the_gradient_of_all_three_in_one_pass(module, shape, dtype, given):
    y = torch.relu(torch.randn(shape, dtype=torch.float64)).to(dtype)
    columns = y[0].numel()
    wide = statistics_dtype(dtype)
    mean = y.double().mean(0).flatten().to(wide)
    grad = torch.randn(shape).to(dtype) if given in ("all", "gradient") else None
    grad_mean = torch.randn(columns, dtype=wide) if given != "gradient" else None
    grad_var = torch.randn(columns, dtype=wide) if given in ("all", "moments") else None
    out = host_kernels.relu_moments_backward(module, y, mean, grad, grad_mean, grad_var)
    rows = y.double().reshape(shape[0], -1)
    expected = torch.zeros_like(rows) if grad is None else grad.double().reshape(shape[0], -1)
    if grad_mean is not None:
        expected = expected + grad_mean.double() / shape[0]
    if grad_var is not None:
        expected = expected + 2 * grad_var.double() / (shape[0] - 1) * (rows - mean.double())
    expected = torch.where(rows <= 0, 0.0, expected).reshape(shape)
    assert (out.double() - expected).abs().max() <= 8 * epsilon(dtype) * (1 + expected.abs().max())
