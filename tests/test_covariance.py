"""Covariances: values, layouts, precisions, derivatives and the packed triangle, against float64."""

import pytest
import torch
from helpers import DTYPES, assert_close, assert_same_bits, make_features, statistics_dtype
from torch.autograd import gradcheck, gradgradcheck

import moment_ops as mo
from moment_ops.ops import triangle
from moment_ops.ops.covariance import covariance as covariance_op
from moment_ops.ops.reference_covariance import PRECISIONS

pytestmark = pytest.mark.usefixtures("backend")

OPS = torch.ops.moment_ops
# Less than a block, one block, ragged blocks, more than one panel.
WIDTHS = (1, 5, 128, 129, 300, 1100)
# What is promised of every precision: relative error in the Frobenius norm.
BOUNDS = {"ieee": 1e-6, "bf16x3": 2e-5, "tf32": 1e-3, "bf16": 4e-3}


def exact(x, correction=1, centered=True):
    """In float64, shifted by the first row, so that it loses nothing itself."""
    rows = x.detach().double().flatten(1)
    if centered:
        rows = rows - rows[0]
        rows = rows - rows.mean(0)
    return rows.mT @ rows / (len(rows) - correction)


def relative_error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def bound(dtype):
    return 1e-6 if statistics_dtype(dtype) == torch.float32 else 1e-14


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [2, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_covariance_of_the_same_numbers_in_float64(width, rows, dtype):
    (x,) = make_features(rows, [(width,)], dtype)
    cov = mo.covariance(x)
    assert cov.dtype == statistics_dtype(dtype)
    assert relative_error(cov, exact(x)) <= bound(dtype)
    assert torch.equal(cov, cov.mT)


@pytest.mark.parametrize("correction", [0, 1, 3])
@pytest.mark.parametrize("centered", [True, False])
def test_correction_and_second_moments(correction, centered):
    (x,) = make_features(9, [(150,)])
    cov = mo.covariance(x, correction=correction, centered=centered)
    assert relative_error(cov, exact(x, correction, centered)) <= 1e-6


def test_the_mean_of_the_operator_is_that_of_moments():
    (x,) = make_features(700, [(33,)])
    for centered in (True, False):
        assert_close(covariance_op(x, 1, centered, "ieee")[1], x.double().mean(0), rows=700)


def test_a_sequence_gives_one_matrix_per_layer_of_flattened_features():
    features = make_features(6, ((5,), (3, 2, 2), (2, 3)))
    results = mo.covariance(features)
    assert isinstance(results, tuple)
    for x, cov in zip(features, results, strict=True):
        assert relative_error(cov, exact(x)) <= 1e-6


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_too_few_rows_give_nan(rows):
    assert mo.covariance(torch.randn(rows, 140), correction=3).isnan().all()


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "a slice of columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "one row for all": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_nothing(layout):
    x = LAYOUTS[layout](make_features(20, [(140,)])[0])
    assert_same_bits(mo.covariance(x), mo.covariance(x.contiguous()))
    for y in (x, x.contiguous()):
        y = y.detach().requires_grad_()
        mo.covariance(y).square().sum().backward()
        expected = 4 / 19 * (y.detach().double() - y.detach().double().mean(0)) @ exact(y)
        assert_close(y.grad, expected, rows=140)


def test_channels_last_gradients_have_the_strides_of_their_input():
    x = make_features(6, [(5, 4, 3)])[0].to(memory_format=torch.channels_last).requires_grad_()
    mo.covariance(x).sum().backward()
    assert x.grad.stride() == x.stride()
    y = x.detach().contiguous().requires_grad_()
    mo.covariance(y).sum().backward()
    assert_same_bits(x.grad.contiguous(), y.grad)


def correlated(rows, width, ratio):
    noise = torch.randn(rows, width, dtype=torch.float64)
    mixed = noise @ torch.randn(width, width, dtype=torch.float64) / width**0.5
    return (mixed + ratio * torch.where(torch.arange(width) % 2 == 0, 1.0, -1.0)).float()


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(100_000, 8), (5000, 130), (600, 1100)])
def test_means_far_from_zero_cost_no_digits(shape, ratio):
    x = correlated(*shape, ratio)
    assert relative_error(mo.covariance(x), exact(x)) <= 1e-6


