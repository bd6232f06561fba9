"""Derivatives: first and second, through the public surface, with every average."""

import copy

import pytest
import torch
from helpers import (
    assert_close,
    assert_same_bits,
    exact_moments,
    make_features,
    make_target,
    squared_distance,
)
from test_match import share_of_batch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import moment_ops as mo
from moment_ops.ops.moments import moments, moments_backward

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((3,), (2, 2))
ROWS = 5
AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.7),
    "moving, corrected": mo.MovingAverage(0.7, bias_correction=True),
    "adam": mo.AdamMovingAverage(lr=0.1),
    "adam, sum": mo.AdamMovingAverage(lr=0.1, reduction="sum"),
}
WEIGHTS = {
    "plain": {},
    "weighted": {"mean_weight": [0.5, 2.0], "var_weight": torch.linspace(0.5, 2, 7).double()},
}


def inputs(rows=ROWS, seed=0):
    return [x.requires_grad_() for x in make_features(rows, SHAPES, torch.float64, seed)]


def make_loss(average_kind, weights="plain", *, var=True, train=False, reduction="mean"):
    """A loss whose average has run for two steps."""
    target = make_target(SHAPES, torch.float64, var)
    loss = mo.MomentLoss(target, AVERAGES[average_kind], reduction=reduction, **WEIGHTS[weights])
    for seed in (5, 6):
        loss([x.detach() for x in inputs(seed=seed)])
    return loss.train(train)


def pure(loss, source="features"):
    """The loss as a function: every call starts from the same state."""

    def call(*features):
        fresh = copy.deepcopy(loss)
        return fresh(list(features) if source == "features" else mo.moments(list(features)))

    return call


def naive(loss):
    """The same loss in plain PyTorch, from the table of the design, the state advanced by the library itself."""
    average, state = loss.average, copy.deepcopy(loss)

    def call(*features):
        advanced = copy.deepcopy(state)
        advanced([x.detach() for x in features])
        mean, var = exact_moments(features)
        weights = [
            scale if vector is None else vector
            for scale, vector in (
                (state._mean_scale, state.mean_weight),
                (state._var_scale, state.var_weight),
            )
        ]
        total = 0.0
        for name, value, weight in zip(("mean", "var"), (mean, var), weights, strict=True):
            target = getattr(state, f"target_{name}")
            if target is None:
                continue
            if average is None:
                total = total + (weight * (value - target) ** 2).sum() / target.numel()
            elif average.kind == "moving":
                old = getattr(state, f"{name}_average")
                share = share_of_batch(average, int(state.step) + 1)
                value = (1 - share) * old + share * value
                total = total + (weight * (value - target) ** 2).sum() / target.numel()
            else:
                total = total + (weight * getattr(advanced, f"{name}_average") * (target - value)).sum()
        return total

    return call


@pytest.mark.parametrize("part", ["mean", "var", "both"])
@pytest.mark.parametrize("correction", [0, 1])
def test_moments_are_differentiable_twice(part, correction):
    def call(*features):
        m = mo.moments(list(features), correction=correction)
        return {"mean": (m.mean,), "var": (m.var,), "both": (m.mean, m.var)}[part]

    assert gradcheck(call, inputs())
    assert gradgradcheck(call, inputs())


def test_means_alone_are_differentiable_twice():
    def call(*features):
        return mo.moments(list(features), var=False).mean

    assert gradcheck(call, inputs())
    # Linear: the second derivative is a zero that gradgradcheck has to find.
    assert gradgradcheck(lambda *features: call(*features) ** 2, inputs())


@pytest.mark.parametrize("dim", [1, (0, 2), (1, 2)])
def test_moments_over_other_dimensions_are_differentiable_twice(dim):
    def call(x):
        m = mo.moments(x, dim=dim)
        return m.mean, m.var

    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(call, x)
    assert gradgradcheck(call, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_moments_of_channels_last_features_are_differentiable_twice(memory_format):
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    assert gradcheck(lambda x: mo.moments(x).var, x)
    assert gradgradcheck(lambda x: mo.moments(x).var, x)


@pytest.mark.parametrize("added", [False, True])
def test_moments_backward_is_differentiable_in_all_that_it_adds_up(added):
    features = inputs()
    count = torch.tensor([9, 7])
    mean, grad_mean, grad_var = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(3))
    upstream = inputs(seed=3) if added else []

    def call(mean, grad_mean, grad_var, *tensors):
        features, grad = tensors[:2], tensors[2:]
        return tuple(moments_backward(features, mean, count, grad_mean, grad_var, grad=grad))

    arguments = (mean, grad_mean, grad_var, *features, *upstream)
    assert gradcheck(call, arguments)
    assert gradgradcheck(call, arguments)


