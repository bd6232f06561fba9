"""Updates of a loss's state that wait for `commit()`, and states that are filled."""

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_raises, assert_same_bits, make_features, make_target
from ranks import Generator, rows_of

import moment_ops as mo

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((4,), (3, 2))
AVERAGES = {"none": None, "moving": mo.MovingAverage(0.7, bias_correction=True), "adam": mo.AdamMovingAverage(lr=0.1)}
OTHER = make_features(9, SHAPES, torch.float64, 9)


def target(scale=1.0):
    cov = tuple(scale * torch.cov(x.flatten(1).mT) for x in OTHER)
    mean = scale * torch.cat([x.flatten(1).mean(0) for x in OTHER])
    return mo.Moments(mean, cov=cov, shapes=tuple((len(c),) for c in cov))


# name: (a new loss, a new target)
LOSSES = {}
for kind, average in AVERAGES.items():
    LOSSES |= {
        f"MomentLoss, {kind}": (
            lambda average=average: mo.MomentLoss(make_target(SHAPES), average),
            lambda: make_target(SHAPES, seed=5),
        ),
        f"CovarianceLoss, {kind}": (
            lambda average=average: mo.CovarianceLoss(target(), average, mean_weight=0.5),
            lambda: target(2.0),
        ),
    }
LOSSES["CovarianceDistance"] = (
    lambda: mo.CovarianceDistance(OTHER, queue=12, mean_weight=0.5),
    lambda: [2 * x for x in OTHER],
)
LOSSES["CovarianceDistance, covariance"] = (
    lambda: mo.CovarianceDistance(OTHER, method="covariance", mean_weight=0.5),
    lambda: [2 * x for x in OTHER],
)
STATEFUL = [name for name in LOSSES if "none" not in name and "covariance" not in name]

all_losses = pytest.mark.parametrize("name", LOSSES)
stateful = pytest.mark.parametrize("name", STATEFUL)


def batch(seed, rows=7, dtype=torch.float64):
    return [x.requires_grad_() for x in make_features(rows, SHAPES, dtype, seed)]


def after_a_step(name):
    loss = LOSSES[name][0]()
    loss(batch(0))
    return loss


def state_of(loss):
    return {name: value.clone() for name, value in loss.state_dict().items()}


def value_and_gradient(loss, features, **options):
    value = loss(features, **options)
    return [value.detach(), *torch.autograd.grad(value, features)]


@all_losses
def test_a_committed_step_is_an_ordinary_one_bit_for_bit(name):
    plain, ours = LOSSES[name][0](), LOSSES[name][0]()
    for seed, rows in enumerate((7, 5, 16, 2)):
        before = state_of(ours)
        expected = value_and_gradient(plain, batch(seed, rows))
        assert_same_bits(value_and_gradient(ours, batch(seed, rows), commit=False), expected)
        assert_same_bits(state_of(ours), before)
        ours.commit()
        assert_same_bits(state_of(ours), state_of(plain))


@stateful
def test_a_step_that_is_not_committed_leaves_no_trace(name):
    plain, ours = after_a_step(name), after_a_step(name)
    ours(batch(1), commit=False)
    assert_same_bits(value_and_gradient(ours, batch(2)), value_and_gradient(plain, batch(2)))
    assert_same_bits(state_of(ours), state_of(plain))


@stateful
def test_a_second_call_replaces_the_pending_update(name):
    plain, ours = after_a_step(name), after_a_step(name)
    ours(batch(1, rows=3), commit=False)
    ours(batch(2), commit=False)
    ours.commit()
    plain(batch(2))
    assert_same_bits(state_of(ours), state_of(plain))


def saved_and_loaded(loss):
    loss.load_state_dict(loss.state_dict())


def failed(loss):
    with pytest.raises(ValueError, match="input: got 1 layers"):
        loss(batch(1)[0], commit=False)


def filled(loss):
    if loss._state_names:
        loss.fill([batch(3)])
    else:
        loss(batch(3))


