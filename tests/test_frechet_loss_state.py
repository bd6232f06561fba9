"""The state of the Frechet loss: the average of the mixture, the queue, and when they advance."""

import copy
import math

import frechet_reference
import pytest
import torch
from frechet_problems import cosine, problem
from helpers import assert_raises, assert_same_bits, leaves

import moment_ops as mo

METHODS = ("qdwh", "eigh")
STATES = {
    "average": {"average": mo.MovingAverage(0.7)},
    "corrected average": {"average": mo.MovingAverage(0.7, bias_correction=True)},
    "short queue": {"queue": 10},
    "long queue": {"queue": 30},
}
COLUMNS = 12


def batches(count, rows=8, columns=COLUMNS, **options):
    """Batches whose means move."""
    drawn = [problem(rows, columns, seed=seed, **options)[1] for seed in range(count)]
    return [x + 0.2 * seed for seed, x in enumerate(drawn)]


def target_of(columns=COLUMNS, **options):
    return problem(2, columns, **options)[0]


def step(loss_fn, x, **options):
    (x,) = leaves([x])
    value = loss_fn(x, **options)
    return value.detach(), torch.autograd.grad(value, x)[0]


def state_of(loss_fn):
    return {name: value.clone() for name, value in loss_fn.state_dict().items() if not name.startswith("target")}


