"""Every differentiable operator under the transforms of `torch.func`, against plain float64 PyTorch under the same."""

import pytest
import torch
from helpers import assert_close, assert_raises, assert_same_bits, exact_moments
from problems import COLUMNS, COV, MEAN, OTHER, PROBLEMS, ROWS, TARGET, VAR, X, weighted
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.nn.functional import relu

import moment_ops as mo
from moment_ops.ops.relu_moments import identity_moments, relu_moments

pytestmark = pytest.mark.usefixtures("backend")

operators = torch.ops.moment_ops
COUNT = torch.tensor([ROWS])


def center(x):
    return x - x.mean(0)


def cov(x, correction=1):
    return center(x).mT @ center(x) / (len(x) - correction)


def distance(x, other=OTHER):
    return (cov(x) - cov(other)).square().sum()


def matched(x):
    mean, var = exact_moments([x])
    return ((mean - MEAN).square().sum() + (var - VAR).square().sum()) / COLUMNS


def as_maps(x):
    return x.view(3, 2, 2, 2)


def gram(x):
    maps = as_maps(x).flatten(2)
    return maps @ maps.mT


def unbiased(x):
    """The sum over pairs of different rows, of both sides."""

    def within(rows):
        n = len(rows)
        diagonal = torch.eye(n, dtype=torch.bool)
        k = (rows @ rows.mT).masked_fill(diagonal, 0)
        total = (k @ k).trace() + k.sum() ** 2 / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ k).sum()
        return total / (n * (n - 3))

    return within(x) + within(OTHER) - 2 * (cov(x) * cov(OTHER)).sum()


def backward(x, grad_mean, grad_var, mean):
    return grad_mean / ROWS + 2 * grad_var / (ROWS - 1) * (x - mean)


def wide(x):
    return x.repeat(1, 8) * torch.linspace(0.5, 1.5, 8 * COLUMNS, dtype=x.dtype)