DROPPING = {
    "commit": lambda loss: loss.commit(),
    "a call": lambda loss: loss(batch(2)),
    "a call that fails": failed,
    "reset": lambda loss: loss.reset(),
    "load_state_dict": saved_and_loaded,
    "fill": filled,
}


@all_losses
@pytest.mark.parametrize("way", DROPPING)
def test_without_a_pending_update_there_is_nothing_to_commit(name, way):
    loss = after_a_step(name)
    message = "commit: got no pending update, expected a call with commit=False"
    assert_raises(loss.commit, RuntimeError, message)
    loss(batch(1), commit=False)
    DROPPING[way](loss)
    before = state_of(loss)
    assert_raises(loss.commit, RuntimeError, message)
    assert_same_bits(state_of(loss), before)


@all_losses
def test_reset_with_a_new_target_drops_the_pending_update(name):
    loss = after_a_step(name)
    loss(batch(1), commit=False)
    loss.reset(LOSSES[name][1]())
    assert_raises(loss.commit, RuntimeError, "commit: got no pending update")
    loss(batch(2), commit=False)
    loss.commit()


@stateful
def test_evaluation_leaves_the_pending_update_alone(name):
    plain, ours = after_a_step(name), after_a_step(name)
    ours(batch(1), commit=False)
    ours.eval()
    assert_same_bits(ours(batch(2), commit=False), plain.eval()(batch(2)))
    ours.commit()
    assert_raises(ours.commit, RuntimeError, "commit: got no pending update")
    plain.train()(batch(1))
    assert_same_bits(state_of(ours), state_of(plain))


@stateful
def test_a_call_in_evaluation_leaves_nothing_pending(name):
    loss = after_a_step(name).eval()
    loss(batch(1), commit=False)
    assert_raises(loss.commit, RuntimeError, "commit: got no pending update")


@stateful
def test_the_pending_update_is_not_saved(name):
    loss = after_a_step(name)
    names = set(loss.state_dict())
    loss(batch(1), commit=False)
    assert set(loss.state_dict()) == names
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = LOSSES[name][0]()
    other.load_state_dict(torch.load(file))
    assert_raises(other.commit, RuntimeError, "commit: got no pending update")
    assert_same_bits(state_of(other), state_of(loss))


@stateful
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_the_pending_update_goes_with_a_copy(name, copied):
    loss = after_a_step(name)
    loss(batch(1), commit=False)
    other = copied(loss)
    loss.commit()
    other.commit()
    assert_same_bits(state_of(loss), state_of(other))


@stateful
def test_pending_updates_and_states_keep_their_addresses(name):
    loss = after_a_step(name)
    loss(batch(1), commit=False)
    addresses = {key: value.data_ptr() for key, value in loss.named_buffers()}
    loss.commit()
    loss(batch(2), commit=False)
    loss.reset()
    loss(batch(3), commit=False)
    loss(batch(4), commit=False)
    now = {key: value.data_ptr() for key, value in loss.named_buffers()}
    # `reset` empties a queue.
    assert {key: now[key] for key in addresses if not key.startswith("queue")} == {
        key: value for key, value in addresses.items() if not key.startswith("queue")
    }


@stateful
def test_the_pending_update_keeps_its_dtype_where_the_loss_is_converted(name):
    plain, ours = after_a_step(name), after_a_step(name)
    ours(batch(1), commit=False)
    ours.to(torch.bfloat16)
    ours.commit()
    plain(batch(1))
    assert_same_bits(state_of(ours), state_of(plain))


@stateful
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_may_be_committed_later(name, mode):
    plain, ours = LOSSES[name][0](), LOSSES[name][0]()
    with mode():
        ours(batch(0), commit=False)
    ours.commit()
    ours(batch(1), commit=False)
    ours.commit()
    for seed in (0, 1):
        plain(batch(seed))
    assert_same_bits(state_of(ours), state_of(plain))


def test_the_moments_of_a_batch_may_be_committed_later():
    """In float64, for a state in float32."""
    plain, ours = (mo.MomentLoss(make_target(SHAPES), mo.MovingAverage(0.7)) for _ in range(2))
    for seed in range(2):
        features = mo.moments(batch(seed))
        assert_same_bits(ours(features, commit=False), plain(features))
        ours.commit()
    assert_same_bits(state_of(ours), state_of(plain))


