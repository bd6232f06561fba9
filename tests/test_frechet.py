"""The Frechet distance between Gaussians."""

import pytest
import torch
from helpers import assert_close
from torch.autograd import gradcheck

import moment_ops as mo


def covariance(size, rank=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank or 2 * size, generator=generator, dtype=torch.float64)
    return (factor @ factor.mT / (rank or 2 * size)).to(dtype)


def by_square_root(mean1, cov1, mean2, cov2):
    """Through the eigenvalues of the product, which need not be symmetric, as the textbook formula has it."""
    trace = torch.linalg.eigvals(cov1 @ cov2).real.clamp_min(0).sqrt().sum()
    return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_it_is_the_formula(size):
    mean1, mean2 = torch.randn(2, size, dtype=torch.float64)
    cov1, cov2 = covariance(size), covariance(size, seed=1)
    assert_close(mo.frechet_distance(mean1, cov1, mean2, cov2), by_square_root(mean1, cov1, mean2, cov2), rows=size**2)


def test_of_one_dimension_it_is_the_distance_of_means_and_deviations():
    one = torch.ones(1)
    distance = mo.frechet_distance(3 * one, 4 * torch.eye(1), one, 25 * torch.eye(1))
    assert distance.item() == pytest.approx((3 - 1) ** 2 + (2 - 5) ** 2, rel=1e-14)


def test_of_diagonal_covariances_it_is_a_sum_over_dimensions():
    a, b = torch.rand(2, 6, dtype=torch.float64)
    zero = torch.zeros(6)
    expected = ((a.sqrt() - b.sqrt()) ** 2).sum()
    assert_close(mo.frechet_distance(zero, a.diag(), zero, b.diag()), expected, rows=36)


def test_of_a_gaussian_to_itself_it_is_zero():
    mean, cov = torch.randn(20, dtype=torch.float64), covariance(20)
    distance = mo.frechet_distance(mean, cov, mean, cov)
    assert 0 <= distance.item() <= 64 * 20 * torch.finfo(torch.float64).eps * cov.trace().item()


def test_it_is_symmetric():
    mean1, mean2 = torch.randn(2, 9, dtype=torch.float64)
    first, second = (mean1, covariance(9)), (mean2, covariance(9, rank=3, seed=1))
    # A square root of a singular matrix is exact to the root of an epsilon.
    assert mo.frechet_distance(*first, *second).item() == pytest.approx(
        mo.frechet_distance(*second, *first).item(), rel=1e-7
    )


@pytest.mark.parametrize("ranks", [(3, 10), (10, 3), (3, 3), (1, 2)])
def test_singular_covariances_are_fine(ranks):
    cov1, cov2 = covariance(10, ranks[0]), covariance(10, ranks[1], seed=1)
    zero = torch.zeros(10)
    expected = by_square_root(zero, cov1, zero, cov2)
    distance = mo.frechet_distance(zero, cov1, zero, cov2)
    root_of_rounding = (10 * torch.finfo(torch.float64).eps) ** 0.5
    assert abs(distance.item() - expected.item()) <= 20 * root_of_rounding * (cov1.trace() + cov2.trace()).item()


