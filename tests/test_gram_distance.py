"""The covariance distance through inner products of rows: its value, its estimators, gradients, memory and time."""

import itertools
import math
import time

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, assert_same_bits, epsilon, leaves, make_features, statistics_dtype
from ranks import RANKS, Generator, rows_of

import moment_ops as mo
from bench import memory
from bench.workloads import WORKLOADS
from bench.workloads import make_features as make_maps
from moment_ops.losses.gram_distance import gram_distance

SHAPES = ((5,), (3, 2, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHT = (1.0, 0.5)


def covariance(x, correction=1):
    rows = x.flatten(1).double()
    rows = rows - rows[0].detach()
    rows = rows - rows.mean(0)
    return rows.T @ rows / (len(rows) - correction)


def exact_loss(input, other, correction=1, weight=WEIGHT):
    """The definition, through (D, D) covariances in float64."""
    differences = [covariance(x, correction) - covariance(y, correction) for x, y in zip(input, other, strict=True)]
    return sum(w * d.square().sum() for w, d in zip(weight, differences, strict=True))


def assert_value(actual, exact, input, other, weight=WEIGHT):
    """Within epsilons of the squared norms of the covariances, absolutely, as far as sums over the rows lose them."""
    norms = [covariance(x, 0).norm() + covariance(y, 0).norm() for x, y in zip(input, other, strict=True)]
    scale = sum(w * norm**2 for w, norm in zip(weight, norms, strict=True))
    rows = len(input[0]) + len(other[0])
    assert actual.dtype == statistics_dtype(input[0].dtype)
    assert (actual - exact).abs() <= 16 * rows**0.5 * epsilon(actual.dtype) * scale


def make_sides(n=7, m=9, dtype=torch.float32, shapes=SHAPES):
    return leaves(make_features(n, shapes, dtype)), leaves(make_features(m, shapes, dtype, seed=1))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("correction", [0, 1, 2])
@pytest.mark.parametrize("rows", [(7, 9), (40, 3)])
def test_the_distance_of_two_covariances_and_its_gradients_to_both(rows, correction, dtype):
    input, other = make_sides(*rows, dtype)
    loss = gram_distance(input, other, correction=correction, weight=WEIGHT)
    wide = [leaves([x.double() for x in features]) for features in (input, other)]
    exact = exact_loss(*wide, correction)
    assert_value(loss, exact, input, other)
    gradients = torch.autograd.grad(loss, input + other)
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, wide[0] + wide[1]), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, rows=sum(rows) * 17)


