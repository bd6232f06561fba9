"""Moments merged over processes: two gloo processes equal one on the concatenated batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import (
    assert_close,
    assert_same_bits,
    exact_moments,
    make_features,
    make_target,
    merged_var_bound,
    state_of,
    var_error,
)
from ranks import RANKS, Generator, rows_of
from torch import nn

import moment_ops as mo

SHAPES = ((4,), (3, 2))
COLUMNS = 10
AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.7),
    "adam": mo.AdamMovingAverage(lr=0.1),
    "adam, sum": mo.AdamMovingAverage(lr=0.1, reduction="sum"),
}
# Rows of every process.
BATCHES = {"even": (6, 6), "uneven": (9, 3), "one row": (11, 1), "one row each": (1, 1)}


def make_loss(average_kind, var=True, **options):
    return mo.MomentLoss(make_target(SHAPES, torch.float64, var), AVERAGES[average_kind], **options)


def train(rank, average_kind, sizes, source, var, weighted):
    """Some steps; the losses, the gradients averaged as DistributedDataParallel does, and the state."""
    options = {"mean_weight": [0.5, 2.0], "var_weight": torch.linspace(0, 1, COLUMNS)} if weighted else {}
    loss_fn, net = make_loss(average_kind, var, **options), Generator()
    if rank is not None:
        net = nn.parallel.DistributedDataParallel(net)
    losses, gradients = [], []
    for seed in range(3):
        features = net(rows_of(rank, sizes, seed))
        value = loss_fn(features if source == "features" else mo.moments(features, var=var))
        net.zero_grad()
        value.backward()
        losses.append(value.detach())
        gradients.append([p.grad.clone() for p in net.parameters()])
    return losses, gradients, state_of(loss_fn)


def assert_equal_runs(results, expected, rows):
    assert_same_bits(results[0], results[1])
    losses, gradients, state = results[0]
    for got, wanted in zip(losses, expected[0], strict=True):
        assert_close(got, wanted, rows=rows)
    for got, wanted in zip(gradients, expected[1], strict=True):
        packed = [torch.cat([g.reshape(-1) for g in step]) for step in (got, wanted)]
        assert_close(*packed, rows=100 * rows)
    for name, value in state.items():
        if value.is_floating_point():
            assert_close(value, expected[2][name], rows=100 * rows)
        else:
            assert torch.equal(value, expected[2][name])


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("source", ["features", "moments"])
def test_two_processes_train_as_one(ranks, average_kind, batch, source):
    arguments = (average_kind, BATCHES[batch], source, True, False)
    assert_equal_runs(ranks(train, *arguments), train(None, *arguments), sum(BATCHES[batch]))


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_weights_and_means_alone_merge_too(ranks, average_kind):
    for var, weighted in ((True, True), (False, False), (False, True)):
        arguments = (average_kind, BATCHES["uneven"], "features", var, weighted)
        assert_equal_runs(ranks(train, *arguments), train(None, *arguments), 12)


def evaluate(rank, average_kind, sizes, dtype):
    loss_fn = mo.MomentLoss(make_target(SHAPES), AVERAGES[average_kind])
    batch = [x.split(list(sizes))[rank].to(dtype) for x in make_features(sum(sizes), SHAPES)]
    loss_fn(batch)
    return loss_fn.eval()(batch), state_of(loss_fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("average_kind", AVERAGES)
def test_the_loss_is_the_same_on_every_process_in_every_dtype(ranks, average_kind, dtype):
    results = ranks(evaluate, average_kind, BATCHES["uneven"], dtype)
    assert_same_bits(*results)
    loss_fn = mo.MomentLoss(make_target(SHAPES), AVERAGES[average_kind])
    batch = [x.to(dtype) for x in make_features(12, SHAPES)]
    loss_fn(batch)
    assert_close(results[0][0], loss_fn.eval()(batch).double(), rows=144)


def alone(rank):
    loss_fn = make_loss("none", process_group=False)
    features = Generator()(rows_of(rank, BATCHES["uneven"]))
    return loss_fn(features).detach(), mo.moment_loss(features, make_target(SHAPES, torch.float64)).detach()


def test_without_a_group_a_process_stays_alone(ranks):
    for rank, values in enumerate(ranks(alone)):
        features = Generator()(rows_of(rank, BATCHES["uneven"]))
        expected = mo.moment_loss(features, make_target(SHAPES, torch.float64))
        for value in values:
            assert_close(value, expected, rows=9)


def in_groups_of_one(rank):
    groups = [dist.new_group([r]) for r in range(RANKS)]
    return make_loss("none", process_group=groups[rank])(Generator()(rows_of(rank, BATCHES["uneven"]))).detach()


def test_a_given_group_is_the_one_that_merges(ranks):
    for rank, value in enumerate(ranks(in_groups_of_one)):
        features = Generator()(rows_of(rank, BATCHES["uneven"]))
        assert_close(value, mo.moment_loss(features, make_target(SHAPES, torch.float64)), rows=9)


def penalize(rank, average_kind, sizes, create_graph):
    """Gradients of the sum over all rows of |dL/dz|^2, where L is the loss of the whole batch.

    Under the convention of DistributedDataParallel a process sees dL/dz times the number of processes, and the mean of
    the gradients over the processes is that of the sum over the rows if every process scales its part by their number.
    """
    world = 1 if rank is None else RANKS
    loss_fn, net = make_loss(average_kind), Generator()
    loss_fn([x.detach() for x in net(rows_of(rank, sizes, 5))])
    z = rows_of(rank, sizes).clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_fn(net(z)), z, create_graph=True)
    penalty = world * (first / world).square().sum()
    gradients = torch.autograd.grad(penalty, list(net.parameters()), create_graph=create_graph, materialize_grads=True)
    packed = torch.cat([g.detach().reshape(-1) for g in gradients])
    if rank is not None:
        dist.all_reduce(packed)
    return packed / world


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("batch", ["even", "uneven"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_second_derivatives_cross_processes(ranks, average_kind, batch, create_graph):
    results = ranks(penalize, average_kind, BATCHES[batch], create_graph)
    expected = penalize(None, average_kind, BATCHES[batch], create_graph)
    assert_close(results[0], expected, rows=1000)


def transformed(rank, average_kind, sizes):
    """Gradients by `torch.func.grad`, and by autograd."""
    net = Generator()
    z = rows_of(rank, sizes).clone().requires_grad_()
    (plain,) = torch.autograd.grad(make_loss(average_kind)(net(z)), z)
    loss_fn = make_loss(average_kind)
    return torch.func.grad(lambda z: loss_fn(net(z)))(z.detach()).detach(), plain


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_gradients_by_a_transform_cross_processes(ranks, average_kind):
    for ours, plain in ranks(transformed, average_kind, BATCHES["uneven"]):
        assert_close(ours, plain, rows=12)


def poisoned(rank, value):
    """One process has a value that is not finite in column 2."""
    loss_fn = make_loss("adam")
    features = [x.detach() for x in Generator()(rows_of(rank, BATCHES["uneven"]))]
    if rank == 1:
        features[0][0, 2] = value
    return loss_fn(features), state_of(loss_fn)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_of_one_process_that_is_not_finite_stays_in_its_column(ranks, value):
    results = ranks(poisoned, value)
    assert_same_bits(*results)
    loss, state = results[0]
    assert not loss.isfinite()
    assert state["mean_average"][2] == 0
    assert (state["mean_average"] != 0).sum() == COLUMNS - 1


def constant(rank):
    loss_fn = mo.MomentLoss(mo.Moments(torch.full((3,), -7.3), torch.zeros(3)), mo.MovingAverage(0.0))
    loss_fn(torch.full((4 + rank, 3), 0.1))
    return loss_fn.mean_average.clone(), loss_fn.var_average.clone()


def test_a_constant_column_has_no_variance_over_processes(ranks):
    for mean, var in ranks(constant):
        assert mean.tolist() == torch.full((3,), 0.1).tolist()
        assert var.tolist() == [0.0] * 3


def ill_conditioned(rank, ratio, sizes):
    x = (torch.randn(sum(sizes), 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + ratio).float()
    loss_fn = mo.MomentLoss(mo.Moments(torch.zeros(50), torch.ones(50)), mo.MovingAverage(0.0))
    loss_fn(x if rank is None else x.split(list(sizes))[rank])
    return loss_fn.var_average.clone(), x


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("sizes", [(64, 64), (5, 3)])
def test_variances_over_processes_stay_within_the_bounds(ranks, ratio, sizes):
    for var, x in ranks(ill_conditioned, ratio, sizes):
        assert var_error(var, exact_moments([x])[1]) <= merged_var_bound(torch.float32, ratio, min(sizes))


def corrected(rank, sizes):
    """Moments with a correction that is not the target's."""
    rows = rows_of(rank, sizes)
    m = mo.moments(Generator()(rows), correction=0)
    return make_loss("none")(m).detach()


def test_moments_of_another_correction_give_the_same_loss_on_one_process_and_on_two(ranks):
    results = ranks(corrected, BATCHES["uneven"])
    assert_close(results[0], corrected(None, BATCHES["uneven"]), rows=144)


def without_count(rank):
    m = mo.moments(Generator()(rows_of(rank, BATCHES["even"])))
    m = mo.Moments(m.mean.detach(), m.var.detach(), shapes=m.shapes)
    with pytest.raises(ValueError, match="count"):
        make_loss("none")(m)


def test_moments_of_unknown_count_cannot_be_merged(ranks):
    ranks(without_count)


def resumed(rank):
    """A state dict of one process serves all."""
    loss_fn = make_loss("adam")
    loss_fn([x.detach() for x in Generator()(rows_of(rank, BATCHES["even"]))])
    other = copy.deepcopy(loss_fn)
    features = [x.detach() for x in Generator()(rows_of(rank, BATCHES["even"], 1))]
    return loss_fn(features), other(features)


def test_a_copied_loss_goes_on_alike(ranks):
    for first, second in ranks(resumed):
        assert_same_bits(first, second)