@pytest.mark.parametrize("shape", [(2000, 300), (64, 1100)])
def test_independent_columns_far_from_zero_cost_no_digits(shape):
    """Here an error of the mean, one number a column, would count sqrt(D) times."""
    x = (torch.randn(shape, dtype=torch.float64) + 1e4).float()
    x[0] += 5.0
    assert relative_error(mo.covariance(x), exact(x)) <= 1e-6


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rows", [60, 5000])
def test_means_far_from_zero_cost_the_gradient_no_digits(rows):
    """The mean that forward keeps is rounded to float32: a thousandth of a standard deviation here."""
    x = correlated(rows, 30, 1e4).requires_grad_()
    target = torch.eye(30)
    wide = x.detach().double().requires_grad_()
    (exact_gradient,) = torch.autograd.grad((torch.cov(wide.mT) - target.double()).square().sum(), wide)
    losses = mo.covariance_loss(x, target), (mo.covariance(x) - target).square().sum()
    for loss in losses:
        (dx,) = torch.autograd.grad(loss, x)
        assert relative_error(dx, exact_gradient) <= 5e-6


def test_a_first_row_far_from_all_others_costs_no_digits():
    x = torch.randn(5000, 40)
    x[0] = 300.0
    assert relative_error(mo.covariance(x), exact(x)) <= 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("ratio", [0.0, 1e3])
def test_a_precision_bounds_the_error(precision, ratio):
    x = correlated(3000, 60, ratio)
    wanted = exact(x)
    assert relative_error(mo.covariance(x, precision=precision), wanted) <= BOUNDS[precision]
    layer = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(mo.covariance(layer, precision=precision).square().sum(), layer)
    gradient = 4 / 2999 * (x.double() - x.double().mean(0)) @ wanted
    # Two products.
    assert relative_error(dx, gradient) <= 2 * BOUNDS[precision]


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
def test_the_reference_emulates_a_named_precision(backend, precision):
    """Otherwise no test without a GPU would show what a precision costs."""
    if backend != "reference":
        pytest.skip("the CPU computes every precision as ieee")
    x = correlated(3000, 60, 0.0)
    assert relative_error(mo.covariance(x, precision=precision), exact(x)) >= BOUNDS[precision] / 100