def test_the_gradient_is_the_published_product_of_rows():
    (x,), (y,) = make_sides(6, 8, torch.float64, [(30,)])
    (gradient,) = torch.autograd.grad(gram_distance([x], [y], weight=[1.0]), x)
    xc, yc = x.detach() - x.detach().mean(0), y.detach() - y.detach().mean(0)
    assert_close(gradient, 4 / 5 * (xc @ xc.T @ xc / 5 - xc @ yc.T @ yc / 7), rows=100)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_sides_whose_means_are_far_apart_lose_no_digits(estimator):
    (x,), (y,) = make_sides(20, 30, shapes=[(50,)])
    x = (x.detach() + 1000 * torch.linspace(-1, 1, 50)).requires_grad_()
    loss = gram_distance([x], [y], estimator=estimator, weight=[1.0])
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    exact = gram_distance([wide[0]], [wide[1]], estimator=estimator, weight=[1.0])
    gradients = torch.autograd.grad(loss, (x, y)), torch.autograd.grad(exact, wide)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_joint_layers_are_one_feature_vector(estimator):
    input, other = make_sides(dtype=torch.float64)
    joined = [[torch.cat([x.flatten(1) for x in features], 1)] for features in (input, other)]
    joint = gram_distance(input, other, joint=True, estimator=estimator, weight=[3.0])
    one = gram_distance(*joined, estimator=estimator, weight=[3.0])
    assert_close(joint, one, rows=100)
    if estimator == "biased":
        assert_close(joint, exact_loss(*joined, weight=[3.0]), rows=100)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_a_queue_counts_among_the_rows_of_the_input_and_gets_no_gradient(estimator):
    input, other = make_sides(dtype=torch.float64)
    queue = leaves(make_features(4, SHAPES, torch.float64, seed=2))
    loss = gram_distance(input, other, estimator=estimator, weight=WEIGHT, queue=queue)
    joined = [torch.cat([x, q.detach()]) for x, q in zip(input, queue, strict=True)]
    expected = gram_distance(joined, other, estimator=estimator, weight=WEIGHT)
    assert_close(loss, expected, rows=100)
    tensors = input + other
    ours, theirs = (torch.autograd.grad(value, tensors) for value in (loss, expected))
    for got, wanted in zip(ours, theirs, strict=True):
        assert_close(got, wanted, rows=100)
    assert torch.autograd.grad(gram_distance(input, other, weight=WEIGHT, queue=queue), queue, allow_unused=True) == (
        None,
        None,
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_means_far_from_zero_cost_no_digits(mean, estimator):
    """Centring products of raw features would be 22 % wrong at a thousand standard deviations."""
    input, other = ([x.detach() + mean for x in side] for side in make_sides(32, 48, shapes=[(300,)]))
    input, other = leaves(input), leaves(other)
    wide = [leaves([x.double() for x in side]) for side in (input, other)]
    loss = gram_distance(input, other, estimator=estimator, weight=[1.0])
    exact = gram_distance(*wide, estimator=estimator, weight=[1.0])
    if estimator == "biased":
        assert_close(exact, exact_loss(*wide, weight=[1.0]), rows=10_000)
    assert_value(loss, exact, input, other, [1.0])
    (ours,), (theirs,) = (torch.autograd.grad(v, s[:1]) for v, s in ((loss, input), (exact, wide[0])))
    assert_close(ours, theirs, rows=80)


def population(points, probabilities, rows):
    """Every sample of `rows` rows and its probability, the covariance, and the mean fourth power of the distance."""
    probabilities = torch.tensor(probabilities, dtype=torch.float64)
    picks = torch.tensor(list(itertools.product(range(len(points)), repeat=rows)))
    centred = points - probabilities @ points
    covariance = centred.T @ (probabilities[:, None] * centred)
    return points[picks], probabilities[picks].prod(1), covariance, probabilities @ centred.square().sum(1).square()


def expectation(first, second, estimator):
    """The loss's mean over all pairs of samples: a layer each, whose weight is its probability."""
    pairs = list(itertools.product(range(len(first[0])), range(len(second[0]))))
    return gram_distance(
        [first[0][i] for i, _ in pairs],
        [second[0][j] for _, j in pairs],
        estimator=estimator,
        weight=[float(first[1][i] * second[1][j]) for i, j in pairs],
    )


SKEWED = (torch.tensor([[3.0, 1.0], [0.0, -2.0]], dtype=torch.float64), (0.3, 0.7))
SCATTERED = (torch.tensor([[1.0, 1.0], [-2.0, 0.5], [0.0, 3.0]], dtype=torch.float64), (0.2, 0.5, 0.3))
# Three points with the moments of the normal distribution, up to the fifth.
HERMITE = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
NORMAL = (
    torch.cartesian_prod(HERMITE, HERMITE) @ torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=torch.float64),
    tuple(a * b / 36 for a in (1, 4, 1) for b in (1, 4, 1)),
)


def test_the_unbiased_estimator_is_exact_in_the_mean():
    first, second = population(*SKEWED, 4), population(*SCATTERED, 4)
    expected = (first[2] - second[2]).square().sum()
    assert_close(expectation(first, second, "unbiased"), expected, rows=100)


def test_the_biased_estimator_has_its_bias_in_the_mean():
    def bias(covariance, fourth, rows):
        """Mean of `||C||_F^2` of `rows` rows, less that of the population."""
        square, trace = covariance.square().sum(), covariance.trace()
        return (fourth - square) / rows + (trace**2 + square) / (rows * (rows - 1))

    first, second = population(*NORMAL, 2), population(*SCATTERED, 3)
    normal = (first[2].trace() ** 2 + first[2].square().sum()) / (2 - 1)
    assert_close(bias(first[2], first[3], 2), normal, rows=10)
    expected = (first[2] - second[2]).square().sum() + normal + bias(second[2], second[3], 3)
    assert_close(expectation(first, second, "biased"), expected, rows=100)


@pytest.mark.usefixtures("backend")
def test_the_unbiased_estimator_is_that_of_the_literature():
    input, other = make_sides(6, 5, torch.float64)

    def squared_norm(x):
        """HSIC_1 of Song et al. 2012, term by term."""
        k = x.flatten(1) @ x.flatten(1).T
        k = k - k.diag().diag()
        n, ones = len(k), torch.ones(len(k), dtype=k.dtype)
        terms = (k @ k).trace(), (ones @ k @ ones) ** 2 / ((n - 1) * (n - 2)), -2 / (n - 2) * (ones @ k @ k @ ones)
        return sum(terms) / (n * (n - 3))

    expected = sum(
        w * (squared_norm(x) + squared_norm(y) - 2 * (covariance(x) * covariance(y)).sum())
        for w, x, y in zip(WEIGHT, input, other, strict=True)
    )
    loss = gram_distance(input, other, estimator="unbiased", weight=WEIGHT)
    assert_close(loss, expected, rows=1000)
    tensors = input + other
    for ours, theirs in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True):
        assert_close(ours, theirs, rows=1000)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("joint", [False, True])
