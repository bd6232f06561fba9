"""The Frechet loss of one batch, beside its definition in float64."""

import math

import frechet_reference
import numpy as np
import pytest
import torch
from frechet_problems import cosine, problem
from helpers import assert_raises, assert_same_bits, leaves
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import moment_ops as mo
from moment_ops.losses.frechet_target import auto_method
from moment_ops.ops import polar

METHODS = ("polynomial", "qdwh", "eigh")
SHAPES = {"few rows": (8, 20), "many rows": (50, 20), "square": (20, 20), "wide": (90, 420), "tall": (700, 420)}


def gradient_of(value, x):
    return torch.autograd.grad(value, x)[0]


def assert_is(value, gradient, exact, exact_gradient, traces):
    """The accuracy that is promised in float32 for a distance of at least 1e-2 of the traces, and 1e6 in condition."""
    assert abs(float(value.detach()) - float(exact)) <= max(5e-5 * float(exact), 5e-7 * float(traces))
    assert 1 - cosine(gradient, exact_gradient) <= 1e-5
    assert gradient.double().norm() == pytest.approx(exact_gradient.double().norm(), rel=1e-3)


def check(target, x, *, correction=1, **options):
    x = x.requires_grad_()
    exact = frechet_reference.of_rows(x, target.mean, target.cov[0], correction)
    value = mo.frechet_loss(x, target, correction=correction, **options)
    traces = target.cov[0].trace() + x.detach().double().var(0, correction=correction).sum()
    assert_is(value, gradient_of(value, x), exact.detach(), gradient_of(exact, x), traces)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_distance(shape, method):
    check(*problem(*SHAPES[shape]), method=method)


@pytest.mark.parametrize("kind", ["geometric", "power"])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_exact_for_any_spectrum(method, condition, kind):
    check(*problem(100, 64, condition=condition, kind=kind), method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [16, 100])
def test_singular_targets_are_the_normal_case(rows, method):
    check(*problem(rows, 64, rank=20), method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [40, 300])
def test_it_is_exact_close_to_the_target(rows, method):
    """The distance of the sample to the target with its own covariance, moved a little: 1e-2 of the traces."""
    _, x = problem(rows, 32)
    cov = torch.cov(x.double().mT)
    target = mo.Moments(x.double().mean(0), cov=1.2 * cov)
    check(target, x, method=method)


@pytest.mark.parametrize("correction", [0, 1, 3])
def test_the_correction_is_that_of_the_batch(correction):
    check(*problem(7, 12), correction=correction)


def test_zero_correction_is_the_public_code():
    """`X' X / N` of centred rows, and an eigendecomposition of the product with the root of the target."""
    target, x = problem(30, 12)
    wide = x.double()
    rows = wide - wide.mean(0)
    root = frechet_reference.root_of(target.cov[0])
    values = torch.linalg.eigvalsh(root @ (rows.mT @ rows / len(x)) @ root).clamp_min(0)
    shift = (wide.mean(0) - target.mean).square().sum()
    public = shift + rows.square().sum() / len(x) + target.cov[0].trace() - 2 * values.sqrt().sum()
    assert mo.frechet_loss(x, target, correction=0).item() == pytest.approx(public.item(), rel=1e-6)


def by_scipy_formula(mean, cov, target_mean, target_cov):
    """pytorch-fid, torch-fidelity: the trace of the root of the product, which is not symmetric."""
    root = np.sqrt(np.linalg.eigvals(cov @ target_cov).astype(complex))
    return np.square(mean - target_mean).sum() + np.trace(cov) + np.trace(target_cov) - 2 * root.real.sum()


@pytest.mark.parametrize("rows", [40, 300])
def test_it_is_the_number_of_the_tools(rows):
    """torchmetrics takes `sqrt` of the eigenvalues of the same product, with unbiased covariances, too."""
    target, x = problem(rows, 64, kind="power")
    wide = x.double().numpy()
    theirs = by_scipy_formula(wide.mean(0), np.cov(wide, rowvar=False), target.mean.numpy(), target.cov[0].numpy())
    assert mo.frechet_loss(x, target).item() == pytest.approx(theirs, rel=1e-4)
    ours = mo.Moments(torch.from_numpy(wide.mean(0)), cov=torch.from_numpy(np.cov(wide, rowvar=False)))
    assert mo.frechet_loss(x, target).item() == pytest.approx(mo.frechet_distance(ours, target).item(), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [4, 9])