@pytest.mark.parametrize("rows", [2, 513, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_column_has_no_covariance(rows, dtype):
    values = torch.tensor([0.1, -3.3e4, 1e-5, 0.0]).to(dtype)
    x = torch.cat([values.expand(rows, 4), torch.randn(rows, 3).to(dtype)], 1)
    cov = mo.covariance(x)
    assert not cov[:4].any()
    assert cov[4:, 4:].diagonal().min() > 0


def test_it_is_positive_semidefinite_up_to_rounding():
    x = correlated(50, 200, 10.0)
    values = torch.linalg.eigvalsh(mo.covariance(x).double())
    assert values[0] >= -(200**0.5) * 1e-6 * values[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 7])
def test_a_value_that_is_not_finite_spoils_its_row_and_column_alone(value, row):
    (x,) = make_features(40, [(300,)])
    clean = mo.covariance(x)
    x[row, 170] = value
    cov = mo.covariance(x)
    others = torch.arange(300) != 170
    assert_same_bits(cov[others][:, others], clean[others][:, others])
    assert not cov[170].isfinite().any()
    assert not cov[:, 170].isfinite().any()


@pytest.mark.parametrize("shape", [(7, 100), (33, 5), (200, 300), (700, 1100), (5000, 40), (40_000, 1)])
def test_results_do_not_depend_on_the_number_of_threads(backend, shape):
    if backend == "reference":
        pytest.skip("the reference promises nothing about threads")
    x, target = torch.randn(shape), torch.eye(shape[1])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layer = x.clone().requires_grad_()
            loss = mo.covariance_loss(layer, target)
            cov, mean = covariance_op(layer.detach(), 1, True, "ieee")
            results.append([cov, mean, loss.detach(), *torch.autograd.grad(loss, layer)])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_ten_runs_are_the_same_to_the_last_bit():
    x = torch.randn(300, 400)
    first = mo.covariance(x)
    for _ in range(9):
        assert_same_bits(mo.covariance(x), first)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("centered", [True, False])
def test_first_and_second_derivatives(correction, centered):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def both(x):
        return covariance_op(x, correction, centered, "ieee")

    assert gradcheck(both, x)
    assert gradgradcheck(both, x)
    assert gradcheck(lambda x: mo.covariance(x, correction=correction, centered=centered), x)


@pytest.mark.parametrize("parts", ["cov", "mean", "both"])
def test_the_backward_has_derivatives_by_all_its_inputs(parts):
    grad = torch.randn(3, 3, dtype=torch.float64, requires_grad=True) if parts != "mean" else None
    grad_mean = torch.randn(3, dtype=torch.float64, requires_grad=True) if parts != "cov" else None
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(3, dtype=torch.float64, requires_grad=True)
    inputs = tuple(t for t in (grad, grad_mean, x, mean) if t is not None)

    def backward(*given):
        given = iter(given)
        arguments = [None if t is None else next(given) for t in (grad, grad_mean, x, mean)]
        return OPS.covariance_backward(*arguments, 1, True, "ieee")

    assert gradcheck(backward, inputs)
    assert gradgradcheck(backward, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [40, 3000])
def test_gradients_have_the_dtype_of_their_input(dtype, rows):
    x = make_features(rows, [(200,)], dtype)[0].requires_grad_()
    weight = torch.randn(200, 200, dtype=torch.float64)
    (mo.covariance(x) * weight.to(statistics_dtype(dtype))).sum().backward()
    assert x.grad.dtype == dtype
    centred = x.detach().double() - x.detach().double().mean(0)
    assert_close(x.grad, centred @ (weight + weight.mT) / (rows - 1), rows=200)


def test_autocast_leaves_the_dtype_of_the_statistic_and_of_its_derivatives():
    x = torch.randn(20, 40, requires_grad=True)

    def derivatives():
        cov = mo.covariance(x)
        (first,) = torch.autograd.grad(cov.square().sum(), x, create_graph=True)
        return [cov, first, *torch.autograd.grad(first.square().sum(), x)]

    plain = derivatives()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(derivatives(), plain)


def test_it_compiles_to_one_graph():
    torch._dynamo.reset()
    x = torch.randn(20, 40, requires_grad=True)

    def step(x):
        return mo.covariance(x).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 2)])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_operators_keep_the_contract_of_torch(dtype, shape, wants_gradient):
    x = torch.randn(shape).to(dtype)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_(wants_gradient)
    torch.library.opcheck(OPS.covariance.default, (x, 1, True, "ieee"))
    width = x[0].numel()
    grad, grad_mean, mean = torch.randn(width, width), torch.randn(width), torch.randn(width)
    given = [t.requires_grad_(wants_gradient) for t in (grad, grad_mean)]
    torch.library.opcheck(OPS.covariance_backward.default, (*given, x, mean, 1, True, "ieee"))


AVERAGES = {"none": None, "moving": mo.MovingAverage(0.9), "adam": mo.AdamMovingAverage(lr=0.1)}


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_matching_operator_keeps_the_contract_of_torch(average_kind, keep, packed):
    features = make_features(6, ((5,), (3, 2)))
    target = [torch.eye(5), torch.eye(6)]
    vector = torch.cat([triangle.pack(t) for t in target])
    average = AVERAGES[average_kind]
    state = [] if average is None else list(average.new_state(vector, False).values())
    options = [] if average is None else average.options(61)
    arguments = (
        features,
        1,
        [triangle.pack(t) for t in target] if packed else target,
        [1.0, 0.5],
        average_kind,
        options,
        state,
        average is not None,
        keep,
        "ieee",
    )
    torch.library.opcheck(OPS.covariance_match_.default, arguments)
    grad, mean, scale = torch.randn_like(vector), torch.randn(11), torch.tensor(2.0)
    torch.library.opcheck(OPS.covariance_match_backward.default, (grad, mean, features, mean, scale, 1, "ieee"))