def test_twice_differentiable_with_respect_to_both_sides(estimator, joint):
    input, other = make_sides(4, 5, torch.float64, ((3,), (2,)))
    queue = make_features(2, ((3,), (2,)), torch.float64, seed=2)

    def function(*tensors):
        return gram_distance(
            tensors[:2], tensors[2:], estimator=estimator, joint=joint, weight=[1.0] * (2 - joint), queue=queue
        )

    assert torch.autograd.gradcheck(function, input + other)
    assert torch.autograd.gradgradcheck(function, input + other)


@pytest.mark.parametrize("other_too", [True, False])
def test_channels_last_features_get_channels_last_gradients(other_too):
    (x,), (y,) = make_sides(shapes=[(3, 4, 5)])
    (expected,) = torch.autograd.grad(gram_distance([x], [y], weight=[1.0]), x)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    other = y.to(memory_format=torch.channels_last) if other_too else y
    (gradient,) = torch.autograd.grad(gram_distance([last], [other], weight=[1.0]), last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert_close(gradient, expected.double(), rows=100)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiles_to_one_graph(backend):
    options = {"weight": WEIGHT, "estimator": "unbiased"}
    input, other = make_sides()
    with mo.backend(backend):
        compiled = torch.compile(gram_distance, fullgraph=True, backend="aot_eager")
        results = []
        for function in (gram_distance, compiled):
            loss = function(input, other, **options)
            results.append([loss.detach(), *torch.autograd.grad(loss, input + other)])
    torch._dynamo.reset()
    assert_same_bits(*results)


@pytest.mark.slow
def test_inductor_gives_the_numbers_of_eager_mode():
    input, other = make_sides()
    step = torch.compile(lambda x, y: gram_distance([2 * t for t in x], y, weight=WEIGHT), fullgraph=True)
    loss = gram_distance([2 * t for t in input], other, weight=WEIGHT)
    expected = torch.autograd.grad(loss, input)
    for ours, theirs in zip(torch.autograd.grad(step(input, other), input), expected, strict=True):
        assert_close(ours, theirs.double(), rows=100)
    torch._dynamo.reset()


def test_autocast_changes_nothing():
    results = []
    for enabled in (True, False):
        input, other = make_sides()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = gram_distance(input, other, weight=WEIGHT)
            first = torch.autograd.grad(loss, input, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), input)
        results.append([loss.detach(), *(g.detach() for g in first), *second])
    assert_same_bits(*results)


def test_equal_rows_have_no_distance():
    (x,), _ = make_sides(64, 64, shapes=[(3000,)])
    loss = gram_distance([x], [x.detach().clone()], weight=[1.0])
    assert_value(loss, torch.tensor(0.0), [x], [x], [1.0])


def test_all_of_vgg19_takes_seconds_and_a_few_megabytes():
    """303,104 columns: one covariance of all layers together would take 367 GB, that of the first layer 17 GB."""
    workload = WORKLOADS["vgg19"]
    memory.return_freed_memory()
    input = make_maps(workload, torch.float32)
    other = [y.detach() for y in make_maps(workload, torch.float32, seed=1)]

    def step():
        loss = gram_distance(input, other, joint=True, weight=[1.0])
        return torch.autograd.grad(loss, input)

    step()
    start = time.process_time()
    step()
    seconds = time.process_time() - start
    # 0.4 s on one quiet core. Of this process alone: the machine may do other things, too.
    assert seconds < 5
    peak = memory.peak_over_rest(step)
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert peak < workload.bytes(torch.float32) + 64 * 2**20


# Rows of every process: of the input, of what it is compared with, of the queue.
BATCHES = {"even": ((6, 6), (8, 8), (2, 2)), "uneven": ((9, 3), (2, 5), (4, 1)), "one row": ((6, 1), (1, 7), (1, 1))}


