"""A batch in parts has the loss, the gradients and the state of the whole batch."""

import copy

import pytest
import torch
from helpers import assert_raises, make_target
from torch import nn

import moment_ops as mo

AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.9),
    "adam": mo.AdamMovingAverage(1e-2),
}


def network(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *between, nn.Linear(8, 6)).double()


def rows(count=11):
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(net):
    return [p.grad.clone() for p in net.parameters()]


def assert_same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def compare(forward, loss_fn, sizes=(4, 4, 3), net=None, steps=1):
    """Steps in parts, and steps with all rows, of copies of the loss."""
    whole, other = rows(sum(sizes)), copy.deepcopy(loss_fn)
    for _ in range(steps):
        net.zero_grad()
        expected = other(forward(whole))
        expected.backward()
        wanted = gradients(net)
        net.zero_grad()
        loss = mo.backward_in_parts(forward, whole.split(list(sizes)), loss_fn)
        assert not loss.requires_grad
        assert_same(loss, expected.detach())
        assert_same(gradients(net), wanted)
    if isinstance(loss_fn, nn.Module):
        assert_same(loss_fn.state_dict(), other.state_dict())


@pytest.mark.parametrize("sizes", [(11,), (4, 4, 3), (10, 1), (1,) * 5])
@pytest.mark.parametrize("average", AVERAGES)
def test_moments_in_parts_give_the_step_of_the_whole_batch(average, sizes):
    net = network()
    loss_fn = mo.MomentLoss(make_target([(6,)], torch.float64), AVERAGES[average])
    compare(lambda x: mo.moments(net(x)), loss_fn, sizes, net, steps=3)


def test_features_in_parts_give_the_step_of_the_whole_batch():
    net = network()
    cov = torch.eye(6, dtype=torch.float64)
    loss_fn = mo.CovarianceLoss(mo.Moments(torch.zeros(6, dtype=torch.float64), cov=(cov,)), mo.MovingAverage(0.5))
    compare(net, loss_fn, net=net, steps=3)


def test_results_may_be_nested():
    net = network()
    target = make_target([(6,)], torch.float64)
    loss_fn = lambda out: mo.moment_loss(out["moments"], target) + out["rest"][0].square().sum()  # noqa: E731
    compare(lambda x: {"moments": mo.moments(net(x)), "rest": (net(x),)}, loss_fn, net=net)


def test_taps_in_parts_give_the_step_of_the_whole_batch():
    torch.manual_seed(3)
    extractor = mo.MomentExtractor(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()).double())
    net = network()
    target = mo.dataset_moments(lambda x: extractor(net(x)), [rows(20)])
    loss_fn = mo.MomentLoss(target, mo.AdamMovingAverage())
    compare(lambda x: extractor(net(x)), loss_fn, net=net, steps=2)


def test_gradients_of_the_inputs_are_added():
    x = rows().requires_grad_()
    target = make_target([(3,)], torch.float64)
    for _ in range(2):
        mo.backward_in_parts(mo.moments, x.split(4), lambda m: mo.moment_loss(m, target))
    y = x.detach().clone().requires_grad_()
    mo.moment_loss(y, target).backward()
    assert_same(x.grad, 2 * y.grad)


def test_random_numbers_are_those_of_the_first_pass():
    net = network(nn.Dropout(0.5))
    seen = []

    def forward(x):
        seen.append(net[:3](x).detach())
        return mo.moments(net(x))

    torch.manual_seed(5)
    mo.backward_in_parts(forward, rows().split(4), lambda m: m.mean.sum())
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    after = torch.rand(1)
    torch.manual_seed(5)
    for part in rows().split(4):
        forward(part)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False).eval()])
def test_batch_norm_of_a_part_is_an_error(norm):
    net = network(norm)
    assert_raises(
        lambda: mo.backward_in_parts(lambda x: mo.moments(net(x)), rows().split(4), lambda m: m.mean.sum()),
        ValueError,
        "forward: got BatchNorm1d in training mode",
    )
    # Of another call it is none.
    net(rows())


def test_batch_norm_in_evaluation_mode_is_independent_of_other_rows():
    net = network(nn.BatchNorm1d(8)).eval()
    compare(lambda x: mo.moments(net(x)), lambda m: m.var.sum() + m.mean.sum(), net=net)


def test_bad_arguments():
    x = rows()
    sum_of = lambda m: m.mean.sum()  # noqa: E731
    for call, error, message in (
        (lambda: mo.backward_in_parts(mo.moments, [], sum_of), ValueError, "parts: got none"),
        (lambda: mo.backward_in_parts(mo.moments, [x], sum_of), RuntimeError, "forward: got results that do not"),
        (lambda: mo.backward_in_parts(lambda x: "no", [x], sum_of), TypeError, "forward: got str, expected Moments"),
        (
            lambda: mo.backward_in_parts(lambda x: [x] * len(x), [x[:1], x[:2]], sum_of),
            ValueError,
            r"parts\[1\]: got another structure",
        ),
    ):
        assert_raises(call, error, message)
