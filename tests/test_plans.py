"""Calls that are alike share a plan: what tells them apart, what a plan may keep, and who goes without."""

import gc
import weakref

import pytest
import torch
from helpers import (
    assert_close,
    assert_moments,
    assert_same_bits,
    exact_moments,
    make_features,
    make_target,
    statistics_dtype,
)
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import moment_ops as mo
from moment_ops.ops import backends, moments, plans, relu_moments

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _no_plans():
    """Every test begins without plans."""
    for found in gc.get_objects():
        if type(found) is plans.Plans:
            found._plans.clear()


@pytest.fixture
def fills(monkeypatch):
    """The operators that a backend was chosen for: one entry per plan."""
    chosen = []
    fill = backends.fill

    def spied(operator, tensor):
        chosen.append((operator, backends.requested()))
        return fill(operator, tensor)

    monkeypatch.setattr(backends, "fill", spied)
    return chosen


SHAPES = ((4, 4),)
TARGETS = {dtype: make_target(SHAPES, dtype) for dtype in (torch.float32, torch.float64)}


def tap(x):
    return relu_moments.relu_moments(x)


def identity_tap(x):
    return relu_moments.identity_moments(x)


def loss(x):
    return mo.moment_loss(x, TARGETS[statistics_dtype(x.dtype)])


CALLS = {"moments": mo.moments, "tap": tap, "identity tap": identity_tap, "loss": loss}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def forward(fills):
    """The backends that were asked for, without those of backwards."""
    return [requested for operator, requested in fills if not operator.endswith("_backward")]


def tensors(result):
    """The tensors that a call returned."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


@calls
def test_alike_calls_choose_a_backend_once(call, fills):
    for seed in range(3):
        call(make_features(6, SHAPES, seed=seed)[0])
    assert len(forward(fills)) == 1


def unaligned(x):
    """The same values, one element off a 16-byte boundary."""
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert moved.data_ptr() % 16 == 4
    return moved


X = make_features(8, SHAPES)[0]
DIFFERENT = {
    "shape": X[:6],
    "strides": X.transpose(1, 2),
    "dtype": X.double(),
    "gradient": X.clone().requires_grad_(),
    "alignment": unaligned(X),
}


@pytest.mark.parametrize("other", DIFFERENT.values(), ids=DIFFERENT.keys())
@calls
def test_other_tensors_get_another_plan(call, other, fills):
    call(X)
    call(other)
    call(X)
    assert len(forward(fills)) == 2


def test_a_parameter_is_a_tensor():
    x = torch.nn.Parameter(X.clone())
    (gradient,) = torch.autograd.grad(mo.moments(x).var.sum(), x)
    assert gradient.shape == x.shape


@calls
def test_a_forced_backend_gets_another_plan(call, fills):
    for name in ("auto", "reference", "auto", "reference"):
        with mo.backend(name):
            call(X)
    assert forward(fills) == ["auto", "reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unaligned_tensor_after_an_aligned_one_has_the_same_moments(dtype):
    x = X.to(dtype)
    moved = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
    first, second = mo.moments(x), mo.moments(moved)
    assert_moments(second, [x])
    assert_same_bits([first.mean, first.var], [second.mean, second.var])


def test_gradients_that_arrive_in_other_strides_get_another_plan(fills):
    x = torch.randn(4, 3, 5, 6).requires_grad_()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y, mean, var = tap(x)
        grad = torch.randn(y.shape).to(memory_format=memory_format)
        (ours,) = torch.autograd.grad((y, mean, var), x, (grad, torch.ones_like(mean), torch.ones_like(var)))
        wide = x.detach().double().requires_grad_()
        exact_mean, exact_var = exact_moments([wide.relu()])
        (exact,) = torch.autograd.grad((wide.relu() * grad).sum() + exact_mean.sum() + exact_var.sum(), wide)
        assert_close(ours, exact, rows=4)
    assert [operator for operator, _ in fills] == ["relu_moments", "relu_moments_backward", "relu_moments_backward"]


def test_a_plan_keeps_no_tensor():
    x = make_features(6, ((5,),))[0].requires_grad_()
    y, mean, var = tap(x)
    m = mo.moments([x])
    torch.autograd.grad(y.sum() + mean.sum() + var.sum() + m.mean.sum() + m.var.sum(), x)
    alive = [weakref.ref(tensor) for tensor in (x, y, mean, var, m.mean, m.var)]
    del x, y, mean, var, m
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_plans_are_bounded():
    for rows in range(1, plans.MOST_PLANS + 50):
        mo.moments(torch.ones(rows, 1))
    assert len(moments._PLANS._plans) == plans.MOST_PLANS
    assert_moments(mo.moments(X), [X])


@pytest.mark.parametrize("wrong", [torch.ones(0, 3), torch.ones(2, 3, dtype=torch.int64), [torch.ones(2, 3), 1]])
def test_an_error_is_an_error_again(wrong):
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=r"^input"):
            mo.moments(wrong)


@calls
def test_forward_mode_raises_after_a_plan_was_made(call):
    call(X)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))


@pytest.mark.parametrize("call", [mo.moments, tap, identity_tap])
def test_shapes_alone_are_computed_for_fake_tensors(call):
    expected = call(X)
    with FakeTensorMode() as mode:
        got = call(mode.from_tensor(X))
    assert [r.shape for r in tensors(got)] == [r.shape for r in tensors(expected)]


@pytest.mark.parametrize(
    ("call", "operator"),
    [
        (lambda x: mo.moments(x).var, torch.ops.moment_ops.moments.default),
        (tap, torch.ops.moment_ops.relu_moments.default),
    ],
)
def test_a_trace_records_the_operator(call, operator):
    call(X)
    graph = make_fx(call)(X)
    assert operator in [node.target for node in graph.graph.nodes]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator():
    tap(X)
    with Seen() as seen:
        tap(X)
    assert torch.ops.moment_ops.relu_moments.default in seen.operators


def test_a_subclass_sees_the_operator():
    operators = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            operators.append(func)
            with torch._C._DisableTorchDispatch():
                return func(*args, **(kwargs or {}))

    tap(X)
    tap(X.as_subclass(Watched))
    assert torch.ops.moment_ops.relu_moments.default in operators


def test_tracing_records_a_call_that_has_a_plan():
    mo.moments(X)
    traced = torch.jit.trace(lambda x: mo.moments(x).mean, (X,), check_trace=False)
    other = X + 1
    assert_same_bits(traced(other), mo.moments(other).mean)


class Counter:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@calls
def test_ten_batch_sizes_are_one_graph(call):
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in range(3, 13):
        x = make_features(rows, SHAPES)[0]
        call(x)
        assert_same_bits(tensors(compiled(x)), tensors(call(x)))
        graphs.append(counter.graphs)
    torch._dynamo.reset()
    # The compiler may begin anew within the first call, when it finds that a float is a constant.
    assert len(set(graphs)) == 1