def gradients(rank, sizes, estimator, second, create_graph=False):
    """Loss and gradients of the parameters, averaged as DistributedDataParallel does.

    With `second` those of the sum over all rows of |dL/dz|^2, where L is the loss of the whole batch: a process sees
    dL/dz times the number of processes, and scales its part of the sum by it.
    """
    world = 1 if rank is None else RANKS
    net = Generator()
    z, other, queue = (rows_of(rank, part, seed).clone() for seed, part in enumerate(sizes))
    z.requires_grad_(second)
    loss = gram_distance(
        net(z),
        [x.detach() * 2 for x in net(other)],
        estimator=estimator,
        weight=WEIGHT,
        queue=[x.detach() for x in net(queue)],
        process_group=False if rank is None else None,
    )
    value = loss
    if second:
        (first,) = torch.autograd.grad(loss, z, create_graph=True)
        value = world * (first / world).square().sum()
    parameters = list(net.parameters())
    grads = torch.autograd.grad(value, parameters, create_graph=create_graph, materialize_grads=True)
    packed = torch.cat([g.detach().reshape(-1) for g in grads])
    if rank is not None:
        dist.all_reduce(packed)
    return loss.detach(), packed / world


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_processes_share_the_loss_and_the_gradient_of_all_rows(ranks, estimator, batch):
    results = ranks(gradients, BATCHES[batch], estimator, False)
    assert_same_bits(*results)
    expected = gradients(None, BATCHES[batch], estimator, False)
    for ours, theirs in zip(results[0], expected, strict=True):
        assert_close(ours, theirs, rows=1000)


@pytest.mark.parametrize("create_graph", [False, True])
def test_second_derivatives_cross_processes(ranks, create_graph):
    results = ranks(gradients, BATCHES["uneven"], "unbiased", True, create_graph)
    expected = gradients(None, BATCHES["uneven"], "unbiased", True)
    assert_close(results[0][1], expected[1], rows=10_000)


def with_equal_rows(rank, estimator):
    """The input's rows are spread over the processes, the others are the same on all."""
    z = rows_of(rank, (3, 2)).clone().requires_grad_()
    other = rows_of(None, (6,), 1).clone().requires_grad_()
    loss = gram_distance(
        [z],
        [other],
        estimator=estimator,
        weight=[1.0],
        process_group=False if rank is None else None,
        gather_other=False,
    )
    return loss.detach(), *torch.autograd.grad(loss, [z, other])


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_other_rows_that_all_processes_have_count_once(ranks, estimator):
    results = ranks(with_equal_rows, estimator)
    loss, input_gradient, other_gradient = with_equal_rows(None, estimator)
    for value, _, gradient in results:
        assert_close(value, loss, rows=100)
        assert_close(gradient, other_gradient, rows=100)
    assert_close(torch.cat([g for _, g, _ in results]) / RANKS, input_gradient, rows=100)


def few_rows(rank, rows, joint):
    x = [t.requires_grad_() for t in torch.randn(2, rows, 3)]
    options = {"joint": joint, "weight": [1.0] * (2 - joint), "process_group": None}
    loss = gram_distance(x, x, estimator="unbiased", **options)
    return loss.detach(), *torch.autograd.grad(loss, x)


@pytest.mark.parametrize("joint", [False, True])
def test_the_rows_of_all_processes_have_to_be_enough(ranks, joint):
    for results in ranks(few_rows, 2, joint):
        assert all(result.isfinite().all() for result in results)
    for results in ranks(few_rows, 1, joint):
        assert all(result.isnan().all() for result in results)


# Of rows: standard deviations whose squares have no sum in float32; a weight that makes up for them.
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("size", "weight"), [(3e18, 1e-37), (1e20, 1e-44)])
def test_a_distance_that_fits_comes_out_with_its_gradient_where_products_of_rows_do_not_fit(size, weight):
    x = (torch.randn(6, 2000) * size).requires_grad_()
    y = torch.randn(6, 2000)
    loss = mo.covariance_distance(x, y, method="gram", cov_weight=weight / 2000**2)
    (dx,) = torch.autograd.grad(loss, x)
    wide = x.detach().double().requires_grad_()
    exact = (torch.cov(wide.mT) - torch.cov(y.double().mT)).square().mean() * weight
    assert_close(loss, exact.detach(), rows=2000)
    assert_close(dx, torch.autograd.grad(exact, wide)[0], rows=2000)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [3e18, 1e20, 1e37])
def test_losses_through_products_of_rows_that_do_not_fit_are_infinite(size):
    x, y = torch.randn(6, 2000) * size, torch.randn(6, 2000)
    for loss in (mo.coral_loss(x, y), mo.vicreg_covariance(x), mo.covariance_distance(x, y, method="gram")):
        assert loss.item() == float("inf")
    x[3, 5] = float("nan")
    for loss in (mo.coral_loss(x, y), mo.vicreg_covariance(x), mo.covariance_distance(x, y, method="gram")):
        assert loss.isnan()
