"""Features and upstream gradients in any memory layout."""

import math

import pytest
import torch
from helpers import assert_close, assert_same_bits, exact_moments, make_target

import moment_ops as mo
from moment_ops.ops.moments import moments, moments_backward


def numbers(*shape):
    return torch.randn(shape) + 1


def misaligned(*shape):
    """Starts one element into its storage."""
    return numbers(math.prod(shape) + 1)[1:].view(shape)


# Read as they are.
NATIVE = {
    "contiguous": lambda: numbers(6, 3, 4, 5),
    "vector per row": lambda: numbers(6, 7),
    "one column": lambda: numbers(6, 1),
    "scalars": lambda: numbers(6),
    "misaligned": lambda: misaligned(6, 3, 5),
    "channels last": lambda: numbers(6, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last 3d": lambda: numbers(6, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "channels last, one channel": lambda: numbers(6, 1, 4, 5).to(memory_format=torch.channels_last),
    "channels last, one pixel": lambda: numbers(6, 3, 1, 1).to(memory_format=torch.channels_last),
    "channels last, every second row": lambda: numbers(12, 3, 4, 5).to(memory_format=torch.channels_last)[::2],
    "every second row": lambda: numbers(12, 3, 4)[::2],
    "rows of a wider matrix": lambda: numbers(6, 9)[:, 2:7],
    "leading channels": lambda: numbers(6, 5, 4)[:, 1:4],
    "middle rows": lambda: numbers(10, 3, 4)[2:8],
    "features permuted in memory": lambda: numbers(6, 4, 5, 3).permute(0, 2, 3, 1),
    "one row for all": lambda: numbers(1, 3, 4).expand(6, 3, 4),
    "overlapping rows": lambda: numbers(17).as_strided((6, 5), (2, 1)),
}
# Copied once.
OTHER = {
    "transposed": lambda: numbers(7, 6).t(),
    "batch in the middle": lambda: numbers(3, 6, 4).transpose(0, 1),
    "batch innermost": lambda: numbers(3, 4, 6).permute(2, 0, 1),
    "every second column": lambda: numbers(6, 10)[:, ::2],
    "cropped image": lambda: numbers(6, 3, 6, 7)[:, :, 1:5, 2:6],
    "last channels of channels last": lambda: numbers(6, 5, 4, 4).to(memory_format=torch.channels_last)[:, 2:],
    "flipped": lambda: numbers(6, 5).flip(0, 1)[:, 1:4],
    "one column for all": lambda: numbers(6, 1).expand(6, 5),
    "one value for all": lambda: numbers(1, 1).expand(6, 5),
    "diagonals": lambda: numbers(6, 4, 4).diagonal(dim1=1, dim2=2),
}
LAYOUTS = NATIVE | OTHER


def packed_gradients(x):
    columns = x.numel() // x.shape[0]
    return torch.randn(columns), torch.randn(columns)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_a_layout_are_those_of_its_contiguous_copy(backend, layout, dtype):
    x = LAYOUTS[layout]()
    if dtype != torch.float32:
        x = converted(x, dtype)
    mean, var = exact_moments([x])
    m = mo.moments(x)
    assert_close(m.mean, mean, rows=x.shape[0])
    assert_close(m.var, var, rows=x.shape[0])
    if backend == "cpu":
        assert_same_bits([m.mean, m.var], [*moments([x.contiguous()])[:2]])


def converted(x, dtype):
    """`x` in another dtype, with its own strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    storage = x.as_strided((span,), (1,)).to(dtype)
    return storage.as_strided(x.shape, x.stride())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_layout_are_those_of_its_contiguous_copy(backend, layout, dtype):
    x = LAYOUTS[layout]()
    if dtype != torch.float32:
        x = converted(x, dtype)
    mean, _, count = moments([x])
    grads = packed_gradients(x)
    (dx,) = moments_backward([x], mean, count, *grads)
    (expected,) = moments_backward([x.contiguous()], mean, count, *grads)
    assert_same_bits(dx.contiguous(), expected.contiguous())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_the_strides_of_their_features(backend, layout):
    """Those of `torch.empty_like`, which keeps them where no two elements share memory, as the shape functions say."""
    x = LAYOUTS[layout]().requires_grad_()
    loss = mo.moment_loss(x, make_target([x.shape[1:]]))
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.shape == x.shape
    sizes = zip(x.shape, dx.stride(), torch.empty_like(x).stride(), strict=True)
    assert all(size == 1 or got == expected for size, got, expected in sizes), (dx.stride(), x.stride())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", ["contiguous", "channels last"])
def test_upstream_gradients_may_have_any_layout(backend, layout, features):
    grad = LAYOUTS[layout]()
    if grad.dim() != 4 and features == "channels last":
        pytest.skip("channels-last features have four dimensions")
    x = numbers(*grad.shape)
    if features == "channels last":
        x = x.to(memory_format=torch.channels_last)
    mean, _, count = moments([x])
    grads = packed_gradients(x)
    (dx,) = moments_backward([x], mean, count, *grads, grad=[grad])
    (plain,) = moments_backward([x], mean, count, *grads)
    assert_close(dx, plain.double() + grad.double())


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_gradients_of_the_moments_may_have_any_layout(backend, layout):
    x = numbers(6, 7).requires_grad_()
    m = mo.moments(x)
    weight = torch.randn(14)[::2] if layout == "strided" else torch.tensor(0.7).expand(7)
    ours = torch.autograd.grad([m.mean, m.var], x, [weight, weight])[0]
    theirs = torch.autograd.grad([x.mean(0), x.var(0)], x, [weight, weight])[0]
    assert_close(ours, theirs.double(), rows=6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("average", [None, mo.MovingAverage(0.5), mo.AdamMovingAverage(lr=0.1)])
def test_the_loss_of_a_layout_is_that_of_its_contiguous_copy(backend, layout, average):
    x = LAYOUTS[layout]()
    losses = [mo.MomentLoss(make_target([x.shape[1:]]), average) for _ in range(2)]
    for _ in range(2):
        got, expected = losses[0]([x]), losses[1]([x.contiguous()])
    assert_close(got, expected.double(), rows=x[0].numel())
    assert_close(losses[0].state_dict()["target_mean"], losses[1].state_dict()["target_mean"].double())


def test_layers_of_different_layouts_are_packed_together(backend):
    features = [make() for make in LAYOUTS.values()]
    m = mo.moments(features)
    mean, var = exact_moments(features)
    assert_close(m.mean, mean, rows=6)
    assert_close(m.var, var, rows=6)


@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("layout", ["contiguous", "batch in the middle", "batch innermost", "channels last"])
def test_another_dimension_of_a_layout(backend, layout, dim):
    x = LAYOUTS[layout]().requires_grad_()
    m = mo.moments(x, dim=dim)
    mean, var = exact_moments([x], dim=dim)
    assert_close(m.mean, mean, rows=6)
    weights = torch.randn(2, mean.numel())
    ours = torch.autograd.grad((weights[0] * m.mean + weights[1] * m.var).sum(), x)[0]
    theirs = torch.autograd.grad((weights[0] * mean + weights[1] * var).sum(), x)[0]
    assert_close(ours, theirs.double(), rows=6)


def copies(work):
    """How many times torch copied a tensor while `work` ran, and the bytes it allocated."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.key_averages()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in events)
    return sum(event.count for event in events if event.key in ("aten::copy_", "aten::clone")), allocated


@pytest.mark.parametrize("layout", NATIVE)
def test_native_layouts_are_read_without_a_copy(layout):
    x = NATIVE[layout]()
    with mo.backend("cpu"):
        assert copies(lambda: torch.ops.moment_ops.moments([x], 0, 1, True))[0] == 0


@pytest.mark.parametrize("layout", NATIVE)
def test_gradients_of_native_layouts_are_written_without_a_copy(layout):
    x = NATIVE[layout]()
    grads = packed_gradients(x)
    with mo.backend("cpu"):
        mean, _, count = moments([x])
        assert copies(lambda: moments_backward([x], mean, count, *grads))[0] == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forward_allocates_vectors_alone(memory_format):
    x = torch.randn(64, 8, 16, 16).to(memory_format=memory_format)
    loss_fn = mo.MomentLoss(make_target([x.shape[1:]]), mo.AdamMovingAverage())
    vector = 4 * x[0].numel()
    with mo.backend("cpu"):
        assert copies(lambda: mo.moments(x))[1] <= 3 * vector
        assert copies(lambda: loss_fn(x))[1] <= 4 * vector


def test_a_layout_that_is_not_native_is_copied():
    """The measure of the tests above sees copies."""
    with mo.backend("cpu"):
        assert copies(lambda: mo.moments(OTHER["transposed"]()))[0] > 0
