"""The tap on the GPU: numbers against float64 on the CPU, y against torch's ReLU, streams, graphs and determinism."""

import pytest
import test_relu_moments
import torch
from helpers import (
    DTYPES,
    assert_close,
    assert_same_bits,
    exact_moments,
    make_features,
    mean_bound,
    mean_error,
    var_bound,
    var_error,
)
from on_gpu import cpu, moved
from test_layouts import LAYOUTS, converted
from test_relu_moments import assert_bit_identical, with_special_values
from torch.autograd import gradcheck, gradgradcheck

import moment_ops as mo
from moment_ops.ops import backends
from moment_ops.ops.relu_moments import relu_moments

# One strip and many, tails of tiles and of vectors, several blocks of rows, chunks of rows.
SIZES = [
    (1, (5,)),
    (2, ()),
    (7, (1,)),
    (64, (3, 5, 7)),
    (64, (64, 32, 32)),
    (5, (200_011,)),
    (515, (33,)),
    (9001, (3,)),
]


def plain(x, bias):
    return torch.relu(x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2)))


def step(x, bias, grads):
    """Outputs and gradient of one training step."""
    x = x.detach().requires_grad_()
    outputs = relu_moments(x, bias)
    return [*(v.detach() for v in outputs), *torch.autograd.grad(outputs, x, grads)]