# By name: a function of (ROWS, COLUMNS) to a scalar by the library, and the same in plain PyTorch.
CASES = {
    "moments": (
        lambda x: weighted(mo.moments(x).mean, mo.moments(x).var),
        lambda x: weighted(*exact_moments([x])),
    ),
    "moments of several layers": (
        lambda x: weighted(mo.moments([x, as_maps(x).flatten(0, 1)]).var),
        lambda x: weighted(exact_moments([x, as_maps(x).flatten(0, 1)])[1]),
    ),
    "moments over another dimension": (
        lambda x: weighted(mo.moments(x, dim=1).var),
        lambda x: weighted(x.var(1)),
    ),
    "moments over several dimensions": (
        lambda x: weighted(mo.moments(as_maps(x), dim=(0, 2, 3)).var),
        lambda x: weighted(as_maps(x).var((0, 2, 3))),
    ),
    "moments merged": (
        lambda x: weighted(mo.Moments.merge(mo.moments(x), mo.moments(OTHER)).var),
        lambda x: weighted(torch.cat([x, OTHER]).var(0)),
    ),
    "moment_loss": (lambda x: mo.moment_loss(x, TARGET), matched),
    "moment_loss of moments": (lambda x: mo.moment_loss(mo.moments(x), TARGET), matched),
    "MomentLoss": (lambda x: mo.MomentLoss(TARGET)(x), matched),
    "covariance": (lambda x: weighted(mo.covariance(x)), lambda x: weighted(cov(x))),
    "covariance_loss": (lambda x: mo.covariance_loss(x, COV), distance),
    "covariance_loss of a joint vector": (
        lambda x: mo.covariance_loss([x[:, :1], x[:, 1:]], COV, joint=True),
        distance,
    ),
    "covariance_loss with means": (
        lambda x: mo.covariance_loss(x, TARGET, mean_weight=0.5),
        lambda x: distance(x) + 0.5 * (x.mean(0) - MEAN).square().sum(),
    ),
    "covariance_distance": (lambda x: mo.covariance_distance(x, OTHER, method="covariance"), distance),
    "covariance_distance by rows": (lambda x: mo.covariance_distance(x, OTHER, method="gram"), distance),
    "covariance_distance by rows of maps": (
        lambda x: mo.covariance_distance(x.view(ROWS, 2, 1, 2), OTHER.view(-1, 2, 1, 2), method="gram"),
        distance,
    ),
    "covariance_distance by rows, unbiased": (
        lambda x: mo.covariance_distance(x, OTHER, method="gram", estimator="unbiased"),
        unbiased,
    ),
    "CovarianceLoss": (lambda x: mo.CovarianceLoss(TARGET)(x), distance),
    "coral_loss": (lambda x: mo.coral_loss(x, OTHER), lambda x: distance(x) / (4 * COLUMNS**2)),
    "coral_loss by rows": (
        lambda x: mo.coral_loss(wide(x), wide(OTHER)),
        lambda x: distance(wide(x), wide(OTHER)) / (4 * (8 * COLUMNS) ** 2),
    ),
    "vicreg_variance": (
        lambda x: mo.vicreg_variance(x, gamma=2.0),
        lambda x: relu(2 - (x.var(0) + 1e-4).sqrt()).mean(),
    ),
    "vicreg_covariance": (
        lambda x: mo.vicreg_covariance(x),
        lambda x: (cov(x).square().sum() - x.var(0).square().sum()) / COLUMNS,
    ),
    "vicreg_covariance by rows": (
        lambda x: mo.vicreg_covariance(wide(x)),
        lambda x: (cov(wide(x)).square().sum() - wide(x).var(0).square().sum()) / (8 * COLUMNS),
    ),
    "gram_matrix": (lambda x: weighted(mo.gram_matrix(as_maps(x))), lambda x: weighted(gram(x))),
    "style_loss": (
        lambda x: mo.style_loss(as_maps(x), gram(OTHER[:ROWS])),
        lambda x: (gram(x) - gram(OTHER[:ROWS])).square().sum() / (3 * 4 * 8**2),
    ),
    "ReLU tap": (
        lambda x: weighted(*relu_moments(x, x[0])),
        lambda x: weighted(relu(x + x[0]), *exact_moments([relu(x + x[0])])),
    ),
    "identity tap": (
        lambda x: weighted(*identity_moments(x)),
        lambda x: weighted(x, *exact_moments([x])),
    ),
    "operator moments": (
        lambda x: weighted(*operators.moments([x, x.sin()], 0, 1, True)[:2]),
        lambda x: weighted(*exact_moments([x, x.sin()])),
    ),
    "operator moments_backward": (
        lambda x: weighted(*operators.moments_backward([x], x[0], x[1], [x.sin()], x[2], COUNT, 0, 1, None)),
        lambda x: weighted(x + backward(x.sin(), x[0], x[1], x[2])),
    ),
    "operator relu_moments": (
        lambda x: weighted(*operators.relu_moments(x, None, 1)),
        lambda x: weighted(relu(x), *exact_moments([relu(x)])),
    ),
    "operator relu_moments_backward": (
        lambda x: weighted(operators.relu_moments_backward(x, x[0], x[1], relu(x), x[2], 1)),
        lambda x: weighted((x + backward(relu(x), x[0], x[1], x[2])) * (x > 0)),
    ),
    "operator covariance": (
        lambda x: weighted(*operators.covariance(x, 1, True, "ieee")),
        lambda x: weighted(cov(x), x.mean(0)),
    ),
    "operator covariance_backward": (
        lambda x: weighted(operators.covariance_backward(x.mT @ x, x[0], x.sin(), x[2], 1, True, "ieee")),
        lambda x: weighted(x[0] / ROWS + 2 / (ROWS - 1) * (x.sin() - x[2]) @ (x.mT @ x)),
    ),
    "operator gram": (
        lambda x: weighted(operators.gram([x, x.sin()], [OTHER[0], OTHER[0]], 1)),
        lambda x: weighted(torch.cat([x, x.sin()]).sub(OTHER[0]) @ torch.cat([x, x.sin()]).sub(OTHER[0]).mT),
    ),
    "operator gram_backward": (
        lambda x: weighted(*operators.gram_backward((x @ x.mT)[None], [x.sin()], [OTHER[0]], [True])),
        lambda x: weighted(2 * (x @ x.mT) @ (x.sin() - OTHER[0])),
    ),
}  # fmt: skip
# Far from singular: inverse roots have no large entries.
ROUND = torch.eye(COLUMNS, dtype=torch.float64)
ONCE = {
    "frechet_distance": (
        lambda x: mo.frechet_distance(mo.moments(x).mean, mo.covariance(x) + ROUND, MEAN, COV + ROUND),
        lambda x: (
            (x.mean(0) - MEAN).square().sum()
            + (cov(x) + COV + 2 * ROUND).trace()
            - 2 * torch.linalg.eigvals((cov(x) + ROUND) @ (COV + ROUND)).real.sqrt().sum()
        ),
    ),
}
cases = pytest.mark.parametrize(("ours", "exact"), [*CASES.values(), *ONCE.values()], ids=[*CASES, *ONCE])
cases_of_two_derivatives = pytest.mark.parametrize(("ours", "exact"), CASES.values(), ids=CASES)


def squared_slope(function):
    return lambda x: weighted(grad(function)(x))


@cases
def test_grad(ours, exact):
    assert_close(grad(ours)(X[0]), grad(exact)(X[0]), rows=ROWS)


@cases
def test_vjp_after_its_function_has_returned(ours, exact):
    value, pull = vjp(ours, X[0])
    assert_close(value, exact(X[0]), rows=ROWS)
    assert_close(pull(torch.full_like(value, 2))[0], 2 * grad(exact)(X[0]), rows=ROWS)


