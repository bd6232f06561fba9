"""Gram matrices on the GPU: numbers against float64 on the CPU, streams, graphs and determinism."""

import pytest
import torch
from helpers import assert_close, assert_same_bits, epsilon, make_features
from on_gpu import moved
from test_gram import LAYOUTS, OPS, exact_gram, flat

from moment_ops.ops import backends
from moment_ops.ops.gram import gram

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of groups and of layers: rows of every kind of tile, unaligned columns, several chunks and launches.
CASES = {
    "small": ((3, 2), (5, 8, 1)),
    "one group": ((256,), (4096,) * 3),
    "groups in a tile": ((5, 1, 2), (3, 2049, 70_000)),
    "several tiles": ((128, 100), (5000, 300, 33)),
    "many layers": ((20, 30), (1000, 64, 7) * 12),
    "many groups": ((3,) * 9, (1000, 70)),
    "more columns than a chunk": ((64, 64), (300_000,)),
}


@pytest.fixture(autouse=True)
def _has_kernels(backend):
    reason = backends._cannot_run(backend, "gram", "cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def make_groups(case, dtype):
    counts, widths = CASES[case]
    groups = [make_features(n, [(w,) for w in widths], dtype, seed) for seed, n in enumerate(counts)]
    return groups, [[x[0].float() for x in features] for features in groups]


def on_gpu(nested):
    return [[moved(x) for x in features] for features in nested]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_products_of_all_rows_less_the_shift(case, dtype):
    groups, shift = make_groups(case, dtype)
    actual = gram(on_gpu(groups), on_gpu(shift))
    assert actual.dtype == torch.float64
    assert torch.equal(actual, actual.mT)
    for i, layer in enumerate(actual.cpu()):
        (expected,) = exact_gram([[g[i]] for g in groups], [[s[i]] for s in shift])
        assert (layer - expected).abs().max() <= 32 * epsilon(torch.float32) * expected.diagonal().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_products(case, dtype):
    groups, shift = make_groups(case, dtype)
    features, counts = len(groups[0]), [len(x[0]) for x in groups]
    grad = torch.randn(features, sum(counts), sum(counts), dtype=torch.float64)
    rows = flat(groups)
    wanted = [i % 4 != 1 for i in range(len(rows))]
    computed = iter(OPS.gram_backward(grad.cuda(), flat(on_gpu(groups)), flat(on_gpu(shift)), wanted))
    got = [next(computed) if want else None for want in wanted]
    for i in range(features):
        z = torch.cat([g[i].double() - s[i].double() for g, s in zip(groups, shift, strict=True)])
        parts = ((grad[i] + grad[i].mT) @ z).split(counts)
        for x, dx, part in zip(rows[i::features], got[i::features], parts, strict=True):
            if dx is not None:
                assert dx.dtype == x.dtype
                assert_close(dx.cpu(), part, rows=sum(counts))


def test_sums_of_more_columns_than_a_block_are_in_float64():
    x = torch.randint(0, 128, (3, 300_000)).float()
    exact = (x.double() @ x.double().mT)[None]
    assert torch.equal(gram([[x.cuda()]], [[torch.zeros(300_000).cuda()]]).cpu(), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    groups, shift = make_groups("several tiles", torch.float32)
    groups = [[LAYOUTS[layout](x) for x in features] for features in groups]
    on_device, shift = on_gpu(groups), on_gpu(shift)
    dense = [[x.contiguous() for x in features] for features in on_device]
    assert_same_bits(gram(on_device, shift), gram(dense, shift))
    grad = torch.randn(3, 228, 228, dtype=torch.float64).cuda()
    actual, expected = (OPS.gram_backward(grad, flat(g), flat(shift), [True] * 6) for g in (on_device, dense))
    assert_same_bits([x.contiguous() for x in actual], expected)


def step(rows, shift, features):
    """The matrices, and gradients that depend on them."""
    matrices = OPS.gram(rows, shift, features)
    return [matrices, *OPS.gram_backward(matrices, rows, shift, [True] * len(rows))]


def random_features(seed=0, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(n, width, generator=generator, device="cuda").to(dtype)
        for n in (70, 100)
        for width in (40_000, 999, 2048)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_runs_are_the_same_to_the_last_bit(dtype):
    rows = random_features(dtype=dtype)
    shift = [x[0].float() for x in rows]
    first = step(rows, shift, 3)
    for _ in range(9):
        assert_same_bits(step(rows, shift, 3), first)


def test_nothing_waits_for_the_gpu(request):
    rows = [x.requires_grad_() for x in random_features()]
    shift = [x.detach()[0] for x in rows]

    def train():
        torch.autograd.grad(OPS.gram.default(rows, shift, 3).sum(), rows)

    train()
    request.getfixturevalue("no_sync")
    train()


def test_a_captured_step_replays_as_it_runs():
    static = random_features()
    shift = [torch.randn_like(x[0]) for x in static]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static, shift, 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(static, shift, 3)
    for seed in range(1, 4):
        batch = random_features(seed)
        for x, fresh in zip(static, batch, strict=True):
            x.copy_(fresh)
        graph.replay()
        assert_same_bits(outputs, step(batch, shift, 3))
