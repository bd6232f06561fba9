"""Calls that are alike: worked out once, each with its own tensors."""

import ctypes
from collections import Counter

import pytest
import torch
from helpers import assert_same_bits, make_target

import moment_ops as mo
from moment_ops.kernels import _launch
from moment_ops.ops.gram import gram
from moment_ops.ops.relu_moments import relu_moments

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((70, 5, 4), (70, 70), (70, 1))


def at_address(original, value):
    """Arguments as the interpreter takes them, from those of a compiled kernel: addresses become tensors."""
    if isinstance(original, tuple):
        values = [at_address(*pair) for pair in zip(original, value, strict=True)]
        return type(original)(*values) if hasattr(original, "_fields") else tuple(values)
    if not isinstance(original, torch.Tensor):
        return value
    size = original.untyped_storage().nbytes() - original.storage_offset() * original.element_size()
    if size == 0:
        return original
    return torch.frombuffer((ctypes.c_byte * size).from_address(value), dtype=original.dtype)


class Compiled:
    """The interpreter's kernel behind the interface of a compiled one."""

    def __init__(self, launch, calls):
        self.launch, self.calls = launch, calls

    def __getitem__(self, grid):
        def run(*values):
            self.calls["compiled"] += 1
            assert grid == (self.launch.programs, 1, 1)
            pairs = zip(self.launch.kernel.arg_names, values, strict=True)
            self.launch.kernel[grid](**{name: at_address(self.launch.arguments[name], v) for name, v in pairs})

        return run


@pytest.fixture
def calls(monkeypatch):
    """How often kernels were launched from scratch, and as compiled kernels."""
    counted = Counter()
    run = _launch.start

    def first(launches, device):
        run(launches, device)
        counted["first"] += len(launches)
        return [Compiled(launch, counted) for launch in launches]

    monkeypatch.setattr(_launch, "start", first)
    monkeypatch.setattr(_launch, "_calls", {})
    return counted


def make_layers(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def with_gradients(outputs, inputs):
    outputs = [output for output in outputs if output is not None]
    grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(output) / 3 for output in outputs])
    return [*outputs, *grads]


def run_moments(seed):
    features = make_layers(seed)
    m = mo.moments(features)
    return with_gradients([m.mean, m.var], features)


def run_tap(seed):
    x, _, bias = make_layers(seed, torch.bfloat16)
    y, mean, var = relu_moments(x, bias.detach()[:5, 0].contiguous())
    return with_gradients([y, mean, var], [x])


def run_loss(average, of_features):
    loss_fn = mo.MomentLoss(make_target([shape[1:] for shape in SHAPES]), average)

    def run(seed):
        features = make_layers(seed)
        loss = loss_fn(features if of_features else mo.moments(features))
        return with_gradients([loss], features) + [value.clone() for value in loss_fn.state_dict().values()]

    return run


def run_covariance(seed):
    _, x, _ = make_layers(seed)
    return with_gradients([mo.covariance(x)], [x])


def run_covariance_loss(average):
    target = make_target([(70,), (1,)])
    target = mo.Moments(target.mean, cov=(torch.eye(70), torch.ones(1, 1)), shapes=target.shapes)
    loss_fn = mo.CovarianceLoss(target, average)

    def run(seed):
        _, x, narrow = make_layers(seed)
        return with_gradients([loss_fn([x, narrow])], [x, narrow]) + [v.clone() for v in loss_fn.state_dict().values()]

    return run


def run_gram(seed):
    groups = [[x[:20, :1].reshape(20, -1) for x in make_layers(seed + i)] for i in (0, 7)]
    shift = [[x[0].detach() for x in features] for features in groups]
    return with_gradients([gram(groups, shift)], groups[0])


CALLS = {
    "moments": lambda: run_moments,
    "tap": lambda: run_tap,
    "loss of features": lambda: run_loss(None, True),
    "loss of features, moving average": lambda: run_loss(mo.MovingAverage(0.9), True),
    "loss of features, ADAM": lambda: run_loss(mo.AdamMovingAverage(1e-2), True),
    "loss of moments, ADAM": lambda: run_loss(mo.AdamMovingAverage(1e-2), False),
    "covariance": lambda: run_covariance,
    "loss of covariances": lambda: run_covariance_loss(None),
    "loss of covariances, ADAM": lambda: run_covariance_loss(mo.AdamMovingAverage(1e-2)),
    "Gram matrices": lambda: run_gram,
}


@pytest.mark.parametrize("name", CALLS)
def test_later_calls_give_what_the_first_would(name, calls, monkeypatch):
    run = CALLS[name]()
    run(0)
    launches = calls["first"]
    got = [run(1), run(2)]
    assert calls == {"first": launches, "compiled": 2 * launches}
    run = CALLS[name]()
    run(0)
    for seed, results in enumerate(got, 1):
        monkeypatch.setattr(_launch, "_calls", {})
        assert_same_bits(results, run(seed))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:50],
        lambda x: x.double(),
        lambda x: torch.cat([x.new_empty(x.numel() + 1)])[1:].view(x.shape),
        lambda x: x.mT.contiguous().mT if x.dim() > 2 else x,
    ],
    ids=["shape", "dtype", "address", "strides"],
)
def test_calls_that_are_not_alike_are_worked_out_apart(change, calls):
    mo.moments([x.detach() for x in make_layers(0)])
    first = calls["first"]
    mo.moments([change(x.detach()) for x in make_layers(1)])
    assert calls["first"] > first
    assert calls["compiled"] == 0


def test_options_are_part_of_a_call(calls):
    x = make_layers(0)[1].detach()
    biased, unbiased = mo.moments(x, correction=0), mo.moments(x, correction=1)
    again = mo.moments(x, correction=0)
    assert calls["first"] == 2
    assert_same_bits([biased.var], [again.var])
    assert not torch.equal(biased.var, unbiased.var)


def test_a_tensor_that_comes_twice_is_not_mistaken_for_either(calls):
    x, other = make_layers(0)[1].detach(), make_layers(1)[1].detach()
    mo.moments([x, x])
    m = mo.moments([x, other])
    assert_same_bits([m.var[70:]], [mo.moments(other).var])


def test_nothing_of_a_call_is_kept(calls):
    import gc
    import weakref

    features = make_layers(0)
    references = [weakref.ref(x) for x in features]
    mo.moments([x.detach() for x in features])
    del features
    gc.collect()
    assert all(reference() is None for reference in references)


def test_an_error_while_a_call_is_worked_out_leaves_nothing(calls):
    def fails(x):
        _launch.workspace(3, torch.float32, x.device)
        raise RuntimeError("no launch")

    x = torch.zeros(3)
    with pytest.raises(RuntimeError, match="no launch"):
        _launch.run(fails, x.device, x)
    _launch.workspace(3, torch.float32, x.device)
    assert _launch._allocated.workspaces is None


def test_remembered_calls_are_bounded(calls, monkeypatch):
    monkeypatch.setattr("moment_ops.kernels._launch.MOST_CALLS", 2)
    for rows in (3, 4, 5, 6):
        mo.moments(torch.randn(rows, 4))
    assert len(_launch._calls) == 2
