"""The Frechet loss over processes: two gloo processes equal one on the concatenated batch."""

import pytest
import torch
from frechet_problems import problem
from helpers import assert_same_bits
from ranks import RANKS, Generator, rows_of
from torch import nn

import moment_ops as mo

LOSSES = {
    "batch": {},
    "average": {"average": mo.MovingAverage(0.7)},
    "short queue": {"queue": 4},
    "long queue": {"queue": 20},
}
# Fewer rows in all than columns are gathered; from more, a covariance is summed.
BATCHES = {"few": (2, 1), "even": (6, 6), "uneven": (9, 3), "one row": (11, 1), "none": (7, 0), "few, none": (4, 0)}


def make_loss(kind, method, **options):
    pairs = [problem(2, columns, condition=4.0, seed=columns) for columns in (5, 6)]
    target = mo.Moments(
        torch.cat([t.mean for t, _ in pairs]), cov=tuple(t.cov[0] for t, _ in pairs), shapes=((5,), (6,))
    )
    return mo.FrechetLoss(target, method=method, weight=[1.0, 0.5], **LOSSES[kind], **options)


def train(rank, kind, method, sizes, even=False, calls=("now", "later", "fill")):
    """Some steps; the losses, the gradients averaged as DistributedDataParallel does, and the state."""
    loss_fn, net = make_loss(kind, method, even=even), Generator(5)
    if rank is not None:
        net = nn.parallel.DistributedDataParallel(net)
    results = []
    for seed, how in enumerate(calls):
        features = net(rows_of(rank, sizes, seed))
        if how == "fill" and kind != "batch":
            loss_fn.fill([[x.detach() for x in features]])
        value = loss_fn(features, commit=how != "later")
        if how == "later" and kind != "batch":
            loss_fn.commit()
        net.zero_grad()
        value.backward()
        results.append(torch.cat([value.detach().reshape(1), *[p.grad.reshape(-1) for p in net.parameters()]]))
    state = {k: v.double() for k, v in loss_fn.state_dict().items() if not k.startswith("target")}
    return results, list(state.values()), loss_fn.distances


def assert_as_one(got, wanted):
    """The root of an eigenvalue that vanishes is the root of its rounding."""
    bound = 16 * torch.finfo(torch.float64).eps ** 0.5 * max(1.0, float(wanted.abs().max()))
    assert float((got - wanted).abs().max()) <= bound


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("batch", BATCHES)
def test_two_processes_train_as_one(ranks, kind, batch):
    results = ranks(train, kind, "qdwh", BATCHES[batch])
    expected = train(None, kind, "qdwh", BATCHES[batch])
    assert_same_bits(results[0], results[1])
    ours, theirs = ([*gradients, *state, distances] for gradients, state, distances in (results[0], expected))
    for got, wanted in zip(ours, theirs, strict=True):
        assert_as_one(got, wanted)


@pytest.mark.parametrize("method", ["polynomial", "eigh"])
@pytest.mark.parametrize("batch", ["few", "uneven"])
def test_every_method_crosses_processes(ranks, batch, method):
    results = ranks(train, "batch", method, BATCHES[batch])
    for got, wanted in zip(results[0][0], train(None, "batch", method, BATCHES[batch])[0], strict=True):
        assert_as_one(got, wanted)


@pytest.mark.parametrize("kind", LOSSES)
def test_even_processes_need_no_numbers(ranks, kind):
    for sizes in ((2, 2), (6, 6)):
        assert_same_bits(*(ranks(train, kind, "qdwh", sizes, even) for even in (True, False)))


def too_few(rank, kind, sizes):
    loss_fn = make_loss(kind, "qdwh")
    z = rows_of(rank, sizes).requires_grad_()
    value = loss_fn(Generator(5)(z))
    value.backward()
    steps = [v for k, v in loss_fn.state_dict().items() if k.startswith("step")]
    return value.detach(), z.grad.shape == z.shape, steps


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("sizes", [(1, 0), (0, 0)])
def test_too_few_rows_in_all_are_nan_everywhere(ranks, kind, sizes):
    for value, has_gradient, steps in ranks(too_few, kind, sizes):
        assert value.isnan()
        assert has_gradient
        assert all(step == 0 for step in steps)


def alone(rank):
    x = rows_of(rank, (8, 7))
    target = problem(2, 3)[0]
    ours = [mo.frechet_loss(x, target), mo.FrechetLoss(target, process_group=False)(x)]
    return [value.detach() for value in ours], mo.FrechetLoss(target)(x).detach()


def test_without_a_group_a_process_stays_alone(ranks):
    values = ranks(alone)
    assert len(values) == RANKS
    for rank, (ours, merged) in enumerate(values):
        assert_same_bits(ours, alone(rank)[0])
        assert merged != ours[0]
    assert_same_bits(values[0][1], values[1][1])