def test_a_covariance_of_zero_leaves_means_and_trace():
    mean = torch.full((5,), 2.0)
    distance = mo.frechet_distance(mean, torch.zeros(5, 5), torch.zeros(5), covariance(5))
    assert distance.item() == pytest.approx(20 + covariance(5).trace().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_computed_in_float64(dtype):
    mean, cov = torch.randn(6).to(dtype), covariance(6, dtype=dtype)
    distance = mo.frechet_distance(mean, cov, mean + 1, cov)
    assert distance.dtype == torch.float64
    assert distance.item() == pytest.approx(mo.frechet_distance(mean.double(), cov.double(), (mean + 1), cov).item())


def test_arrays_and_moments_give_what_tensors_give():
    mean1, mean2 = torch.randn(2, 4, dtype=torch.float64)
    cov1, cov2 = covariance(4), covariance(4, seed=1)
    expected = mo.frechet_distance(mean1, cov1, mean2, cov2)
    assert mo.frechet_distance(mean1.numpy(), cov1.numpy(), mean2.numpy(), cov2.numpy()) == expected
    first, second = mo.Moments(mean1, cov=cov1), mo.Moments(mean2, cov=cov2)
    assert mo.frechet_distance(first, second) == expected


def test_gradients_are_those_of_finite_differences():
    factors = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    means = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def call(mean1, factor1, mean2, factor2):
        return mo.frechet_distance(mean1, factor1 @ factor1.mT, mean2, factor2 @ factor2.mT)

    assert gradcheck(call, (means[0], factors[0], means[1], factors[1]))


def test_gradients_exist_where_eigenvalues_are_equal():
    a, b = torch.rand(2, dtype=torch.float64).requires_grad_(), torch.tensor(2.0, dtype=torch.float64)
    zero, eye = torch.zeros(3), torch.eye(3, dtype=torch.float64)
    distance = mo.frechet_distance(zero, a[0] * eye, zero, b * eye)
    gradient = torch.autograd.grad(distance, a)[0]
    assert gradient[0].item() == pytest.approx((3 * (1 - (b / a[0]).sqrt())).item(), rel=1e-12)


@pytest.mark.parametrize("rank", [2, 4])
def test_gradients_in_the_range_of_a_singular_covariance_are_right(rank):
    """Both covariances live in the same subspace; along it the distance is smooth."""
    basis = torch.linalg.qr(torch.randn(6, rank, dtype=torch.float64)).Q
    inner1 = covariance(rank).requires_grad_()
    inner2 = covariance(rank, seed=1)
    zero = torch.zeros(6)
    small = torch.zeros(rank)
    embedded = mo.frechet_distance(zero, basis @ inner1 @ basis.mT, zero, basis @ inner2 @ basis.mT)
    plain = mo.frechet_distance(small, inner1, small, inner2)
    ours, theirs = torch.autograd.grad(embedded, inner1)[0], torch.autograd.grad(plain, inner1)[0]
    root_of_rounding = (6 * torch.finfo(torch.float64).eps) ** 0.5
    assert (ours - theirs).abs().max() <= 100 * root_of_rounding * theirs.abs().max()


def test_the_gradient_at_equal_gaussians_is_zero():
    mean, cov = torch.randn(5, dtype=torch.float64), covariance(5).requires_grad_()
    distance = mo.frechet_distance(mean, cov, mean, cov.detach())
    gradient = torch.autograd.grad(distance, cov)[0]
    assert gradient.abs().max() <= 1e4 * torch.finfo(torch.float64).eps


def test_a_second_derivative_raises_instead_of_missing_a_part():
    cov = covariance(3).requires_grad_()

    def penalty(cov):
        distance = mo.frechet_distance(torch.zeros(3), cov, torch.zeros(3), covariance(3, seed=1))
        (gradient,) = torch.autograd.grad(distance, cov, create_graph=True)
        return torch.autograd.grad(gradient.square().sum() + cov.sum(), cov)

    with pytest.raises((RuntimeError, NotImplementedError), match="differentiable"):
        penalty(cov)


def test_autocast_does_not_touch_it():
    mean, cov = torch.zeros(8), covariance(8)
    plain = mo.frechet_distance(mean, cov, mean, covariance(8, seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert mo.frechet_distance(mean, cov, mean, covariance(8, seed=1)) == plain


EYE = torch.eye(3, dtype=torch.float64)
NO_COVARIANCES = {
    "asymmetric": (EYE + torch.tensor([[0, 1e-3, 0], [0, 0, 0], [0, 0, 0]]), "got an asymmetric matrix"),
    "negative": (-EYE, "got an indefinite matrix"),
    "indefinite": (torch.diag(torch.tensor([-1.0, 1.0, 1.0])), "got an indefinite matrix"),
    "hardly indefinite": (torch.diag(torch.tensor([-1e-3, 1.0, 1.0])), "got an indefinite matrix"),
}


@pytest.mark.parametrize(("cov", "message"), NO_COVARIANCES.values(), ids=NO_COVARIANCES.keys())
def test_what_is_no_covariance_is_an_error_that_names_it(cov, message):
    zero = torch.zeros(3)
    with pytest.raises(ValueError, match=f"^cov1: {message}"):
        mo.frechet_distance(zero, cov, zero, EYE)
    with pytest.raises(ValueError, match=f"^cov2: {message}"):
        mo.frechet_distance(zero, EYE, zero, cov)
    # Moments that are made without a look at their values.
    with pytest.raises(ValueError, match=f"^second: {message}"):
        mo.frechet_distance(mo.Moments(zero, cov=(EYE,)), mo.Moments(zero, cov=(cov,), shapes=((3,),), validate=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 300])
def test_covariances_that_are_singular_but_for_rounding_are_fine(dtype, size):
    cov = covariance(size, rank=3).to(dtype)
    zero = torch.zeros(size)
    assert mo.frechet_distance(zero, cov, zero, torch.eye(size)).isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", range(4))
def test_what_is_not_finite_gives_nan(value, position):
    gaussians = [torch.zeros(3), EYE.clone(), torch.zeros(3), EYE.clone()]
    gaussians[position].view(-1)[0] = value
    gaussians[position].requires_grad_()
    distance = mo.frechet_distance(*gaussians)
    assert distance.isnan() or (position % 2 == 0 and distance.isinf())
    assert torch.autograd.grad(distance, gaussians[position])[0].shape == gaussians[position].shape


def test_both_forms_have_names_of_their_own():
    cov = covariance(3)
    first, second = mo.Moments(torch.zeros(3), cov=(cov,)), mo.Moments(torch.ones(3), cov=(cov,))
    expected = mo.frechet_distance(first, second)
    assert mo.frechet_distance(first=first, second=second) == expected
    assert mo.frechet_distance(first, second=second) == expected
    assert mo.frechet_distance(mean1=first.mean, cov1=cov, mean2=second.mean, cov2=cov) == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((), {}), ((EYE[0], EYE, EYE[0]), {}), ((EYE[0], EYE, EYE[0]), {"cov1": EYE}), ((1, 2, 3, 4, 5), {})],
)
def test_other_arguments_are_an_error(arguments, named):
    with pytest.raises(TypeError, match="expected two Moments, first and second, or mean1, cov1, mean2, cov2"):
        mo.frechet_distance(*arguments, **named)
