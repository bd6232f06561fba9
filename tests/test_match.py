"""The operator `match_`: the average's step in place, the loss, and its derivatives with respect to the moments."""

import pytest
import torch
from helpers import SHAPES, assert_close, assert_same_bits, exact_moments, make_features, make_target
from torch.multiprocessing.reductions import StorageWeakRef

import moment_ops as mo
from moment_ops.ops.moments import moments

pytestmark = pytest.mark.usefixtures("backend")

COLUMNS = sum(torch.Size(shape).numel() for shape in SHAPES)
AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.9),
    "moving, corrected": mo.MovingAverage(0.9, bias_correction=True),
    "adam": mo.AdamMovingAverage(lr=0.01),
    "adam, sum": mo.AdamMovingAverage(lr=0.01, reduction="sum"),
}


def share_of_batch(average, step):
    """The weight of the batch in a moving average. That of the past is the rest."""
    return (1 - average.decay) / (1 - average.decay**step if average.bias_correction else 1)


class Case:
    """Arguments of `match_`, with an average that has run for some steps."""

    def __init__(self, average_kind, *, dtype=torch.float64, var=True, weighted=False, reduction="mean", shapes=SHAPES):
        self.average = AVERAGES[average_kind]
        self.kind = "none" if self.average is None else self.average.kind
        self.target = make_target(shapes, dtype, var)
        columns = self.columns = self.target.mean.numel()
        self.features = make_features(11, shapes, dtype)
        self.mean, self.var, _ = moments(self.features, 0, 1, var)
        self.weights = [torch.rand(columns, dtype=dtype) for _ in range(2)] if weighted else [None, None]
        self.scales = (0.7, 1.3) if weighted else (1.0, 1.0)
        self.reduction = 1 / columns if reduction == "mean" else 1.0
        self.state = []
        if self.average is not None:
            self.state = list(self.average.new_state(self.target.mean, var).values())
            for vector in self.state[:-1]:
                vector.copy_(torch.rand(columns) > 0.3 if vector.dtype == torch.bool else torch.rand(columns) * 1e-2)
            self.state[-1].fill_(5)

    def arguments(self, update=True):
        return (
            self.target.mean,
            self.target.var,
            *self.scales,
            *self.weights,
            self.reduction,
            self.kind,
            [] if self.average is None else self.average.options(self.columns),
            self.state,
            update and self.average is not None,
        )

    def from_moments(self, update=True):
        return torch.ops.moment_ops.match_(self.mean, self.var, *self.arguments(update))

    def from_features(self, update=True):
        return torch.ops.moment_ops.match_.features(self.features, 1, *self.arguments(update))

    def expected(self, update=True):
        """Loss, derivatives and next state by the table of the design, in float64."""
        quantities = [(self.mean, self.target.mean, self.scales[0], self.weights[0])]
        if self.target.var is not None:
            quantities.append((self.var, self.target.var, self.scales[1], self.weights[1]))
        state = [s.clone().double() if s.is_floating_point() else s.clone() for s in self.state]
        step = int(state[-1]) + int(update) if state else 0
        loss, grads = 0.0, []
        for i, (value, target, scale, weight) in enumerate(quantities):
            value, target = value.double(), target.double()
            w = scale if weight is None else scale * weight.double()
            if self.kind == "adam":
                v, m, s = state[3 * i : 3 * i + 3]
                if update:
                    beta1, beta2 = self.average.betas
                    factor = 2 / self.columns if self.average.reduction == "mean" else 2.0
                    g = factor * (v - (target - value))
                    m.mul_(beta1).add_((1 - beta1) * g)
                    s.mul_(beta2).add_((1 - beta2) * g * g)
                    root = (s / (1 - beta2**step)).sqrt() + self.average.eps
                    v.sub_(self.average.lr * m / (1 - beta1**step) / root)
                loss = loss + (w * v * (target - value)).sum()
                grads.append(-w * v)
                continue
            slope = 1.0
            estimate = value
            if self.kind == "moving":
                slope = share_of_batch(self.average, int(state[-1]) + 1)
                estimate = torch.where(state[-2], (1 - slope) * state[i] + slope * value, value)
                if update:
                    state[i].copy_(estimate)
            loss = loss + self.reduction * (w * (estimate - target) ** 2).sum()
            grads.append(slope * 2 * self.reduction * w * (estimate - target) * torch.ones_like(value))
        if state and update:
            state[-1].fill_(step)
            if self.kind == "moving":
                state[-2].fill_(True)
        return loss, grads, state


