"""The averages inside `MomentLoss`, beside the algorithms that they come from."""

import copy

import pytest
import torch
from helpers import (
    SHAPES,
    assert_close,
    assert_same_bits,
    exact_moments,
    leaves,
    make_features,
    make_target,
    state_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import moment_ops as mo

pytestmark = pytest.mark.usefixtures("backend")

AVERAGES = (
    mo.MovingAverage(0.9),
    mo.MovingAverage(0.9, bias_correction=True),
    mo.AdamMovingAverage(lr=0.01),
    mo.AdamMovingAverage(lr=0.01, init="uniform"),
)
COLUMNS = sum(torch.Size(shape).numel() for shape in SHAPES)


class OriginalADAMMovingAverage:
    """The published algorithm: linear layers as parameters, an MSE over all columns, torch.optim.Adam."""

    def __init__(self, target, lr, betas, eps, reduction="mean"):
        self.targets = [target.mean, target.var] if target.var is not None else [target.mean]
        columns, dtype = target.mean.shape[0], target.mean.dtype
        self.nets = [nn.Linear(columns, 1, bias=False, dtype=dtype) for _ in self.targets]
        self.optimizers = [torch.optim.Adam(net.parameters(), lr, betas, eps) for net in self.nets]
        self.criterion = nn.MSELoss(reduction=reduction)

    def start(self, *weights):
        for net, weight in zip(self.nets, weights, strict=True):
            net.weight.data.copy_(weight)

    def __call__(self, features):
        flat = torch.cat([x.reshape(x.shape[0], -1) for x in features], dim=1)
        batch = [flat.mean(0), flat.var(0)]
        for net, optimizer, target, value in zip(self.nets, self.optimizers, self.targets, batch, strict=False):
            optimizer.zero_grad()
            self.criterion(net.weight, (target - value).detach()[None]).backward()
            optimizer.step()
        loss = 0
        for net, target, value in zip(self.nets, self.targets, batch, strict=False):
            loss = loss + (net(target).detach() - net(value)).sum()
        return loss

    @property
    def averages(self):
        return [net.weight.detach()[0] for net in self.nets]


REGIMES = {
    # lr, eps, spread of (target - batch) around the average
    "published": (1e-5, 1e-8, 1.0),
    "fast": (1e-2, 1e-8, 1.0),
    # |v - delta| stays far below eps * F / 2: there eps governs the step, and its coupling over layers shows.
    "below eps": (1e-2, 1e-2, 1e-3),
}


class Bounds:
    """How far apart two runs of the same algorithm may be: what rounding the batches' moments once more does to them.

    The differences (target - batch) carry an absolute error of some epsilons of the moments' size, however small they
    are themselves. A step of Adam never magnifies it: averages stay within it, losses and gradients follow.
    """

    def __init__(self, target, features):
        mean, var = exact_moments([x.detach() for x in features])
        moments = torch.cat([mean, var, target.mean.double()])
        self.average = 64 * torch.finfo(target.mean.dtype).eps * moments.abs().max().item()
        self.rows = features[0].shape[0]
        self.spread = max((x.detach() - x.detach().mean(0)).abs().max().item() for x in features)

    def check(self, ours, theirs, target):
        loss, gradients, averages = ours
        original_loss, original_gradients, original_averages = theirs
        size = max(a.abs().max().item() for a in original_averages)
        for average, original in zip(averages, original_averages, strict=True):
            assert (average - original).abs().max().item() <= self.average
        distances = 2 * target.mean.numel() * (size + 10)
        assert (loss - original_loss).abs().item() <= distances * self.average
        slope = (1 + 2 * self.spread) / (self.rows - 1)
        for gradient, original in zip(gradients, original_gradients, strict=True):
            assert (gradient - original).abs().max().item() <= slope * self.average


def run_beside_the_original(regime, dtype, steps, *, init="zeros", reduction="mean", var=True):
    """Yields ours and the original's (loss, gradients, averages) after every step, with their bounds."""
    lr, eps, spread = REGIMES[regime]
    target = make_target(dtype=dtype, var=var)
    average = mo.AdamMovingAverage(lr, (0.5, 0.999), eps, reduction=reduction, init=init)
    ours = mo.MomentLoss(target, average)
    theirs = OriginalADAMMovingAverage(target, lr, (0.5, 0.999), eps, reduction)
    names = ["mean_average", "var_average"][: len(theirs.nets)]
    theirs.start(*(getattr(ours, name) for name in names))
    # Batches whose moments lie around the target's, at the distance of the regime.
    targets = [(t.double(), (t.double() * 0 + 1 if q is None else q.double()).sqrt()) for t, q in target.layers()]
    for step in range(steps):
        noise = make_features(16, dtype=torch.float64, seed=100 + step)
        batch = []
        for x, (mean, std) in zip(noise, targets, strict=True):
            standard = (x - x.mean(0)) / x.std(0)
            offset, factor = spread * torch.randn_like(mean), 1 + spread * 0.3 * torch.rand_like(std)
            batch.append((standard * std * factor + mean + offset).to(dtype).requires_grad_())
        results = []
        for loss_fn in (ours, theirs):
            loss = loss_fn(batch)
            results.append([loss, torch.autograd.grad(loss, batch)])
        results[0].append([getattr(ours, name).clone() for name in names])
        results[1].append(theirs.averages)
        if regime == "below eps" and init == "zeros" and reduction == "mean":
            mean, _ = exact_moments(batch)
            distance = (theirs.averages[0].double() - (target.mean.double() - mean)).abs().max()
            assert distance < 0.1 * eps * COLUMNS / 2
        yield Bounds(target, batch), target, *results


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("init", ["zeros", "uniform"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_adam_follows_the_original_for_hundreds_of_steps(regime, init, reduction):
    for bounds, target, ours, theirs in run_beside_the_original(
        regime, torch.float64, 300, init=init, reduction=reduction
    ):
        bounds.check(ours, theirs, target)


@pytest.mark.parametrize("regime", REGIMES)
def test_adam_follows_the_original_in_float32(regime):
    for bounds, target, ours, theirs in run_beside_the_original(regime, torch.float32, 300):
        bounds.check(ours, theirs, target)


def test_adam_on_means_alone_follows_the_original():
    for bounds, target, ours, theirs in run_beside_the_original("fast", torch.float64, 200, var=False):
        bounds.check(ours, theirs, target)


def test_the_reduction_of_adam_matters_where_eps_does():
    """So that the comparison with the original would see a wrong coupling."""
    mean, total = (
        [ours[2][0] for _, _, ours, _ in run_beside_the_original("below eps", torch.float64, 5, reduction=reduction)]
        for reduction in ("mean", "sum")
    )
    assert (mean[-1] - total[-1]).abs().max() > 0.1 * total[-1].abs().max()


@pytest.mark.parametrize("average", ["mean_average", "var_average"])
def test_the_uniform_start_is_that_of_a_linear_layer(average):
    shapes = [(300,), (50, 10, 2)]
    loss = mo.MomentLoss(make_target(shapes), mo.AdamMovingAverage(init="uniform"))
    bound = 1 / 1300**0.5
    values = getattr(loss, average)
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.95 * bound
    assert values.abs().mean() == pytest.approx(bound / 2, rel=0.2)


def test_the_loss_of_adam_is_a_sum_in_either_reduction():
    features, target = make_features(16), make_target()
    for reduction in ("mean", "sum"):
        loss_fn = mo.MomentLoss(target, mo.AdamMovingAverage(lr=0.1), reduction=reduction)
        loss = loss_fn(features)
        mean, var = exact_moments(features)
        expected = (loss_fn.mean_average.double() * (target.mean.double() - mean)).sum()
        expected = expected + (loss_fn.var_average.double() * (target.var.double() - var)).sum()
        assert_close(loss, expected, rows=COLUMNS)


@pytest.mark.parametrize("alpha", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_moving_average_follows_the_released_code(alpha, dtype):
    target = make_target(dtype=dtype)
    ours = mo.MomentLoss(target, mo.MovingAverage(1 - alpha))
    averages = None
    for step in range(50):
        batch = leaves(make_features(16, dtype=dtype, seed=step))
        batch_moments = exact_moments(batch)
        if averages is None:
            averages = [value.detach() for value in batch_moments]
        averages = [(1 - alpha) * old.detach() + alpha * new for old, new in zip(averages, batch_moments, strict=True)]
        expected = sum(
            nn.functional.mse_loss(value, wanted.double())
            for value, wanted in zip(averages, (target.mean, target.var), strict=True)
        )
        loss = ours(batch)
        assert_close(loss, expected, rows=50)
        assert_close(ours.mean_average, averages[0], rows=50)
        assert_close(ours.var_average, averages[1], rows=50)
        for mine, original in zip(torch.autograd.grad(loss, batch), torch.autograd.grad(expected, batch), strict=True):
            assert_close(mine, original.double(), rows=50)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", ["features", "moments"])
def test_a_corrected_moving_average_is_that_of_all_batches_with_weights_by_age(decay, dtype, source):
    target = make_target(dtype=dtype)
    ours = mo.MomentLoss(target, mo.MovingAverage(decay, bias_correction=True))
    past, weight = (0.0, 0.0), 0.0
    for step in range(30):
        batch = leaves(make_features(16, dtype=dtype, seed=step))
        # Sums of weights, without a power.
        past = [decay * old + new for old, new in zip(past, exact_moments(batch), strict=True)]
        weight = decay * weight + 1
        averages = [value / weight for value in past]
        expected = sum(
            nn.functional.mse_loss(value, wanted.double())
            for value, wanted in zip(averages, (target.mean, target.var), strict=True)
        )
        given = batch if source == "features" else mo.moments(batch)
        for loss in (ours.eval()(given), ours.train()(given)):
            assert_close(loss, expected, rows=50)
            wanted = torch.autograd.grad(expected, batch, retain_graph=True)
            for mine, original in zip(torch.autograd.grad(loss, batch, retain_graph=True), wanted, strict=True):
                assert_close(mine, original.double(), rows=50)
        past = [value.detach() for value in past]
        assert_close(ours.mean_average, averages[0], rows=50)
        assert_close(ours.var_average, averages[1], rows=50)


@pytest.mark.parametrize("corrected", [False, True])
def test_without_decay_the_moving_average_is_no_average(corrected):
    target = make_target()
    average = mo.MovingAverage(0.0, bias_correction=corrected)
    plain, moving = mo.MomentLoss(target), mo.MomentLoss(target, average)
    for seed in range(3):
        features = make_features(16, seed=seed)
        assert_close(moving(features), plain(features).double())


@pytest.mark.parametrize("average", AVERAGES)
def test_weights_stay_outside_the_average(average):
    target, features = make_target(), make_features(16)
    weights = {"mean_weight": [1.0, 5.0, 0.0, 2.0], "var_weight": torch.rand(COLUMNS)}
    torch.manual_seed(0)
    plain = mo.MomentLoss(target, average)
    torch.manual_seed(0)
    weighted = mo.MomentLoss(target, average, **weights)
    plain(features), weighted(features)
    assert_same_bits(state_of(plain), state_of(weighted))


@pytest.mark.parametrize("average", AVERAGES)
def test_features_and_their_moments_advance_the_state_alike(average):
    torch.manual_seed(0)
    first = mo.MomentLoss(make_target(), average)
    second = copy.deepcopy(first)
    for seed in range(5):
        features = make_features(16, seed=seed)
        assert_close(first(features), second(mo.moments(features)).double(), rows=COLUMNS)
    for name, value in state_of(first).items():
        if value.is_floating_point():
            # Adam divides by the size of its gradient: the first steps are as exact as its sign.
            assert_close(value, state_of(second)[name].double(), rows=100)
        else:
            assert torch.equal(value, state_of(second)[name])


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("source", ["features", "moments", "float64 moments"])
def test_evaluation_leaves_the_state_and_uses_it(average, source):
    loss = mo.MomentLoss(make_target(), average)
    loss(make_features(16))
    before = state_of(loss)
    features = make_features(16, seed=1)
    if source != "features":
        features = mo.moments(features if source == "moments" else [x.double() for x in features])
    first = loss.eval()(features)
    assert_same_bits(loss(features), first)
    assert_same_bits(state_of(loss), before)


def test_evaluation_before_the_first_batch_is_finite():
    features, target = make_features(16), make_target()
    assert mo.MomentLoss(target, mo.AdamMovingAverage()).eval()(features) == 0
    moving = mo.MomentLoss(target, mo.MovingAverage(0.9)).eval()
    assert_close(moving(features), mo.moment_loss(features, target).double())


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_state_advances_without_gradients_too(average, mode):
    torch.manual_seed(0)
    plain = mo.MomentLoss(make_target(), average)
    other = copy.deepcopy(plain)
    features = make_features(16)
    plain(features)
    with mode():
        other(features)
    assert_same_bits(state_of(plain), state_of(other))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("source", ["features", "moments"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_column_that_is_not_finite_waits(average, source, value):
    loss = mo.MomentLoss(make_target(), average)
    loss(make_features(16))
    before = state_of(loss)
    features = make_features(16, seed=1)
    features[1][3, 0, 1, 1] = value
    column = SHAPES[0][0] + 3
    result = loss(features if source == "features" else mo.moments(features))
    assert not result.isfinite()
    for name, vector in state_of(loss).items():
        if vector.dim() == 1:
            assert_same_bits(vector[column], before[name][column])
            assert vector.isfinite().all() or vector.dtype == torch.bool
            moved = (vector != before[name]).sum()
            assert moved == COLUMNS - 1 or vector.dtype == torch.bool


def test_a_moving_average_starts_each_column_from_its_first_finite_batch():
    loss = mo.MomentLoss(make_target(), mo.MovingAverage(0.9))
    first, second = make_features(16), make_features(16, seed=1)
    first[0][:, 2] = float("nan")
    loss(first)
    assert loss.started.sum() == COLUMNS - 1
    loss(second)
    assert_close(loss.mean_average[2], second[0][:, 2].double().mean(), rows=16)


def test_a_column_that_starts_late_has_the_weights_of_the_step():
    loss = mo.MomentLoss(make_target(), mo.MovingAverage(0.5, bias_correction=True))
    batches = [make_features(16, seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        batch[0][:, 2] = float("nan")
    for batch in batches:
        loss(batch)
    third, fourth = (batch[0][:, 2].double().mean() for batch in batches[2:])
    share = 0.5 / (1 - 0.5**4)
    assert_close(loss.mean_average[2], (1 - share) * third + share * fourth, rows=16)


@pytest.mark.parametrize("average", AVERAGES)
def test_the_state_resumes_bit_for_bit(average, tmp_path):
    target = make_target()
    whole = mo.MomentLoss(target, average)
    for seed in range(3):
        whole(make_features(16, seed=seed))
    torch.save(whole.state_dict(), tmp_path / "loss.pt")
    resumed = mo.MomentLoss(make_target(seed=9), average)
    resumed.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    for seed in range(3, 6):
        features = make_features(16, seed=seed)
        assert_same_bits(resumed(features), whole(features))
    assert_same_bits(resumed.state_dict(), whole.state_dict())


def test_the_state_dict_holds_targets_average_and_step():
    loss = mo.MomentLoss(make_target(), mo.AdamMovingAverage(), mean_weight=torch.rand(COLUMNS))
    names = {f"{q}_{part}" for q in ("mean", "var") for part in ("average", "exp_avg", "exp_avg_sq")}
    assert set(loss.state_dict()) == {"target_mean", "target_var", "step"} | names
    assert list(loss.parameters()) == []


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "float", "to"])
def test_the_state_keeps_its_dtype(average, dtype, change):
    model = nn.Sequential(mo.MomentLoss(make_target(dtype=dtype), average, mean_weight=torch.rand(COLUMNS)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16) if change == "to" else getattr(model, change)()
    assert_same_bits(dict(model.named_buffers()), before)
    model[0](make_features(16, dtype=torch.bfloat16))


@pytest.mark.parametrize("average", AVERAGES)
def test_the_state_still_moves_between_devices(average):
    loss = mo.MomentLoss(make_target(), average, var_weight=[1.0, 2.0, 3.0, 4.0]).to("meta")
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_loss_that_advances_raises(average, reentrant):
    loss = mo.MomentLoss(make_target([(6,)]), average)
    x = make_features(16, [(6,)])[0].requires_grad_()
    result = checkpoint(lambda x: loss(x.sin()), x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="advance"):
        result.backward()
    assert int(loss.step) == 1


@pytest.mark.parametrize("average", [None, *AVERAGES])
def test_checkpointing_a_loss_that_stands_still_is_exact(average):
    loss = mo.MomentLoss(make_target([(6,)]), average)
    x = make_features(16, [(6,)])[0].requires_grad_()
    loss(x)
    loss.eval()
    plain = torch.autograd.grad(loss(x.sin()), x)[0]
    again = torch.autograd.grad(checkpoint(lambda x: loss(x.sin()), x, use_reentrant=False), x)[0]
    assert_same_bits(again, plain)


@pytest.mark.parametrize("average", AVERAGES)
def test_a_loss_keeps_its_gradient_while_the_state_goes_on(average):
    loss = mo.MomentLoss(make_target(), average)
    first = leaves(make_features(16))
    result = loss(first)
    expected = torch.autograd.grad(result, first, retain_graph=True)
    for seed in (1, 2):
        loss(make_features(16, seed=seed))
    loss.reset()
    assert_same_bits(torch.autograd.grad(result, first), expected)


@pytest.mark.parametrize("average", AVERAGES)
def test_float64_features_advance_a_float32_state(average):
    torch.manual_seed(0)
    narrow = mo.MomentLoss(make_target(), average)
    wide = copy.deepcopy(narrow)
    features = make_features(16)
    assert_close(wide([x.double() for x in features]).float(), narrow(features).double(), rows=COLUMNS)
    for name, value in state_of(wide).items():
        assert value.dtype == state_of(narrow)[name].dtype
        if value.is_floating_point():
            assert_close(value, state_of(narrow)[name].double(), rows=16)
        else:
            assert torch.equal(value, state_of(narrow)[name])


def test_averages_are_frozen_configurations():
    average = mo.AdamMovingAverage(lr=0.1)
    assert average == mo.AdamMovingAverage(lr=0.1)
    with pytest.raises(AttributeError):
        average.lr = 0.2
    first, second = mo.MomentLoss(make_target(), average), mo.MomentLoss(make_target(), average)
    first(make_features(16))
    assert int(second.step) == 0
