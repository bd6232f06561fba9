"""Streams, graphs, devices, memory and determinism; torch.compile, autocast, opcheck and gradcheck on the GPU."""

import copy

import pytest
import test_opcheck
import torch
from helpers import assert_close, assert_same_bits, make_features, make_target
from on_gpu import AVERAGES, NETWORK, cpu, network_features, network_loss, state_of, step
from torch.autograd import gradcheck, gradgradcheck

import moment_ops as mo
from moment_ops.ops import backends
from moment_ops.ops.moments import moments, moments_backward

ROWS = 64


def test_auto_takes_the_fastest_kernels_that_there_are():
    available = [name for name in ("cuda", "triton") if backends.unavailable(name) is None]
    assert available, {name: backends.unavailable(name) for name in ("cuda", "triton")}
    assert backends.select("moments", torch.ones(1, device="cuda")) == available[0]


def test_the_backends_agree():
    features, results = network_features(ROWS), []
    for name in ("cuda", "triton", "reference"):
        if backends.unavailable(name) is None:
            with mo.backend(name):
                results.append(mo.moments(features))
    for m in results[:-1]:
        assert_close(m.mean, results[-1].mean.double(), rows=ROWS)
        assert_close(m.var, results[-1].var.double(), rows=ROWS)


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_nothing_waits_for_the_gpu(backend, average_kind, request):
    loss, features = network_loss(average_kind), network_features(ROWS)
    step(loss, features)
    request.getfixturevalue("no_sync")
    step(loss, features)
    mo.moments(features)
    loss.eval()(features)


@pytest.mark.parametrize("rows", [ROWS, 700])
def test_ten_runs_are_the_same_to_the_last_bit(backend, rows):
    features = network_features(rows)
    first = None
    for _ in range(10):
        loss = network_loss("adam")
        results = [*step(loss, features), *state_of(loss)]
        first = first or results
        assert_same_bits(results, first)


def test_work_on_other_streams_gives_the_same_bits(backend):
    features = network_features(700)
    expected = mo.moments(features)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(mo.moments(features))
    torch.cuda.synchronize()
    for m in results:
        assert_same_bits([m.mean, m.var], [expected.mean, expected.var])


def test_the_current_stream_is_used(backend):
    """Features that a slow stream is still writing are read after they are written."""
    x = torch.zeros(ROWS, 4096, device="cuda")
    mo.moments(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.fill_(3.0)
        m = mo.moments(x)
    stream.synchronize()
    assert m.mean.tolist() == [3.0] * 4096


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_a_captured_training_step_replays_as_it_runs(backend, average_kind):
    plain, captured = network_loss(average_kind), network_loss(average_kind)
    static = [x.clone() for x in network_features(ROWS)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(copy.deepcopy(captured), static)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    before = [t.clone() for t in captured.buffers()]
    with torch.cuda.graph(graph):
        outputs = step(captured, static)
    # A capture runs nothing.
    assert_same_bits(list(captured.buffers()), before)
    for seed in range(1, 5):
        batch = network_features(ROWS, seed=seed)
        for x, fresh in zip(static, batch, strict=True):
            x.copy_(fresh)
        graph.replay()
        assert_same_bits(outputs, step(plain, batch))
    assert_same_bits(state_of(captured), state_of(plain))


def test_tensors_on_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    features = make_features(9)
    expected = mo.moments([x.to("cuda:0") for x in features])
    with torch.cuda.device(0):
        m = mo.moments([x.to("cuda:1") for x in features])
    assert m.mean.device == torch.device("cuda:1")
    assert_same_bits(cpu([m.mean, m.var]), cpu([expected.mean, expected.var]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_extra_memory_is_of_the_size_of_the_statistics(backend, memory_format):
    features = [
        torch.randn(ROWS, 64, 64, 64, device="cuda").to(memory_format=memory_format).requires_grad_() for _ in range(4)
    ]
    shapes = [x.shape[1:] for x in features]
    loss = mo.MomentLoss(make_target(shapes), mo.AdamMovingAverage()).cuda()
    vector = loss.target_mean.numel() * 4
    loss(features)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = loss(features)
    assert torch.cuda.max_memory_allocated() - before <= 6 * vector
    features = sum(x.numel() * x.element_size() for x in features)
    value.backward()
    assert torch.cuda.max_memory_allocated() - before <= features + 8 * vector


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_a_compiled_step_is_the_eager_step(backend, average_kind):
    plain, compiled = network_loss(average_kind), network_loss(average_kind)
    call = torch.compile(compiled, fullgraph=True)
    for seed in range(3):
        features = network_features(ROWS, seed=seed)
        assert_same_bits(step(call, features), step(plain, features))
    assert_same_bits(state_of(compiled), state_of(plain))
    torch._dynamo.reset()


def test_under_autocast_statistics_stay_in_float32(backend):
    loss = mo.MomentLoss(make_target([(16,)]), mo.AdamMovingAverage(lr=0.1)).cuda()
    linear = torch.nn.Linear(8, 16, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        features = linear(torch.randn(32, 8, device="cuda"))
        value = loss(features)
    assert features.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    value.backward()
    assert linear.weight.grad.isfinite().all()


def test_moments_are_differentiable_twice(backend):
    features = [x.cuda().requires_grad_() for x in make_features(5, ((3,), (2, 2)), torch.float64)]

    def call(*features):
        m = mo.moments(list(features))
        return m.mean, m.var

    assert gradcheck(call, features)
    assert gradgradcheck(call, features)


@pytest.mark.parametrize("layout", test_opcheck.LAYOUTS)
def test_operators_keep_the_contract(backend, layout):
    ops = torch.ops.moment_ops
    arrange = test_opcheck.LAYOUTS[layout]
    features = [x.cuda() for x in arrange(make_features(6, test_opcheck.SHAPES))]
    mean, var, count = moments(features)
    torch.library.opcheck(ops.moments.default, ([x.clone().requires_grad_() for x in features], 0, 1, True))
    grad = [torch.randn_like(x) for x in features]
    torch.library.opcheck(ops.moments_backward.default, (grad, mean, var, features, mean, count, 0, 1, None))
    for average_kind in test_opcheck.AVERAGES:

        def arguments(average_kind=average_kind):
            target, target_var, *rest = test_opcheck.match_arguments(average_kind, True, True, True)
            scales, weights, rest = rest[:2], [w.cuda() for w in rest[2:4]], rest[4:]
            rest[3] = [s.cuda() for s in rest[3]]
            return (target.cuda(), target_var.cuda(), *scales, *weights, *rest)

        torch.library.opcheck(ops.match_.default, (mean, var, *arguments()))
        torch.library.opcheck(ops.match_.features, (features, 1, *arguments()))


def test_a_large_batch_of_a_network_has_its_gradients(backend):
    features = network_features(256, torch.bfloat16)
    mean, _, count = moments(features)
    grad_mean, grad_var = torch.randn_like(mean), torch.randn_like(mean)
    got = moments_backward(features, mean, count, grad_mean, grad_var)
    with mo.backend("reference"):
        expected = moments_backward(
            [x.double() for x in features], mean.double(), count, grad_mean.double(), grad_var.double()
        )
    assert len(got) == len(NETWORK)
    for dx, exact in zip(got, expected, strict=True):
        assert_close(dx, exact)