@pytest.mark.parametrize("width", [*WIDTHS, 127, 256, 257, 513])
def test_the_packed_triangle_holds_the_upper_blocks_and_unpacks_symmetric(width):
    full = torch.randn(width, width)
    full = full + full.mT
    packed = triangle.pack(full)
    assert packed.shape == (triangle.size(width),)
    assert triangle.total_size([width, 3]) == len(packed) + 9
    assert torch.equal(triangle.unpack(packed, width), full)
    counts = triangle.counts([width], packed)
    assert_close((counts * packed.square()).sum(), full.double().square().sum(), rows=width)
    corner = min(width, 128)
    assert torch.equal(packed[: corner * corner].view(corner, corner), full[:corner, :corner])


@pytest.mark.parametrize("start", [0, 256, 512])
def test_strips_of_a_packed_triangle(start):
    full = torch.randn(700, 700)
    full = full + full.mT
    packed = triangle.pack(full)
    stop = min(start + 256, 700)
    strip = triangle.load(packed, start, torch.empty(stop - start, 700 - start))
    assert torch.equal(strip, full[start:stop, start:])
    assert torch.equal(
        triangle.load_above(packed, 700, start, torch.empty(start, stop - start)), full[:start, start:stop]
    )
    other = packed.clone().zero_()
    for first in range(0, 700, 256):
        triangle.store(full[first : first + 256, first:], other, first, 2.0)
    assert torch.equal(other, 2 * packed)


def test_packing_is_differentiable_twice():
    full = torch.randn(130, 130, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(triangle.size(130), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((triangle.pack(full) * weight).sum(), full, create_graph=True)
    (upper,) = torch.autograd.grad((grad * full.detach()).sum(), weight)
    assert torch.equal(upper, triangle.pack(full.detach()))
    assert not grad[128:, :128].any()


def test_a_matrix_beyond_the_free_memory_names_what_needs_none(monkeypatch):
    monkeypatch.setattr("moment_ops.covariances._free_bytes", lambda device: 1 << 30)
    x = torch.zeros(2, 1).expand(2, 40_000)
    with pytest.raises(
        ValueError, match=r"input: .*40000 x 40000 and takes 6.0 GiB, but cpu has 1.0 GiB free.*method='gram'"
    ):
        mo.covariance(x)
    with pytest.raises(ValueError, match=r"input\[1\]: .*gram"):
        mo.covariance([x[:, :2], x])


def test_the_free_memory_is_known_here():
    from moment_ops.covariances import _free_bytes

    assert _free_bytes(torch.device("cpu")) > 1 << 20


WRONG = {
    "correction": ({"correction": -1}, ValueError, "correction: got -1"),
    "correction type": ({"correction": 1.5}, TypeError, "correction: got 1.5"),
    "centered": ({"centered": 1}, TypeError, "centered: got 1"),
    "precision": ({"precision": "fp8"}, ValueError, "precision: got 'fp8', expected 'ieee'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case):
    options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        mo.covariance(torch.randn(4, 3), **options)


def test_wrong_features():
    with pytest.raises(ValueError, match=r"input: got an empty batch"):
        mo.covariance(torch.randn(0, 3))
    with pytest.raises(ValueError, match=r"input\[1\]: got batch size 3, expected 4"):
        mo.covariance([torch.randn(4, 3), torch.randn(3, 3)])
    with pytest.raises(TypeError, match=r"input: got dtype torch.int64"):
        mo.covariance(torch.ones(4, 3, dtype=torch.int64))