def test_gradients_are_those_of_finite_differences(rows, method):
    target, x = problem(rows, 5, condition=4.0, dtype=torch.float64)
    # The root of a vanishing eigenvalue is 1e-8 from rounding, which a short step would magnify.
    arguments = {"eps": 1e-3, "rtol": 1e-4, "atol": 5e-4}
    assert gradcheck(lambda x: mo.frechet_loss(x, target, method=method), x.requires_grad_(), **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_and_gradients_have_the_dtypes_of_other_losses(dtype):
    target, x = problem(20, 12, dtype=dtype)
    x.requires_grad_()
    value = mo.frechet_loss(x, target)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradient = gradient_of(value, x)
    assert gradient.dtype == dtype
    wide = x.detach().double().requires_grad_()
    exact = frechet_reference.of_rows(wide, target.mean, target.cov[0])
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    assert (gradient - gradient_of(exact, wide)).norm() <= torch.finfo(dtype).eps * gradient.norm() + 1e-5


def test_judges_add_up_with_their_weights():
    pairs = [problem(16, columns, seed=columns) for columns in (6, 20)]
    target = mo.Moments(
        torch.cat([t.mean for t, _ in pairs]),
        cov=tuple(t.cov[0] for t, _ in pairs),
        shapes=((6,), (20,)),
        names=("first", "second"),
    )
    features = {name: x for name, (_, x) in zip(("first", "second"), pairs, strict=True)}
    loss_fn = mo.FrechetLoss(target, weight=[2.0, 0.5])
    value = loss_fn(features)
    apart = torch.stack([mo.frechet_loss(x, t).double() for t, x in pairs])
    assert value.item() == pytest.approx((2 * apart[0] + 0.5 * apart[1]).item(), rel=1e-6)
    torch.testing.assert_close(loss_fn.distances, apart, rtol=1e-6, atol=0)
    assert not loss_fn.distances.requires_grad
    assert mo.frechet_loss(features, target, weight=[2.0, 0.5]).item() == value.item()


def test_normalize_scales_gradients_alone():
    target, x = problem(16, 20)
    plain, scaled = leaves([x, x])
    distance = mo.frechet_loss(plain, target)
    loss_fn = mo.FrechetLoss(target, normalize=True, eps=0.5, weight=3.0)
    value = loss_fn(scaled)
    assert value.item() == pytest.approx(3 * distance.item() / (distance.item() + 0.5), rel=1e-6)
    expected = 3 * gradient_of(distance, plain) / (distance.detach() + 0.5)
    torch.testing.assert_close(gradient_of(value, scaled), expected)
    assert loss_fn.distances.item() == pytest.approx(distance.item(), rel=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_are_pooled_or_flattened(layout):
    maps = torch.randn(9, 3, 4, 6).to(memory_format=layout).requires_grad_()
    for pool, rows in ((None, maps.flatten(1)), (2, torch.nn.functional.adaptive_avg_pool2d(maps, 2).flatten(1))):
        target, _ = problem(9, rows.shape[1])
        value, expected = mo.frechet_loss(maps, target, pool=pool), mo.frechet_loss(rows, target)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(gradient_of(value, maps), gradient_of(expected, maps))


def test_reference_files_are_targets(tmp_path):
    target, x = problem(20, 8)
    path = tmp_path / "reference.npz"
    np.savez(path, mu=target.mean.numpy(), sigma=target.cov[0].numpy())
    assert mo.FrechetLoss(mo.Moments.load(path))(x) == mo.FrechetLoss(target)(x)


def test_a_constant_column_and_equal_rows_have_gradients():
    target, x = problem(12, 20)
    x[:, 3] = 7.0
    x[5] = x[4]
    x.requires_grad_()
    wide = x.double()
    # Rows that are equal leave a direction without gradient, for which singular vectors are arbitrary.
    exact = frechet_reference.of_covariance(wide.mean(0), torch.cov(wide.mT), target.mean, target.cov[0])
    value = mo.frechet_loss(x, target)
    assert_is(value, gradient_of(value, x), exact.detach(), gradient_of(exact, x), target.cov[0].trace())
    same = x[:1].expand(6, -1).clone()
    value = mo.frechet_loss(same.requires_grad_(), target)
    shift = (same[0].detach().double() - target.mean).square().sum()
    assert value.item() == pytest.approx((shift + target.cov[0].trace()).item(), rel=1e-6)
    assert gradient_of(value, same).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_the_distance_of_a_sample_to_itself_is_zero(method):
    _, x = problem(60, 12)
    target = mo.Moments(x.double().mean(0), cov=torch.cov(x.double().mT))
    value = mo.frechet_loss(x, target, method=method)
    assert 0 <= value.item() <= 1e-6 * target.cov[0].trace().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [8, 40])
def test_what_is_not_finite_shows_in_the_loss(method, value, rows):
    target, x = problem(rows, 12)
    x[1, 2] = value
    assert not mo.frechet_loss(x, target, method=method).isfinite()


def test_a_second_derivative_is_an_error():
    target, x = problem(8, 12)
    x.requires_grad_()
    for loss_fn in (mo.FrechetLoss(target), mo.FrechetLoss(target, mo.MovingAverage(0.5))):
        (gradient,) = torch.autograd.grad(loss_fn(x), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"^frechet_loss: differentiable once, not twice"):
            (gradient.square().sum() + x.sum()).backward()


def test_autocast_does_not_touch_it():
    target, x = problem(100, 40)
    for method in METHODS:
        plain = mo.frechet_loss(x, target, method=method)
        with torch.autocast("cpu", torch.bfloat16):
            assert mo.frechet_loss(x, target, method=method) == plain


def test_runs_are_equal_bit_for_bit():
    target, x = problem(400, 330)
    for method in METHODS:
        results = []
        for _ in range(2):
            (y,) = leaves([x])
            value = mo.frechet_loss(y, target, method=method)
            results.append([value.detach(), gradient_of(value, y)])
        assert_same_bits(*results)


@pytest.mark.parametrize("method", METHODS)
def test_transforms_of_torch_func_differentiate_it(method):
    target, x = problem(8, 12)
    (y,) = leaves([x])
    expected = gradient_of(mo.frechet_loss(y, target, method=method), y)
    loss_fn = mo.FrechetLoss(target, method=method)
    torch.testing.assert_close(torch.func.grad(loss_fn)(x), expected)
    batch = torch.stack([x, 2 * x])
    values = torch.func.vmap(loss_fn)(batch)
    torch.testing.assert_close(values, torch.stack([loss_fn(x), loss_fn(2 * x)]))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(loss_fn, (x,), (x,))


@pytest.mark.parametrize("method", METHODS)
def test_it_compiles_to_one_graph(method):
    target, _ = problem(8, 12)
    loss_fn = mo.FrechetLoss(target, method=method)
    torch._dynamo.reset()
    step = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 20):
        _, x = problem(rows, 12)
        compiled, eager = leaves([x, x])
        value, expected = step(compiled), loss_fn(eager)
        assert_same_bits(value.detach(), expected.detach())
        assert_same_bits(gradient_of(value, compiled), gradient_of(expected, eager))
    torch._dynamo.reset()


