"""Every loss over processes: two of them give value and gradient of one on all rows, also where one has none."""

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, assert_same_bits, make_features, make_target
from ranks import RANKS, Generator, rows_of

import moment_ops as mo

# Columns of the first layer: fewer than there are rows, and more.
NARROW, WIDE = 4, 40
AVERAGES = {"none": None, "moving": mo.MovingAverage(0.7), "adam": mo.AdamMovingAverage(lr=0.1)}


def shapes_of(features):
    return tuple(tuple(x.shape[1:]) for x in features)


def covariances(features):
    widths = [x[:1].numel() if len(x) else x.shape[1:].numel() for x in features]
    mean = torch.linspace(-1, 1, sum(widths)).double()
    return mo.Moments(mean, cov=tuple(torch.eye(w).double() + 0.1 for w in widths), shapes=tuple((w,) for w in widths))


def joint(features):
    moments = covariances(features)
    width = len(moments.mean)
    return mo.Moments(moments.mean, cov=torch.eye(width).double() + 0.1, shapes=((width,),))


def maps(features):
    return features[1].unflatten(1, (3, 1))


STYLE = mo.gram_matrix(make_features(1, [(3, 1, 2)], torch.float64, 7)[0])
MEANS = {"mean_weight": [0.5, 2.0]}
FUNCTIONS = {
    "moment_loss": lambda x, y, group: mo.moment_loss(x, make_target(shapes_of(x), torch.float64), **group),
    "moment_loss, weights": lambda x, y, group: mo.moment_loss(
        x, make_target(shapes_of(x), torch.float64), var_weight=[0.5, 2.0], reduction="sum", **group
    ),
    "moment_loss, means": lambda x, y, group: mo.moment_loss(
        x, make_target(shapes_of(x), torch.float64, var=False), **group
    ),
    "covariance_loss": lambda x, y, group: mo.covariance_loss(x, covariances(x), cov_weight=[1.0, 0.3], **group),
    "covariance_loss, means": lambda x, y, group: mo.covariance_loss(x, covariances(x), **MEANS, **group),
    "covariance_loss, joint": lambda x, y, group: mo.covariance_loss(
        x, joint(x), joint=True, mean_weight=0.5, reduction="mean", **group
    ),
    "coral_loss": lambda x, y, group: mo.coral_loss(x[0], y[0], **group),
    "coral_loss, maps": lambda x, y, group: mo.coral_loss(x[1], y[1], **group),
    "vicreg_variance": lambda x, y, group: mo.vicreg_variance(x[0], gamma=3.0, **group),
    "vicreg_variance, maps": lambda x, y, group: mo.vicreg_variance(x[1], gamma=3.0, **group),
    "vicreg_covariance": lambda x, y, group: mo.vicreg_covariance(x[0], **group),
    "vicreg_covariance, maps": lambda x, y, group: mo.vicreg_covariance(x[1], **group),
    "style_loss": lambda x, y, group: mo.style_loss(maps(x), STYLE, **group),
    "style_loss, layers": lambda x, y, group: mo.style_loss(
        [maps(x), 2 * maps(x)], [STYLE, STYLE], normalize="mean", weight=[1.0, 0.5], **group
    ),
}
for method in ("auto", "covariance", "gram"):
    FUNCTIONS |= {
        f"covariance_distance, {method}": lambda x, y, group, method=method: mo.covariance_distance(
            x, y, method=method, cov_weight=[1.0, 0.3], **group
        ),
        f"covariance_distance, {method}, means": lambda x, y, group, method=method: mo.covariance_distance(
            x, y, method=method, **MEANS, **group
        ),
        f"covariance_distance, {method}, joint": lambda x, y, group, method=method: mo.covariance_distance(
            x, y, method=method, joint=True, mean_weight=0.5, reduction="mean", **group
        ),
    }
FUNCTIONS["covariance_distance, unbiased"] = lambda x, y, group: mo.covariance_distance(
    x, y, estimator="unbiased", **group
)
# Rows of every process: of the input, and of what it is compared with.
BATCHES = {
    "even": ((4, 4), (5, 5)),
    "uneven": ((5, 3), (1, 9)),
    "first empty": ((0, 8), (5, 5)),
    "last empty": ((8, 0), (5, 5)),
    "one of each empty": ((8, 0), (0, 10)),
}


def averaged(gradients, world):
    """As DistributedDataParallel does."""
    packed = torch.cat([g.reshape(-1) for g in gradients])
    if world > 1:
        dist.all_reduce(packed)
    return packed / world