def test_moments_backward_refuses_a_scale_that_wants_a_gradient():
    features = inputs()
    mean, _, count = moments([x.detach() for x in features])
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="scale"):
        moments_backward(features, mean, count, mean, None, scale=scale)


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("source", ["features", "moments"])
@pytest.mark.parametrize("var", [True, False])
def test_the_loss_in_evaluation_is_differentiable_twice(average_kind, weights, source, var):
    call = pure(make_loss(average_kind, weights, var=var), source)
    assert gradcheck(call, inputs())
    assert gradgradcheck(call, inputs())


@pytest.mark.parametrize("source", ["features", "moments"])
@pytest.mark.parametrize("average_kind", ["moving", "moving, corrected"])
def test_the_moving_average_in_training_is_differentiable_twice(average_kind, source):
    call = pure(make_loss(average_kind, "weighted", train=True), source)
    assert gradcheck(call, inputs())
    assert gradgradcheck(call, inputs())


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("source", ["features", "moments"])
def test_first_and_second_derivatives_in_training_are_those_of_plain_pytorch(average_kind, weights, source):
    loss = make_loss(average_kind, weights, train=True)
    results = []
    for call in (pure(loss, source), naive(loss)):
        features = inputs()
        value = call(*features)
        first = torch.autograd.grad(value, features, create_graph=True)
        penalty = sum((g.square() * x.sin()).sum() for g, x in zip(first, features, strict=True))
        results.append([value, *first, *torch.autograd.grad(penalty, features)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rows=100)


@pytest.mark.parametrize("source", ["features", "moments"])
@pytest.mark.parametrize("average_kind", AVERAGES)
def test_a_gradient_penalty_trains_a_network(source, average_kind):
    """Second derivatives reach parameters behind the features, as in plain PyTorch."""
    loss = make_loss(average_kind, train=True)
    net = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Tanh(), torch.nn.Linear(7, 7)).double()
    z = torch.randn(ROWS, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (pure(loss, source), naive(loss)):
        y = net(z)
        value = call(y[:, :3], y[:, 3:].view(-1, 2, 2))
        (first,) = torch.autograd.grad(value, z, create_graph=True)
        gradients = torch.autograd.grad(first.square().sum(), list(net.parameters()), materialize_grads=True)
        results.append(torch.cat([g.reshape(-1) for g in gradients]))
    assert_close(*results, rows=100)


def test_third_derivatives_of_the_variance_are_right():
    x = inputs()[0]
    results = []
    for var in (lambda x: mo.moments(x).var, lambda x: x.var(0)):
        value = (var(x) ** 3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * x.cos()).sum()
        results.append(gradient)
    assert_close(*results, rows=1000)


@pytest.mark.parametrize("source", ["features", "moments"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_target_of_moment_loss_gets_its_gradient(source, weights):
    features = inputs()
    goal_mean = torch.randn(7, dtype=torch.float64, requires_grad=True)
    goal_var = torch.rand(7, dtype=torch.float64, requires_grad=True)

    def call(goal_mean, goal_var, *features):
        target = mo.Moments(goal_mean, goal_var, shapes=SHAPES, validate=False)
        batch = list(features) if source == "features" else mo.moments(list(features))
        return mo.moment_loss(batch, target, **WEIGHTS[weights])

    assert gradcheck(call, (goal_mean, goal_var, *features))
    assert gradgradcheck(call, (goal_mean, goal_var, *features))


@pytest.mark.parametrize("wanted", ["mean", "var"])
def test_one_part_of_the_target_may_want_a_gradient_alone(wanted):
    parts = {"mean": torch.randn(7), "var": torch.rand(7)}
    parts[wanted].requires_grad_()
    target = mo.Moments(parts["mean"], parts["var"], shapes=SHAPES, validate=False)
    features = make_features(ROWS, SHAPES)
    ours = torch.autograd.grad(mo.moment_loss(features, target), parts[wanted])[0]
    theirs = torch.autograd.grad(squared_distance(features, target), parts[wanted])[0]
    assert_close(ours, theirs.double(), rows=ROWS)


@pytest.mark.parametrize("weight", ["mean_weight", "var_weight"])
def test_a_weight_that_wants_a_gradient_is_served_or_refused(weight):
    features, target = make_features(ROWS, SHAPES), make_target(SHAPES)
    vector = torch.rand(7, requires_grad=True)
    theirs = torch.autograd.grad(squared_distance(features, target, **{weight: vector}), vector)[0]
    try:
        ours = torch.autograd.grad(mo.moment_loss(features, target, **{weight: vector}), vector)[0]
    except (ValueError, NotImplementedError) as refusal:
        ours = weight in str(refusal) and theirs
    assert_close(ours, theirs.double(), rows=ROWS)


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("wanted", [0, 1])
def test_one_layer_may_want_a_gradient_alone(average_kind, wanted):
    features = [x.detach() for x in inputs()]
    features[wanted].requires_grad_()
    loss = make_loss(average_kind)
    everything = inputs()
    expected = torch.autograd.grad(loss(everything), everything)[wanted]
    assert_same_bits(torch.autograd.grad(loss(features), features[wanted])[0], expected)


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_a_layer_may_come_twice(average_kind):
    x = make_features(ROWS, [(3,)], torch.float64)[0].requires_grad_()
    loss = mo.MomentLoss(make_target([(3,), (3,)], torch.float64), AVERAGES[average_kind])
    loss([x.detach() + 1, x.detach()])
    loss.eval()
    assert gradcheck(lambda x: loss([x, x]), x)


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_backward_can_run_again_on_a_retained_graph(average_kind):
    features = inputs()
    value = make_loss(average_kind)(features)
    first = torch.autograd.grad(value, features, retain_graph=True)
    assert_same_bits(torch.autograd.grad(value, features), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, features)


def test_gradients_accumulate():
    features = inputs()
    loss = make_loss("none")
    loss(features).backward()
    once = [x.grad.clone() for x in features]
    loss(features).backward()
    for x, g in zip(features, once, strict=True):
        assert_close(x.grad, 2 * g)


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_features_that_change_before_backward_raise(average_kind):
    leaves = inputs()
    features = [x * 1 for x in leaves]
    value = make_loss(average_kind)(features)
    features[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_target_that_changes_before_backward_raises():
    features, target = inputs(), make_target(SHAPES, torch.float64)
    value = mo.moment_loss(mo.moments(features), target)
    target.mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, features, create_graph=True)


def test_without_gradients_nothing_is_recorded():
    features, loss = inputs(), make_loss("adam")
    with torch.no_grad():
        assert not loss(features).requires_grad
        assert not mo.moments(features).var.requires_grad
    assert not loss([x.detach() for x in features]).requires_grad


def test_the_count_has_no_gradient():
    assert not mo.moments(inputs()).count.requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda x: mo.moments(x).var,
        lambda x: mo.moment_loss(x, make_target([(3,)], torch.float64)),
        lambda x: mo.MomentLoss(make_target([(3,)], torch.float64), mo.MovingAverage(0.5))(x),
        lambda x: mo.moment_loss(
            mo.Moments(x.mean(0), x.var(0), shapes=((3,),), validate=False),
            make_target([(3,)], torch.float64),
        ),
        lambda x: mo.moment_loss(x.detach() * 0 + 1, mo.Moments(x.mean(0), x.var(0), shapes=((3,),), validate=False)),
    ],
    ids=["moments", "function", "module", "loss of moments", "target"],
)
def test_forward_mode_raises(call):
    x = make_features(ROWS, [(3,)], torch.float64)[0]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((NotImplementedError, RuntimeError), match=r"[Ff]orward|jvp|Jacobian"):
            call(dual)


def test_forward_mode_elsewhere_does_not_matter():
    x = make_features(ROWS, [(3,)])[0]
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(2), torch.ones(2))
        assert mo.moments(x).var.isfinite().all()


@pytest.mark.parametrize("average_kind", ["none", "moving"])
def test_a_single_row_gets_finite_gradients_from_means_alone(average_kind):
    loss = mo.MomentLoss(make_target(SHAPES, torch.float64, var=False), AVERAGES[average_kind])
    features = inputs(rows=1)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss(features), features))


def test_a_variance_that_is_not_used_sends_no_gradient_from_a_single_row():
    features = inputs(rows=1)
    m = mo.moments(features)
    assert m.var.isnan().all()
    for g in torch.autograd.grad(m.mean.sum() + torch.where(m.var.isnan(), 0.0, m.var).sum(), features):
        assert_close(g, torch.ones_like(g))
