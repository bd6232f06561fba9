"""Covariances merged over processes: two gloo processes equal one on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, assert_same_bits, make_features
from ranks import RANKS, Generator, rows_of
from torch import nn

import moment_ops as mo

WIDTHS = (5, 6)
AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.7),
    "adam": mo.AdamMovingAverage(lr=0.1),
}
BATCHES = {"even": (6, 6), "uneven": (9, 3), "one row": (11, 1)}


def make_loss(average_kind, mean_weight=0.5):
    if average_kind == "queue":
        # The same on every process.
        samples = make_features(10, [(5,), (3, 2)], torch.float64, 9)
        # Each process has room for all of its rows: one process would drop others than two do.
        return mo.CovarianceDistance(samples, queue=100)
    target = mo.Moments(
        torch.linspace(-1, 1, sum(WIDTHS)).double(),
        cov=tuple(torch.eye(width).double() + 0.1 for width in WIDTHS),
        shapes=tuple((width,) for width in WIDTHS),
    )
    return mo.CovarianceLoss(target, average=AVERAGES[average_kind], mean_weight=mean_weight, cov_weight=[1.0, 0.3])


def train(rank, average_kind, sizes):
    """Some steps; the losses, the gradients averaged as DistributedDataParallel does, and the state."""
    loss_fn, net = make_loss(average_kind), Generator(5)
    if rank is not None:
        net = nn.parallel.DistributedDataParallel(net)
    results = []
    for seed in range(3):
        value = loss_fn(net(rows_of(rank, sizes, seed)))
        net.zero_grad()
        value.backward()
        results.append(torch.cat([value.detach().reshape(1), *[p.grad.reshape(-1) for p in net.parameters()]]))
    state = [v.clone() for k, v in loss_fn.state_dict().items() if v.is_floating_point() and "average" in k]
    return results, state


@pytest.mark.parametrize("average_kind", [*AVERAGES, "queue"])
@pytest.mark.parametrize("batch", BATCHES)
def test_two_processes_train_as_one(ranks, average_kind, batch):
    results = ranks(train, average_kind, BATCHES[batch])
    expected = train(None, average_kind, BATCHES[batch])
    assert_same_bits(results[0], results[1])
    for got, wanted in zip([*results[0][0], *results[0][1]], [*expected[0], *expected[1]], strict=True):
        assert_close(got, wanted, rows=1000)


def transformed(rank, average_kind):
    """Gradients by `torch.func.grad`, and by autograd."""
    net = Generator(5)
    z = rows_of(rank, BATCHES["uneven"]).clone().requires_grad_()
    (plain,) = torch.autograd.grad(make_loss(average_kind)(net(z)), z)
    loss_fn = make_loss(average_kind)
    return torch.func.grad(lambda z: loss_fn(net(z)))(z.detach()).detach(), plain


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_gradients_by_a_transform_cross_processes(ranks, average_kind):
    for ours, plain in ranks(transformed, average_kind):
        assert_close(ours, plain, rows=12)


def penalize(rank, average_kind):
    """Gradients of the sum over all rows of |dL/dz|^2; scaled as in the tests of the moments."""
    sizes = BATCHES["uneven"]
    world = 1 if rank is None else RANKS
    loss_fn, net = make_loss(average_kind), Generator(5)
    z = rows_of(rank, sizes).clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_fn(net(z)), z, create_graph=True)
    gradients = torch.autograd.grad(
        world * (first / world).square().sum(), list(net.parameters()), materialize_grads=True
    )
    packed = torch.cat([g.reshape(-1) for g in gradients])
    if rank is not None:
        dist.all_reduce(packed)
    return packed / world


@pytest.mark.parametrize("average_kind", ["none", "moving", "adam"])
def test_second_derivatives_cross_processes(ranks, average_kind):
    assert_close(ranks(penalize, average_kind)[0], penalize(None, average_kind), rows=1000)


def ill_conditioned(rank, ratio):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(256, 40, generator=generator, dtype=torch.float64) + ratio).float()
    loss_fn = mo.CovarianceLoss(torch.zeros(40, 40), average=mo.MovingAverage(0.0))
    loss_fn(x if rank is None else x.split([200, 56])[rank])
    return loss_fn.cov_average


@pytest.mark.parametrize("ratio", [0.0, 1e3])
def test_covariances_of_means_far_from_zero_merge(ranks, ratio):
    """Merged are means that were rounded to float32: sqrt(D) columns of them."""
    got, wanted = ranks(ill_conditioned, ratio)[0], ill_conditioned(None, ratio)
    assert (got - wanted).norm() <= (1e-6 + ratio * 1.2e-7 / 56**0.5 * 40**0.5) * wanted.norm()


def alone(rank):
    features = Generator(5)(rows_of(rank, BATCHES["uneven"]))
    target = [torch.eye(width).double() for width in WIDTHS]
    return [
        mo.CovarianceLoss(target, process_group=False)(features).detach(),
        mo.covariance_loss(features, target).detach(),
    ]


def test_without_a_group_a_process_stays_alone(ranks):
    for rank, values in enumerate(ranks(alone)):
        assert_same_bits(values, alone(rank))