def evaluate(rank, name, first, sizes, second=False):
    """Loss, gradients of the parameters, and of the features of both sides.

    With `second`, gradients of the sum over all rows of |dL/dz|^2, where L is the loss of the whole batch: a process
    sees dL/dz times the number of processes, and scales its part of the sum by it.
    """
    world = 1 if rank is None else RANKS
    net = Generator(first)
    z, other = (rows_of(rank, part, seed).clone().requires_grad_() for seed, part in enumerate(sizes))
    x, y = net(z), [2 * layer for layer in net(other)]
    group = {"process_group": False if rank is None else None}
    loss = value = FUNCTIONS[name](x, y, group)
    options = {"materialize_grads": True, "allow_unused": True}
    features = torch.autograd.grad(loss, [*x, *y], retain_graph=True, **options)
    if second:
        (slope,) = torch.autograd.grad(loss, z, create_graph=True)
        value = world * (slope / world).square().sum()
    gradients = torch.autograd.grad(value, list(net.parameters()), **options)
    return loss.detach(), averaged(gradients, world), features


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("first", [NARROW, WIDE])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_processes_give_value_and_gradient_of_all_rows(ranks, name, first, batch):
    results = ranks(evaluate, name, first, BATCHES[batch])
    loss, gradient, features = evaluate(None, name, first, BATCHES[batch])
    for value, parameters, _ in results:
        assert_same_bits(value, results[0][0])
        assert_close(value, loss, rows=1000)
        assert_close(parameters, gradient, rows=10_000)
    for i, expected in enumerate(features):
        parts = [result[2][i] for result in results]
        assert [len(part) for part in parts] == list(BATCHES[batch][i // 2])
        assert_close(torch.cat(parts) / RANKS, expected, rows=10_000)


@pytest.mark.parametrize("batch", ["uneven", "first empty", "last empty"])
@pytest.mark.parametrize("first", [NARROW, WIDE])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_cross_processes(ranks, name, first, batch):
    results = ranks(evaluate, name, first, BATCHES[batch], True)
    assert_close(results[0][1], evaluate(None, name, first, BATCHES[batch], True)[1], rows=100_000)


@pytest.mark.parametrize("first", [NARROW, WIDE])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows_at_all_give_nan_on_every_process(ranks, name, first):
    for loss, _, features in ranks(evaluate, name, first, ((0, 0), (0, 0))):
        assert loss.isnan()
        assert loss.shape == ()
        assert all(len(gradient) == 0 for gradient in features)


@pytest.mark.parametrize("first", [NARROW, WIDE])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "style" not in name and name != "moment_loss, means"])
def test_too_few_rows_of_all_processes_give_nan(ranks, name, first):
    for loss, _, _ in ranks(evaluate, name, first, ((1, 0), (0, 1))):
        assert loss.isnan()


def refused(rank, name, first):
    """The other process does nothing."""
    if rank == 0:
        x, y = (Generator(first)(torch.zeros(n, 3).double()) for n in (0, 4))
        with pytest.raises(ValueError, match=r"got (an empty batch|shape \(0|a batch of 0)"):
            FUNCTIONS[name](x, y, {})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_one_process_alone_no_rows_are_an_error(ranks, name):
    ranks(refused, name, NARROW)


def alone(rank, name):
    sizes = ((5, 4), (4, 6))
    x, y = (Generator(NARROW)(rows_of(rank, part, seed)) for seed, part in enumerate(sizes))
    return FUNCTIONS[name](x, y, {}).detach(), FUNCTIONS[name](x, y, {"process_group": False}).detach()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_of_one_process_unless_it_is_told(ranks, name):
    for rank, (value, told) in enumerate(ranks(alone, name)):
        assert_same_bits(value, told)
        assert_same_bits(value, alone(rank, name)[0])


OTHER = make_features(10, [(NARROW,), (3, 2)], torch.float64, 9)
CLASSES = {
    "CovarianceDistance, covariance": lambda: mo.CovarianceDistance(OTHER, method="covariance", **MEANS),
    "CovarianceDistance, gram": lambda: mo.CovarianceDistance(OTHER, method="gram", **MEANS),
    "CovarianceDistance, joint": lambda: mo.CovarianceDistance(OTHER, method="gram", joint=True, mean_weight=0.5),
    "CovarianceDistance, unbiased": lambda: mo.CovarianceDistance(OTHER, estimator="unbiased"),
}
for average_kind in AVERAGES:
    CLASSES |= {
        f"MomentLoss, {average_kind}": lambda average_kind=average_kind: mo.MomentLoss(
            make_target(shapes_of(OTHER), torch.float64), AVERAGES[average_kind]
        ),
        f"CovarianceLoss, {average_kind}": lambda average_kind=average_kind: mo.CovarianceLoss(
            covariances(OTHER), AVERAGES[average_kind], **MEANS
        ),
    }


