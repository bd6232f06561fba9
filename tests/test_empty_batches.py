"""Moments of a process without rows, where others have some: from features, taps and a moment network."""

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, assert_same_bits
from ranks import RANKS, Generator, rows_of
from torch import nn

import moment_ops as mo

SIZES = {"even": (4, 4), "first empty": (0, 8), "last empty": (8, 0)}


def network(activation):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), activation(), nn.Conv2d(3, 2, 2), activation(), nn.Flatten()
    ).double()


def moment_network():
    torch.manual_seed(2)
    f = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1, bias=False)).double()
    return mo.MomentNetwork(f, hidden=nn.Tanh)


def pictures(features):
    return torch.cat([features[0], features[1].flatten(1), features[0][:, :4]], 1).unflatten(1, (1, 4, 4))


MOMENTS = {
    "features": lambda x: mo.moments(x),
    "channels": lambda x: mo.moments(pictures(x), dim=(0, 2, 3)),
    "taps of ReLUs": lambda x: mo.MomentExtractor(network(nn.ReLU))(pictures(x)),
    "taps of GELUs": lambda x: mo.MomentExtractor(network(nn.GELU))(pictures(x)),
    "moment network": lambda x: moment_network()(x[1].flatten(1)),
}


def target_of(name):
    m = MOMENTS[name](Generator(6)(rows_of(None, (9,), seed=5)))
    var = None if m.var is None else m.var.detach()
    return mo.Moments(m.mean.detach(), var, shapes=m.shapes, names=m.names)


def averaged(gradients, world):
    """As DistributedDataParallel does."""
    packed = torch.cat([g.reshape(-1) for g in gradients])
    if world > 1:
        dist.all_reduce(packed)
    return packed / world


def evaluate(rank, name, sizes, second):
    """The loss, the moments of this process, and gradients of the parameters of the generator.

    With `second`, gradients of the sum over all rows of |dL/dz|^2, where L is the loss of the whole batch: a process
    sees dL/dz times the number of processes, and scales its part of the sum by it.
    """
    world = 1 if rank is None else RANKS
    net = Generator(6)
    z = rows_of(rank, sizes).clone().requires_grad_()
    moments = MOMENTS[name](net(z))
    loss = value = mo.moment_loss(moments, target_of(name), process_group=False if rank is None else None)
    if second:
        (slope,) = torch.autograd.grad(loss, z, create_graph=True)
        value = world * (slope / world).square().sum()
    gradients = torch.autograd.grad(value, list(net.parameters()), materialize_grads=True, allow_unused=True)
    return loss.detach(), (moments.mean.detach(), moments.count), averaged(gradients, world)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", MOMENTS)
def test_a_loss_merges_the_moments_of_processes_without_rows(ranks, name, sizes):
    results, (loss, _, gradient) = ranks(evaluate, name, sizes, False), evaluate(None, name, (8,), False)
    for value, _, parameters in results:
        assert_same_bits(value, results[0][0])
        assert_close(value, loss, rows=1000)
        assert_close(parameters, gradient, rows=10_000)


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0)])
@pytest.mark.parametrize("name", MOMENTS)
def test_second_derivatives_cross_processes_without_rows(ranks, name, sizes):
    results = ranks(evaluate, name, sizes, True)
    assert_close(results[0][2], evaluate(None, name, (8,), True)[2], rows=100_000)


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_of_no_rows_are_nan_with_a_count_of_zero(ranks, name):
    mean, count = ranks(evaluate, name, (0, 8), False)[0][1]
    assert mean.isnan().all()
    assert not count.any()


@pytest.mark.parametrize("name", MOMENTS)
def test_one_process_needs_rows(name):
    with pytest.raises(ValueError, match="got an empty batch of shape"):
        MOMENTS[name](Generator(6)(rows_of(None, (0,))))


def parts():
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    none = mo.Moments(
        torch.full((3,), float("nan")).double(),
        torch.full((3,), float("nan")).double(),
        (torch.full((3, 3), float("nan")).double(),),
        torch.zeros(1, dtype=torch.int64),
        shapes=((3,),),
        validate=False,
    )
    some = mo.Moments(x.mean(0), x.var(0), (torch.cov(x.mT),), 7)
    return none, some


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0)])
def test_a_part_without_rows_does_not_count(order):
    none, some = parts()
    merged = mo.Moments.merge(*((none, some)[i] for i in order))
    assert_close(merged.mean, some.mean)
    assert_close(merged.var, some.var)
    assert_close(merged.cov[0], some.cov[0])
    assert merged.count.item() == 7


def test_parts_without_any_rows_merge_to_nan():
    merged = mo.Moments.merge(parts()[0], parts()[0])
    assert merged.mean.isnan().all()
    assert merged.var.isnan().all()
    assert merged.cov[0].isnan().all()