class NoReads(TorchDispatchMode):
    """Raises where the host would wait for a device."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"), name
        return function(*arguments, **(keywords or {}))


def test_nothing_waits_for_the_device():
    target, x = problem(8, 12)
    losses = [
        mo.FrechetLoss(target, method=method, **options)
        for method in ("polynomial", "qdwh")
        for options in ({}, {"average": mo.MovingAverage(0.9)}, {"queue": 10}, {"queue": 20})
    ]
    (y,) = leaves([x])
    for loss_fn in losses:
        if loss_fn.average or loss_fn.queue:
            loss_fn.fill([x])
        with NoReads():
            gradient_of(loss_fn(y), y)
            loss_fn(y, commit=False)
            loss_fn.commit()
    # A mode does not see what operators call.
    gram = (x.double().mT @ x.double()).contiguous()
    with NoReads():
        polar._polar(x, "ieee")
        polar._inverse_root(gram, "qdwh", False)
        polar._symmetric_product(gram, gram)


def test_no_gradient_is_computed_where_none_is_wanted():
    target, x = problem(8, 12)
    (y,) = leaves([x])
    with torch.no_grad():
        assert not mo.frechet_loss(y, target).requires_grad
    assert not mo.frechet_loss(x, target).requires_grad


def test_auto_is_the_documented_rule():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert auto_method(512, 2048, cpu, mixed=False) == "eigh"
    assert auto_method(2048, 512, cpu, mixed=False) == "eigh"
    assert auto_method(513, 2048, cpu, mixed=False) == "qdwh"
    assert auto_method(8, 513, cpu, mixed=True) == "qdwh"
    assert auto_method(8, 512, cpu, mixed=True) == "eigh"
    assert auto_method(8, 2048, gpu, mixed=False) == "polynomial"
    assert auto_method(8, 2048, gpu, mixed=True) == "qdwh"


TARGET, X = problem(8, 6)
INDEFINITE = 2 - torch.eye(6)
ERRORS = {
    "a tensor as target": (ValueError, "target: got Moments without", {"target": mo.Moments(TARGET.mean)}),
    "no moments": (TypeError, "target: got Tensor, expected Moments with covariances", {"target": TARGET.cov[0]}),
    "an indefinite target": (
        ValueError,
        r"target.cov\[0\]: got an indefinite matrix",
        {"target": mo.Moments(TARGET.mean, cov=INDEFINITE)},
    ),
    "other columns": (ValueError, r"input: got 5 columns in shape \(8, 5\), expected 6 as in target", {"x": X[:, :5]}),
    "other layers": (ValueError, "input: got 2 layers, expected 1 as in target", {"x": [X, X]}),
    "an integer": (TypeError, "input: got dtype torch.int64", {"x": X.long()}),
    "too few rows": (ValueError, "input: got a batch of 1, expected more than 1 rows", {"x": X[:1]}),
    "an empty batch": (ValueError, "input: got an empty batch", {"x": X[:0]}),
    "method": (ValueError, "method: got 'svd', expected 'auto' or", {"method": "svd"}),
    "precision": (ValueError, "precision: got 'fp8'", {"precision": "fp8"}),
    "correction": (ValueError, "correction: got -1", {"correction": -1}),
    "weights": (ValueError, "weight: got 2 weights, expected one per layer, 1", {"weight": [1.0, 2.0]}),
    "a negative weight": (ValueError, "weight: got -1", {"weight": -1.0}),
    "pool": (ValueError, "pool: got 0, expected a positive size", {"pool": 0}),
    "pools": (ValueError, "pool: got 2 sizes, expected one per layer, 1", {"pool": [1, 1]}),
    "a pool that is no int": (TypeError, "pool: got 1.5, expected an int or None", {"pool": [1.5]}),
    "pooled rows": (ValueError, r"input: got shape \(8, 6\), expected \(N, C, H, W\) with pool", {"pool": 1}),
    "normalize": (TypeError, "normalize: got 1, expected a bool", {"normalize": 1}),
    "eps": (ValueError, "eps: got -1, expected a finite, non-negative number", {"eps": -1}),
    "eps that is no number": (TypeError, "eps: got 'a', expected a number", {"eps": "a"}),
    "even": (TypeError, "even: got None, expected a bool", {"even": None}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_an_error_that_names_it(case):
    error, message, changed = ERRORS[case]
    arguments = {"x": X, "target": TARGET} | changed
    x, target = arguments.pop("x"), arguments.pop("target")
    assert_raises(lambda: mo.frechet_loss(x, target, **arguments), error, f"^{message}")
    assert_raises(lambda: mo.FrechetLoss(target, **arguments)(x), error, f"^{message}")


def test_targets_that_require_grad_are_an_error():
    target = mo.Moments(TARGET.mean.clone().requires_grad_(), cov=TARGET.cov[0])
    assert_raises(lambda: mo.frechet_loss(X, target), ValueError, "^target: got Moments that require grad")


def test_names_that_differ_are_an_error():
    target = mo.Moments(TARGET.mean, cov=TARGET.cov[0], names=("a",))
    assert_raises(lambda: mo.frechet_loss({"b": X}, target), ValueError, "^input: got layer 'b' at position 0")