def assert_is(ours, exact, x):
    value, gradient = ours
    (exact_gradient,) = torch.autograd.grad(exact, x)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert 1 - cosine(gradient, exact_gradient) <= 1e-8
    assert gradient.double().norm() == pytest.approx(exact_gradient.double().norm(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("rows", [5, 40])
def test_an_average_is_that_of_the_mixture(rows, correction, bias_correction, method):
    """The average of `C + m m'` and of m, as the published code keeps them; the gradient goes through the batch."""
    target = target_of()
    average = mo.MovingAverage(0.7, bias_correction=bias_correction)
    loss_fn = mo.FrechetLoss(target, average, correction=correction, method=method)
    reference = frechet_reference.Average(0.7, correction, bias_correction)
    for x in batches(5, rows):
        exact = reference(x.requires_grad_(), target.mean, target.cov[0])
        assert_is(step(loss_fn, x), exact, x)


def test_the_first_batch_is_the_first_average():
    target, x = problem(8, COLUMNS)
    for bias_correction in (False, True):
        loss_fn = mo.FrechetLoss(target, mo.MovingAverage(0.9, bias_correction=bias_correction))
        assert loss_fn(x).item() == pytest.approx(mo.frechet_loss(x, target).item(), rel=1e-6)


@pytest.mark.parametrize("rank", [None, 20])
def test_an_average_does_not_drift(rank):
    """After 500 steps its state is still that of all batches: it is kept in float64."""
    target = target_of(64, kind="power", condition=1e6, rank=rank)
    loss_fn = mo.FrechetLoss(target, mo.MovingAverage(0.99), method="qdwh")
    reference = frechet_reference.Average(0.99)
    generator = torch.Generator().manual_seed(0)
    _, base = problem(500, 64, kind="power", condition=1e6)
    for _ in range(500):
        x = base[torch.randint(500, (16,), generator=generator)]
        loss_fn.fill([x])
        reference.advance(x)
    last = base[:16].clone().requires_grad_()
    exact = reference(last, target.mean, target.cov[0])
    value, gradient = step(loss_fn, last)
    (exact_gradient,) = torch.autograd.grad(exact, last)
    assert value.item() == pytest.approx(exact.item(), rel=5e-5)
    assert 1 - cosine(gradient, exact_gradient) <= 1e-5


@pytest.mark.parametrize("method", [*METHODS, "polynomial"])
@pytest.mark.parametrize("queue", [1, 10, 11, 12, 30, 100])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_a_queue_is_the_union_of_the_batch_and_past_rows(rows, queue, method):
    target = target_of()
    loss_fn = mo.FrechetLoss(target, queue=queue, method=method, correction=0)
    past = torch.empty(0, COLUMNS)
    for x in batches(6, rows):
        exact = frechet_reference.of_rows(torch.cat([past, x.requires_grad_()]), target.mean, target.cov[0], 0)
        (exact_gradient,) = torch.autograd.grad(exact, x)
        value, gradient = step(loss_fn, x)
        assert value.item() == pytest.approx(exact.item(), rel=2e-5)
        assert 1 - cosine(gradient, exact_gradient) <= 1e-6
        past = torch.cat([past, x.detach()])[-queue:]


def test_a_long_queue_does_not_drift():
    target = target_of()
    loss_fn = mo.FrechetLoss(target, queue=20)
    drawn = batches(10, rows=7)
    for _ in range(30):
        loss_fn.fill(drawn)
    fresh = mo.FrechetLoss(target, queue=20)
    fresh.fill([torch.cat(drawn)[-20:]])
    torch.testing.assert_close(loss_fn.cov_0, fresh.cov_0, rtol=0, atol=1e-11 * fresh.cov_0.norm().item())
    torch.testing.assert_close(loss_fn.mean_0, fresh.mean_0, rtol=1e-12, atol=1e-12)


def test_batches_of_a_queue_may_have_any_sizes():
    target = target_of()
    for queue in (10, 30):
        loss_fn = mo.FrechetLoss(target, queue=queue)
        past = torch.empty(0, COLUMNS)
        for rows in (3, 50, 2, 9, 30):
            x = problem(rows, COLUMNS, seed=rows)[1]
            exact = frechet_reference.of_rows(torch.cat([past, x]), target.mean, target.cov[0])
            assert loss_fn(x).item() == pytest.approx(exact.item(), rel=1e-5)
            past = torch.cat([past, x])[-queue:]


def test_moving_averages_of_means_far_from_zero_keep_their_digits():
    target, _ = problem(2, COLUMNS)
    far = mo.Moments(target.mean + 1e3, cov=target.cov)
    near_loss, far_loss = (mo.FrechetLoss(t, mo.MovingAverage(0.7)) for t in (target, far))
    for x in batches(4):
        shifted = x + 1e3
        near, distant = near_loss(shifted - 1e3), far_loss(shifted)
        assert distant.item() == pytest.approx(near.item(), rel=1e-3)
        exact = near_loss.cov_0
    torch.testing.assert_close(far_loss.cov_0, exact, rtol=0, atol=1e-3 * exact.norm().item())


@pytest.mark.parametrize("state", STATES)
def test_deferred_steps_are_steps(state):
    target = target_of()
    plain, deferred = (mo.FrechetLoss(target, **STATES[state]) for _ in range(2))
    for x in batches(4):
        before = state_of(deferred)
        other = deferred(3 * x, commit=False)
        assert other != plain.eval()(x)
        plain.train()
        ours, theirs = step(deferred, x, commit=False), step(plain, x)
        assert_same_bits(ours, theirs)
        assert_same_bits(state_of(deferred), before)
        deferred.commit()
        assert_same_bits(state_of(deferred), state_of(plain))
    assert_raises(deferred.commit, RuntimeError, "commit: got no pending update")


@pytest.mark.parametrize("state", STATES)
def test_filling_counts_as_steps(state):
    filled, stepped = (mo.FrechetLoss(target_of(), **STATES[state]) for _ in range(2))
    filled.fill(iter(batches(5)))
    for x in batches(5):
        stepped(x)
    assert_same_bits(state_of(filled), state_of(stepped))


@pytest.mark.parametrize("state", STATES)
def test_evaluation_leaves_the_state(state):
    loss_fn = mo.FrechetLoss(target_of(), **STATES[state])
    loss_fn.fill(batches(3))
    before, x = state_of(loss_fn), batches(4)[3]
    value = loss_fn.eval()(x)
    assert_same_bits(state_of(loss_fn), before)
    assert loss_fn.train()(x) == value


@pytest.mark.parametrize("state", STATES)
def test_a_restored_loss_continues_bit_for_bit(state):
    drawn = batches(6)
    loss_fn, other = (mo.FrechetLoss(target_of(), **STATES[state]) for _ in range(2))
    other.reset(target_of(seed=5))
    loss_fn.fill(drawn[:3])
    other.load_state_dict(copy.deepcopy(loss_fn.state_dict()))
    for x in drawn[3:]:
        assert_same_bits(step(loss_fn, x), step(other, x))
    assert_same_bits(loss_fn.state_dict(), other.state_dict())


@pytest.mark.parametrize("state", STATES)
def test_reset_begins_anew(state):
    first, second = target_of(), target_of(seed=7)
    loss_fn = mo.FrechetLoss(first, **STATES[state])
    loss_fn.fill(batches(3))
    addresses = {name: value.data_ptr() for name, value in loss_fn.named_buffers() if "queue" not in name}
    loss_fn.reset(second)
    fresh = mo.FrechetLoss(second, **STATES[state])
    for x in batches(3):
        assert_same_bits(step(loss_fn, x), step(fresh, x))
    assert {n: v.data_ptr() for n, v in loss_fn.named_buffers() if "queue" not in n} == addresses
    loss_fn.reset()
    assert int(loss_fn.state_dict().get("step_0", loss_fn.state_dict().get("queue_count_0"))) == 0


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("by", ["call", "fill"])
def test_what_is_not_finite_leaves_the_state(state, value, by):
    loss_fn = mo.FrechetLoss(target_of(), **STATES[state])
    loss_fn.fill(batches(2))
    before, bad = state_of(loss_fn), batches(1)[0]
    bad[3, 4] = value
    if by == "call":
        assert not loss_fn(bad).isfinite()
    else:
        loss_fn.fill([bad])
    assert_same_bits(state_of(loss_fn), before)
    assert loss_fn(batches(1)[0]).isfinite()


def test_layers_advance_apart():
    """A layer that is not finite keeps its state; the others advance."""
    pairs = [problem(8, columns, seed=columns) for columns in (6, COLUMNS)]
    target = mo.Moments(
        torch.cat([t.mean for t, _ in pairs]), cov=tuple(t.cov[0] for t, _ in pairs), shapes=((6,), (COLUMNS,))
    )
    loss_fn = mo.FrechetLoss(target, mo.MovingAverage(0.5))
    first, second = (x for _, x in pairs)
    loss_fn([first, second])
    loss_fn([first, second * math.nan])
    assert loss_fn.step_0 == 2
    assert loss_fn.step_1 == 1
    assert loss_fn.distances[0].isfinite()
    assert loss_fn.distances[1].isnan()


@pytest.mark.parametrize("state", STATES)
def test_buffers_keep_their_dtype(state):
    loss_fn = mo.FrechetLoss(target_of(), **STATES[state])
    loss_fn.fill(batches(1))
    before = state_of(loss_fn)
    assert_same_bits(state_of(loss_fn.to(torch.bfloat16).half()), before)


@pytest.mark.parametrize("state", STATES)
def test_losses_with_a_state_compile_to_one_graph(state):
    torch._dynamo.reset()
    plain, compiled = (mo.FrechetLoss(target_of(), **STATES[state]) for _ in range(2))
    for loss_fn in (plain, compiled):
        loss_fn.fill(batches(1))
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for x in batches(3):
        assert_same_bits(step(call, x), step(plain, x))
    assert_same_bits(state_of(compiled), state_of(plain))
    torch._dynamo.reset()


def test_an_average_under_a_transform_advances_once():
    plain, transformed = (mo.FrechetLoss(target_of(), mo.MovingAverage(0.5)) for _ in range(2))
    for x in batches(2):
        torch.testing.assert_close(torch.func.grad(transformed)(x), step(plain, x)[1])
    assert_same_bits(state_of(transformed), state_of(plain))


def test_only_one_kind_of_state_is_accepted():
    target = target_of()
    with pytest.raises(TypeError, match=r"^average: got AdamMovingAverage, expected MovingAverage or None"):
        mo.FrechetLoss(target, mo.AdamMovingAverage())
    with pytest.raises(ValueError, match=r"^queue: got 5 together with an average, expected only one of them"):
        mo.FrechetLoss(target, mo.MovingAverage(0.5), queue=5)
    with pytest.raises(ValueError, match=r"^queue: got -1, expected a non-negative number of past rows"):
        mo.FrechetLoss(target, queue=-1)
    with pytest.raises(TypeError, match=r"^queue: got 1.5, expected an int"):
        mo.FrechetLoss(target, queue=1.5)
    loss_fn = mo.FrechetLoss(target, queue=5)
    loss_fn.fill(batches(1))
    with pytest.raises(RuntimeError, match="queue: got a state of 5 past rows, expected 6"):
        mo.FrechetLoss(target, queue=6).load_state_dict(loss_fn.state_dict())