def assert_state(case, expected):
    for got, wanted in zip(case.state, expected, strict=True):
        if got.is_floating_point():
            assert_close(got, wanted)
        else:
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("var", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_derivatives_and_state_follow_the_table(average_kind, update, var, weighted, dtype):
    case = Case(average_kind, dtype=dtype, var=var, weighted=weighted)
    expected, grads, state = case.expected(update)
    loss, grad_mean, grad_var = case.from_moments(update)
    assert loss.dtype == dtype
    assert_close(loss, expected, rows=case.columns)
    assert_close(grad_mean, grads[0])
    if var:
        assert_close(grad_var, grads[1])
    assert_state(case, state)


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("var", [True, False])
def test_features_give_what_their_moments_give(average_kind, update, var):
    case = Case(average_kind, var=var, weighted=True)
    expected, grads, state = case.expected(update)
    loss, mean, grad_mean, grad_var = case.from_features(update)
    assert_close(mean, exact_moments(case.features)[0], rows=11)
    assert_close(loss, expected, rows=case.columns)
    assert_close(grad_mean, grads[0])
    if var:
        assert_close(grad_var, grads[1])
    assert_state(case, state)


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_channels_last_features_are_matched_in_packed_order(average_kind):
    torch.manual_seed(3)
    case = Case(average_kind, shapes=((3, 4, 5), (7,), (2, 3, 2)), weighted=True)
    expected, grads, state = case.expected()
    case.features = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in case.features]
    loss, mean, grad_mean, grad_var = case.from_features()
    assert_close(mean, case.mean)
    assert_close(loss, expected, rows=case.columns)
    assert_close(grad_mean, grads[0])
    assert_close(grad_var, grads[1])
    assert_state(case, state)


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("source", ["moments", "features"])
def test_many_columns_are_matched_without_a_seam(average_kind, source):
    case = Case(average_kind, shapes=((17_001,), (3, 501)), weighted=True)
    expected, grads, state = case.expected()
    loss, *_, grad_mean, grad_var = case.from_moments() if source == "moments" else case.from_features()
    assert_close(loss, expected, rows=case.columns)
    assert_close(grad_mean, grads[0])
    assert_close(grad_var, grads[1])
    assert_state(case, state)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_scales_the_squared_distance(reduction):
    case = Case("none", reduction=reduction)
    expected, grads, _ = case.expected()
    loss, grad_mean, _ = case.from_moments()
    assert_close(loss, expected, rows=case.columns)
    assert_close(grad_mean, grads[0])


@pytest.mark.parametrize("average_kind", ["moving", "moving, corrected", "adam"])
@pytest.mark.parametrize("source", ["from_moments", "from_features"])
def test_the_state_advances_in_place_and_says_so(average_kind, source):
    case = Case(average_kind)
    before = [(s.data_ptr(), s._version) for s in case.state]
    getattr(case, source)()
    assert [s.data_ptr() for s in case.state] == [pointer for pointer, _ in before]
    assert all(s._version > version for s, (_, version) in zip(case.state, before, strict=True))
    assert int(case.state[-1]) == 6


@pytest.mark.parametrize("average_kind", ["moving", "moving, corrected", "adam"])
@pytest.mark.parametrize("source", ["from_moments", "from_features"])
def test_without_update_the_state_stays_to_the_last_bit(average_kind, source):
    case = Case(average_kind)
    before = [s.clone() for s in case.state]
    versions = [s._version for s in case.state]
    getattr(case, source)(update=False)
    assert_same_bits(case.state, before)
    assert [s._version for s in case.state] == versions


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_derivatives_share_no_memory_with_the_state(average_kind):
    case = Case(average_kind)
    _, grad_mean, grad_var = case.from_moments()
    owners = {t.untyped_storage().data_ptr() for t in (*case.state, case.mean, case.var, case.target.mean)}
    assert grad_mean.untyped_storage().data_ptr() not in owners
    assert grad_var.untyped_storage().data_ptr() not in owners


@pytest.mark.parametrize("average_kind", ["moving", "moving, corrected", "adam"])
@pytest.mark.parametrize("source", ["from_moments", "from_features"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_column_that_is_not_finite_leaves_its_state_untouched(average_kind, source, value):
    case, clean = Case(average_kind), Case(average_kind)
    for vector, other in zip(clean.state, case.state, strict=True):
        vector.copy_(other)
    case.features[0][4, 2] = value
    case.mean, case.var, _ = moments(case.features)
    before = [s.clone() for s in case.state]
    loss, *_ = getattr(case, source)()
    getattr(clean, source)()
    assert not loss.isfinite()
    others = torch.arange(case.columns) != 2
    for got, old, healthy in zip(case.state[:-1], before[:-1], clean.state[:-1], strict=True):
        assert_same_bits(got[2], old[2])
        assert_same_bits(got[others], healthy[others])


@pytest.mark.parametrize("source", ["from_moments", "from_features"])
@pytest.mark.parametrize("weighted", [True, False])
def test_no_argument_is_kept_or_freed_twice(source, weighted):
    """Lists, optional tensors and tensors, each by every way that it can be given."""
    case = Case("adam", weighted=weighted)
    given = [*case.features, case.mean, case.var, case.target.mean, case.target.var, *case.state]
    given += [weight for weight in case.weights if weight is not None]
    for _ in range(3):
        given += [x for x in getattr(case, source)() if x.numel() > 0]
    storages = [StorageWeakRef(x.untyped_storage()) for x in given]
    assert not any(storage.expired() for storage in storages)
    del case, given
    assert all(storage.expired() for storage in storages)
