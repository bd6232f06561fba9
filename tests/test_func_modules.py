"""Modules under the transforms of `torch.func`: losses with and without a state, extractors, moment networks."""

import copy

import pytest
import torch
from helpers import assert_close, assert_raises, assert_same_bits, exact_moments
from problems import COLUMNS, OTHER, ROWS, TARGET, X, weighted
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import relu

import moment_ops as mo

pytestmark = pytest.mark.usefixtures("backend")

AVERAGES = {"none": None, "moving": mo.MovingAverage(0.7), "adam": mo.AdamMovingAverage(lr=0.1)}


def moment_loss(average):
    return mo.MomentLoss(TARGET, average)


def moment_loss_of_moments(average):
    class OfMoments(mo.MomentLoss):
        def forward(self, x):
            return super().forward(mo.moments(x))

    return OfMoments(TARGET, average)


def covariance_loss(average):
    return mo.CovarianceLoss(TARGET, average=average, mean_weight=0.5)


def after_two_steps(make, average_kind):
    loss = make(AVERAGES[average_kind])
    for x in X[1:]:
        loss(x)
    return loss


def plain_gradient(loss, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


losses = pytest.mark.parametrize("make", [moment_loss, moment_loss_of_moments, covariance_loss])
averages = pytest.mark.parametrize("average_kind", AVERAGES)
running = pytest.mark.parametrize("average_kind", ["moving", "adam"])


@averages
@losses
def test_a_loss_in_training_advances_once_under_grad(make, average_kind):
    ours, plain = (after_two_steps(make, average_kind) for _ in range(2))
    assert_close(grad(ours)(X[0]), plain_gradient(plain, X[0]), rows=ROWS)
    assert_same_bits(dict(ours.state_dict()), dict(plain.state_dict()))


@averages
@losses
def test_a_loss_in_evaluation_runs_under_vmap_of_grad(make, average_kind):
    loss = after_two_steps(make, average_kind).eval()
    assert_same_bits(vmap(loss)(X), torch.stack([loss(x) for x in X]))
    assert_close(vmap(grad(loss))(X), torch.stack([plain_gradient(loss, x) for x in X]), rows=ROWS)


@running
@losses
def test_a_loss_in_training_does_not_run_under_vmap(make, average_kind):
    loss = after_two_steps(make, average_kind)
    before = copy.deepcopy(dict(loss.state_dict()))
    for call in (vmap(loss), vmap(grad(loss))):
        assert_raises(lambda call=call: call(X), RuntimeError, "average", "vmap", r"eval\(\)")
    assert_same_bits(dict(loss.state_dict()), before)


def queue_loss():
    loss = mo.CovarianceDistance(OTHER, queue=8, method="gram")
    loss(X[1])
    return loss


def test_a_queue_in_training_takes_a_batch_under_grad():
    ours, plain = queue_loss(), queue_loss()
    assert_close(grad(ours)(X[0]), plain_gradient(plain, X[0]), rows=ROWS)
    assert_same_bits(dict(ours.state_dict()), dict(plain.state_dict()))


def test_a_queue_in_training_does_not_run_under_vmap():
    loss = queue_loss()
    before = copy.deepcopy(dict(loss.state_dict()))
    assert_raises(lambda: vmap(loss)(X), RuntimeError, "vmap")
    assert_same_bits(dict(loss.state_dict()), before)


def test_a_queue_in_evaluation_runs_under_vmap():
    loss = queue_loss().eval()
    assert_same_bits(vmap(loss)(X), torch.stack([loss(x) for x in X]))


@averages
@losses
def test_a_loss_is_called_with_the_buffers_of_every_problem(make, average_kind):
    members = [after_two_steps(make, average_kind).eval() for _ in X]
    for i, member in enumerate(members):
        for name, buffer in member.named_buffers():
            if name.startswith("target") or name.endswith("average"):
                buffer.mul_(1 + i)
    buffers = {
        name: torch.stack([dict(m.named_buffers())[name] for m in members]) for name in dict(members[0].named_buffers())
    }
    ours = vmap(lambda buffers, x: functional_call(members[0], buffers, (x,)))(buffers, X)
    assert_close(ours, torch.stack([member(x) for member, x in zip(members, X, strict=True)]), rows=ROWS)


def network():
    net = nn.Sequential(nn.Linear(COLUMNS, 5), nn.ReLU(), nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 1)).double()
    return net, mo.MomentExtractor(net)


def plain_statistics(net, x):
    first = relu(net[0](x))
    return weighted(*exact_moments([first, net[3](net[2](first))]))


def statistics(m):
    return weighted(m.mean, m.var)


def test_an_extractor_is_differentiable_to_its_images():
    net, extractor = network()
    ours = vmap(grad(lambda x: statistics(extractor(x))))(X)
    assert_close(ours, vmap(grad(lambda x: plain_statistics(net, x)))(X), rows=ROWS)


def test_an_extractor_and_a_loss_are_differentiable_to_the_parameters_of_functional_call():
    class Matched(nn.Module):
        def __init__(self, extractor):
            super().__init__()
            self.extractor = extractor
            self.loss = mo.MomentLoss(extractor(OTHER))

        def forward(self, x):
            return self.loss(self.extractor(x))

    net, extractor = network()
    matched = Matched(extractor)
    target = exact_moments([relu(net[0](OTHER)), net[3](net[2](relu(net[0](OTHER))))])

    def exact(weight, x):
        first = relu(nn.functional.linear(x, weight, net[0].bias))
        mean, var = exact_moments([first, net[3](net[2](first))])
        return ((mean - target[0]).square().sum() + (var - target[1]).square().sum()) / len(mean)

    (name,) = (name for name, p in matched.named_parameters() if p.shape == net[0].weight.shape)

    def ours(weight, x):
        return functional_call(matched, {name: weight}, (x,))

    weights = net[0].weight.detach() * torch.tensor([0.5, 1, 2])[:, None, None]
    assert_close(vmap(grad(ours))(weights, X), vmap(grad(exact))(weights, X), rows=ROWS)


def test_a_network_that_is_watched_is_differentiable():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            for _ in range(int(torch.ones(()))):
                x = self.act(2 * x)
            return x

    extractor = mo.MomentExtractor(Untraceable())
    extractor(X[0])
    ours = vmap(grad(lambda x: statistics(extractor(x))))(X)
    assert_close(ours, vmap(grad(lambda x: weighted(*exact_moments([relu(2 * x)]))))(X), rows=ROWS)


def moments_of_a_network():
    f = nn.Sequential(nn.Linear(COLUMNS, 5), nn.Tanh(), nn.Linear(5, 1, bias=False)).double()
    net = mo.MomentNetwork(f)

    def exact(x):
        hidden = f[:2](x)
        slopes = (1 - hidden.square()) * f[2].weight / ROWS
        return weighted(hidden.mean(0), slopes.mT @ x, slopes.sum(0), hidden.mean(0), x.mean(0))

    def ours(x):
        return weighted(
            *[part.flatten() if part.shape != f[0].weight.shape else part for part, _ in net.moments(x).layers()]
        )

    return ours, exact


def test_moments_of_a_moment_network_are_differentiable_once():
    ours, exact = moments_of_a_network()
    assert_close(vmap(ours)(X), vmap(exact)(X), rows=ROWS)
    assert_close(vmap(grad(ours))(X), vmap(grad(exact))(X), rows=ROWS)
    assert_raises(
        lambda: grad(lambda x: grad(ours)(x).square().sum())(X[0]), NotImplementedError, "differentiable once"
    )