@stateful
def test_columns_that_are_not_finite_stay_as_they_are_in_a_committed_step(name):
    plain, ours = after_a_step(name), after_a_step(name)
    features = batch(1)
    with torch.no_grad():
        features[0][2, 1] = float("nan")
    plain(features)
    ours(features, commit=False)
    ours.commit()
    assert_same_bits(state_of(ours), state_of(plain))


@stateful
def test_a_pending_update_under_vmap_is_an_error(name):
    loss = after_a_step(name)
    before = state_of(loss)
    problems = [torch.stack([x.detach() for x in pair]) for pair in zip(batch(1), batch(2), strict=True)]
    call = torch.func.vmap(lambda *features: loss(list(features), commit=False))
    assert_raises(lambda: call(*problems), RuntimeError, "vmap", r"eval\(\)")
    assert_raises(loss.commit, RuntimeError, "commit: got no pending update")
    assert_same_bits(state_of(loss), before)


@stateful
def test_a_step_under_grad_may_be_committed_later(name):
    plain, ours = after_a_step(name), after_a_step(name)
    features = [x.detach() for x in batch(1)]
    expected = torch.func.grad(lambda x: plain(x))(features)
    assert_same_bits(torch.func.grad(lambda x: ours(x, commit=False))(features), expected)
    ours.commit()
    assert_same_bits(state_of(ours), state_of(plain))


def committed(rank, name):
    """Losses, gradients and state of some steps, of which one is skipped."""
    loss_fn, net = LOSSES[name][0](), Generator(4)
    results = []
    for seed in range(3):
        loss = loss_fn(net(rows_of(rank, (5, 2), seed)), commit=False)
        results += [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]
        if seed != 1:
            loss_fn.commit()
    return results, state_of(loss_fn)


def stepped(rank, name):
    loss_fn, net = LOSSES[name][0](), Generator(4)
    results = []
    for seed in range(3):
        of_step = copy.deepcopy(loss_fn)
        loss = of_step(net(rows_of(rank, (5, 2), seed)))
        results += [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]
        if seed != 1:
            loss_fn = of_step
    return results, state_of(loss_fn)


@stateful
def test_processes_commit_their_steps(ranks, name):
    for ours, plain in zip(ranks(committed, name), ranks(stepped, name), strict=True):
        assert_same_bits(ours, plain)


@all_losses
@pytest.mark.parametrize("commit", [None, 1, "yes"])
def test_commit_is_a_bool(name, commit):
    assert_raises(lambda: LOSSES[name][0]()(batch(0), commit=commit), TypeError, r"^commit: got .*, expected a bool")


@stateful
@pytest.mark.parametrize("training", [True, False])
def test_batches_that_fill_the_state_count_as_steps(name, training):
    plain, ours = LOSSES[name][0](), LOSSES[name][0]().train(training)
    ours.fill(batch(seed) for seed in range(3))
    for seed in range(3):
        plain(batch(seed))
    assert_same_bits(state_of(ours), state_of(plain))
    assert [module.training for module in ours.modules()] == [training] * len(list(ours.modules()))


def test_batches_that_fill_the_state_are_made_without_gradients():
    loss = after_a_step("MomentLoss, moving")
    loss.fill(x for x in [batch(1)] if not torch.is_grad_enabled())
    assert loss.step == 2


def test_a_fill_that_fails_leaves_the_mode_as_it_was():
    loss = after_a_step("CovarianceLoss, moving").eval()
    with pytest.raises(ValueError, match="input: got 1 layers"):
        loss.fill([batch(1)[0]])
    assert not loss.training
    assert not loss.mean_loss.training


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in STATEFUL])
def test_a_loss_without_a_state_cannot_be_filled(name):
    assert_raises(lambda: LOSSES[name][0]().fill([batch(0)]), RuntimeError, "^fill: got a loss without a state")