def make_step(rows=64, shape=(64, 16, 16), dtype=torch.float32, seed=0):
    """(x, bias, gradients of y, mean and variance), made on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    x, bias, grad = normal(rows, *shape).to(dtype), normal(shape[0]).to(dtype), normal(rows, *shape).to(dtype)
    columns = torch.Size(shape).numel()
    return x, bias, [grad, normal(columns), normal(columns)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_y_is_that_of_torch_and_moments_are_of_it(backend, dtype, size, biased):
    rows, shape = size
    if biased and not shape:
        pytest.skip("no channels")
    (x,) = make_features(rows, [shape], dtype)
    bias = torch.randn(shape[0]).to(dtype).cuda() if biased else None
    y, mean, var = relu_moments(moved(x), bias)
    assert_bit_identical(y, plain(moved(x), bias))
    exact_mean, exact_var = exact_moments([y.cpu()], correction=1 if rows > 1 else 0)
    assert mean_error(mean.cpu(), exact_mean, exact_var) <= mean_bound(dtype)
    if rows == 1:
        assert var.isnan().all()
    else:
        assert var_error(var.cpu(), exact_var) <= var_bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_special_values_pass_as_through_torch(backend, dtype, layout):
    x = with_special_values(torch.randn(13, 5, 7, 9, dtype=dtype)).to(memory_format=layout).cuda()
    bias = with_special_values(torch.randn(45, dtype=dtype))[:5].cuda()
    for b in (None, bias):
        assert_bit_identical(relu_moments(x, b)[0], plain(x, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_y_is_bit_identical_for_every_16_bit_number(backend, dtype):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(16, 64, 64).cuda()
    for bias in (None, torch.zeros(64, dtype=dtype).cuda(), torch.randn(64).to(dtype).cuda()):
        assert_bit_identical(relu_moments(x, bias)[0], plain(x, bias))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(backend, layout, dtype):
    x = moved(converted(LAYOUTS[layout](), dtype))
    vectors = list(torch.randn(2, x.numel() // x.shape[0], device="cuda"))
    grad = torch.randn(x.shape, device="cuda").to(dtype)
    results = [step(source, None, [grad, *vectors]) for source in (x, x.contiguous())]
    assert_bit_identical(results[0][0], results[1][0])
    for got, expected in zip(results[0], results[1], strict=True):
        assert_close(got.contiguous(), expected.double().contiguous(), rows=x.shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("parts", ["y", "mean", "var", "y mean", "y var", "mean var", "y mean var"])
def test_gradients_of_y_mean_and_variance_are_joined(backend, dtype, layout, parts):
    (x,) = make_features(130, [(6, 5, 3)], dtype)
    leaf = moved(x.to(memory_format=layout)).requires_grad_()
    names = ("y", "mean", "var")
    outputs = dict(zip(names, relu_moments(leaf), strict=True))
    grads = {name: torch.randn(value.shape).to(value.dtype) for name, value in outputs.items()}
    used = parts.split()
    (dx,) = torch.autograd.grad([outputs[n] for n in used], leaf, [grads[n].cuda() for n in used])
    assert dx.stride() == leaf.stride()
    z = x.double().requires_grad_()
    exact = dict(zip(names, (z.relu(), *exact_moments([z.relu()])), strict=True))
    (expected,) = torch.autograd.grad([exact[n] for n in used], z, [grads[n].double() for n in used])
    assert_close(dx.cpu(), expected, rows=130)


def test_the_backends_agree_on_y_to_the_last_bit():
    x, bias, grads = make_step(dtype=torch.bfloat16)
    results = []
    for name in ("cuda", "triton", "reference"):
        if backends.unavailable(name) is None:
            with mo.backend(name):
                results.append(step(x, bias, grads))
    for y, mean, var, dx in results[:-1]:
        assert_same_bits(y, results[-1][0])
        for got, expected in zip((mean, var, dx), results[-1][1:], strict=True):
            assert_close(got, expected.double(), rows=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_gpu(backend, dtype, request):
    arguments = make_step(dtype=dtype)
    step(*arguments)
    request.getfixturevalue("no_sync")
    step(*arguments)


@pytest.mark.parametrize("rows", [64, 700])
def test_ten_runs_are_the_same_to_the_last_bit(backend, rows):
    arguments = make_step(rows, (3, 8, 8))
    first = step(*arguments)
    for _ in range(9):
        assert_same_bits(step(*arguments), first)


def test_a_captured_step_replays_as_it_runs(backend):
    static, bias, grads = make_step(700, (3, 8, 8))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static, bias, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(static, bias, grads)
    for seed in range(1, 4):
        batch, *_ = make_step(700, (3, 8, 8), seed=seed)
        static.copy_(batch)
        graph.replay()
        assert_same_bits(outputs, step(batch, bias, grads))


def test_memory_beside_y_is_of_the_size_of_the_moments(backend):
    x, bias, _ = make_step(256)
    vector = 4 * x[0].numel()
    relu_moments(x, bias)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = relu_moments(x, bias)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= outputs[0].numel() * 4 + 64 * vector


@pytest.mark.parametrize("part", [0, 1, 2, slice(None)])
def test_differentiable_twice(backend, part):
    x = torch.randn(5, 3, 2, dtype=torch.float64, device="cuda", requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, device="cuda", requires_grad=True)

    def call(x, bias):
        return relu_moments(x, bias)[part]

    assert gradcheck(call, (x, bias))
    assert gradgradcheck(call, (x, bias))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "batch innermost"])
@pytest.mark.parametrize("biased", [False, True])
def test_both_operators_keep_the_contract(backend, layout, biased):
    x = moved(LAYOUTS[layout]())
    bias = torch.randn(x.shape[1], device="cuda", requires_grad=True) if biased else None
    ops = test_relu_moments.OPS
    torch.library.opcheck(ops.relu_moments.default, (x.clone().requires_grad_(), bias, 1))
    y, mean, _ = ops.relu_moments(x, None if bias is None else bias.detach(), 1)
    vectors = [v.requires_grad_() for v in (*torch.randn(2, *mean.shape, device="cuda"), y, mean)]
    for grad in (torch.randn(x.shape, device="cuda", requires_grad=True), None):
        torch.library.opcheck(ops.relu_moments_backward.default, (grad, *vectors, 1))


def test_a_compiled_tap_is_the_eager_tap(backend):
    x, bias, grads = make_step()
    compiled = torch.compile(relu_moments, fullgraph=True)
    leaf = x.detach().requires_grad_()
    outputs = compiled(leaf, bias)
    (dx,) = torch.autograd.grad(outputs, leaf, grads)
    assert_same_bits([*(v.detach() for v in outputs), dx], step(x, bias, grads))
    torch._dynamo.reset()


def test_a_batch_of_many_blocks_of_rows(backend):
    x, bias, grads = make_step(8192, (16, 56, 56), torch.bfloat16)
    y, mean, var, dx = cpu(step(x, bias, grads))
    columns = slice(-7, None)
    part = y.flatten(1)[:, columns]
    exact_mean, exact_var = exact_moments([part])
    assert mean_error(mean[columns], exact_mean, exact_var) <= mean_bound(torch.bfloat16)
    assert var_error(var[columns], exact_var) <= var_bound(torch.bfloat16)
    g, a, b = grads[0].flatten(1)[:, columns].double().cpu(), *(v[columns].double().cpu() for v in grads[1:])
    exact = g + a / 8192 + 2 * b / 8191 * (part.double() - exact_mean)
    assert_close(dx.flatten(1)[:, columns], torch.where(part <= 0, 0, exact), rows=8192)