def train(rank, name, batches):
    """Some steps: losses, gradients of the parameters, and what the loss keeps."""
    world = 1 if rank is None else RANKS
    loss_fn, net = CLASSES[name](), Generator(NARROW)
    results = []
    for seed, sizes in enumerate(batches):
        loss = loss_fn(net(rows_of(rank, sizes, seed)))
        results += [loss.detach(), averaged(torch.autograd.grad(loss, list(net.parameters())), world)]
    state = [v.clone() for k, v in loss_fn.state_dict().items() if v.is_floating_point() and "queue" not in k]
    return results, state


@pytest.mark.parametrize("name", CLASSES)
def test_modules_train_as_one_where_batches_are_empty(ranks, name):
    batches = ((4, 4), (8, 0), (0, 8), (5, 3))
    results, expected = ranks(train, name, batches), train(None, name, batches)
    assert_same_bits(*results)
    for got, wanted in zip([*results[0][0], *results[0][1]], [*expected[0], *expected[1]], strict=True):
        assert_close(got, wanted, rows=10_000)


@pytest.mark.parametrize("name", CLASSES)
def test_an_average_waits_where_no_process_has_rows(ranks, name):
    for results, state in ranks(train, name, ((4, 4), (0, 0), (4, 4))):
        assert results[2].isnan()
        assert results[4].isfinite()
        assert all(value.isfinite().all() for value in state)


def queued(rank, batches, queue):
    """Losses with past rows; those of one process from all rows, among which each process's last ones stay."""
    world = 1 if rank is None else RANKS
    loss_fn, net = mo.CovarianceDistance(OTHER, queue=queue), Generator(NARROW)
    results, past = [], [[x[:0] for x in OTHER]] * RANKS
    for seed, sizes in enumerate(batches):
        features = net(rows_of(rank, sizes, seed))
        if rank is None:
            joined = [torch.cat(rows) for rows in zip(features, *past, strict=True)]
            loss = mo.covariance_distance(joined, OTHER, method="gram")
            parts = zip(*[x.detach().split(sizes) for x in features], strict=True)
            past = [
                [torch.cat(both)[-queue:] for both in zip(old, new, strict=True)]
                for old, new in zip(past, parts, strict=True)
            ]
        else:
            loss = loss_fn(features)
        results += [loss.detach(), averaged(torch.autograd.grad(loss, list(net.parameters())), world)]
    if rank is not None:
        other = mo.CovarianceDistance(OTHER, queue=queue)
        other.load_state_dict(loss_fn.state_dict())
        features = net(rows_of(rank, (4, 4), 99))
        assert_same_bits(loss_fn(features).detach(), other(features).detach())
    return results


@pytest.mark.parametrize("queue", [3, 6, 13])
@pytest.mark.parametrize("first", [(4, 4), (5, 0), (0, 3)])
def test_past_rows_of_processes_with_and_without_rows(ranks, queue, first):
    batches = (first, (4, 3), (0, 5), (9, 0), (0, 0), (2, 6), (1, 4), (0, 4))
    results, expected = ranks(queued, batches, queue), queued(None, batches, queue)
    assert_same_bits(*results)
    for got, wanted in zip(results[0], expected, strict=True):
        assert_close(got, wanted, rows=10_000)


def of_two_layouts(rank, method):
    """One process has channels-last features, and one none or contiguous ones."""
    x, y = make_features(8, [(3, 4, 5)] * 2, torch.float64)
    if rank is None:
        return mo.covariance_distance(x, y, method=method)
    x, y = x.split([8, 0])[rank], y.split([5, 3])[rank]
    x = x.to(memory_format=torch.channels_last) if rank == 0 else x
    return mo.covariance_distance(x, y, method=method, process_group=None)


@pytest.mark.parametrize("method", ["covariance", "gram"])
def test_processes_may_have_features_of_different_layouts(ranks, method):
    for value in ranks(of_two_layouts, method):
        assert_close(value, of_two_layouts(None, method), rows=1000)