@cases
def test_jacrev(ours, exact):
    assert_close(jacrev(ours)(X[0]), grad(exact)(X[0]), rows=ROWS)


@cases
def test_vmap_over_problems(ours, exact):
    assert_close(vmap(ours)(X), vmap(exact)(X), rows=ROWS)


@cases
def test_vmap_over_an_inner_dimension(ours, exact):
    assert_close(vmap(ours, in_dims=1)(X.movedim(0, 1).contiguous()), vmap(exact)(X), rows=ROWS)


@cases
def test_vmap_of_grad(ours, exact):
    assert_close(vmap(grad(ours))(X), vmap(grad(exact))(X), rows=ROWS)


@cases
def test_grad_of_vmap(ours, exact):
    assert_close(grad(lambda x: vmap(ours)(x).sum())(X), vmap(grad(exact))(X), rows=ROWS)


@cases
def test_backward_through_vmap(ours, exact):
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(vmap(ours)(x).sum(), x)
    assert_close(gradient, vmap(grad(exact))(X), rows=ROWS)


@cases
def test_vmap_of_vmap(ours, exact):
    both = torch.stack([X, X.flip(0)])
    assert_close(vmap(vmap(ours))(both), vmap(vmap(exact))(both), rows=ROWS)


@cases_of_two_derivatives
def test_grad_of_grad(ours, exact):
    assert_close(grad(squared_slope(ours))(X[0]), grad(squared_slope(exact))(X[0]), rows=ROWS)


@cases_of_two_derivatives
def test_vmap_of_grad_of_grad(ours, exact):
    assert_close(vmap(grad(squared_slope(ours)))(X), vmap(grad(squared_slope(exact)))(X), rows=ROWS)


@cases
def test_forward_mode_is_an_error(ours, exact):
    assert_raises(lambda: jvp(ours, (X[0],), (X[0],)), NotImplementedError, "forward-mode .* not supported")


def test_frechet_distance_is_differentiable_once_under_transforms_too():
    ours, _ = ONCE["frechet_distance"]
    assert_raises(lambda: grad(squared_slope(ours))(X[0]), NotImplementedError, "differentiable once")


def test_vmap_of_moments_gives_the_moments_of_every_problem():
    m = vmap(mo.moments)(X)
    mean, var = vmap(lambda x: exact_moments([x]))(X)
    assert_close(m.mean, mean, rows=ROWS)
    assert_close(m.var, var, rows=ROWS)
    assert m.count.tolist() == [[ROWS]] * PROBLEMS


def test_every_problem_may_have_a_target_of_its_own():
    targets = vmap(mo.moments)(X.flip(0))
    exact = torch.stack([mo.moment_loss(x, mo.moments(other)) for x, other in zip(X, X.flip(0), strict=True)])
    assert_same_bits(vmap(mo.moment_loss)(X, targets), exact)


def test_a_target_of_every_problem_gets_its_gradient():
    def ours(mean, x):
        return mo.moment_loss(x, mo.Moments(mean, mean.square()))

    def exact(mean, x):
        return ((x.mean(0) - mean).square().sum() + (x.var(0) - mean.square()).square().sum()) / COLUMNS

    means = X[:, 0]
    assert_close(vmap(grad(ours))(means, X), vmap(grad(exact))(means, X), rows=ROWS)
    assert_close(grad(lambda means: vmap(ours)(means, X).sum())(means), vmap(grad(exact))(means, X), rows=ROWS)


def test_a_target_covariance_of_every_problem_gets_its_gradient():
    targets = vmap(cov)(X.flip(0))
    gradient = grad(lambda targets: vmap(lambda x, c: mo.covariance_loss(x, c))(X, targets).sum())(targets)
    assert_close(gradient, 2 * (targets - vmap(cov)(X)), rows=ROWS)


def test_features_are_read_in_channels_last_order_under_a_transform():
    x = X.view(PROBLEMS * ROWS, COLUMNS, 1, 1).expand(-1, -1, 2, 2).contiguous(memory_format=torch.channels_last)
    gradient = grad(lambda x: mo.moments(x).var.square().sum())(x)
    assert_close(gradient, grad(lambda x: x.var(0).square().sum())(x), rows=len(x))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("operator")])
def test_forward_mode_of_an_operator_is_an_error_without_transforms_too(name):
    ours, _ = CASES[name]

    def call():
        with torch.autograd.forward_ad.dual_level():
            ours(torch.autograd.forward_ad.make_dual(X[0], X[0]))

    assert_raises(call, NotImplementedError, "moments|covariance|gram", "forward-mode .* not supported")


def test_forward_mode_through_moments_that_are_given_is_an_error():
    def call(mean):
        return mo.moment_loss(mo.Moments(mean, VAR, validate=False, shapes=((COLUMNS,),)), TARGET)
