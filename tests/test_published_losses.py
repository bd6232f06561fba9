"""Deep CORAL, VICReg and style: equal to their published forms, conventions included."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_same_bits, leaves, make_features, statistics_dtype

import moment_ops as mo

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Through inner products of rows, and through covariances.
NARROW, WIDE = (20, 5), (4, 40)


def rows_of(shape, dtype=torch.float64, seed=0):
    (x,) = make_features(shape[0], [shape[1:]], dtype, seed)
    return x


def assert_value_and_gradients(function, published, tensors, dtype, rows):
    """Computed in `dtype`, against the published formula in float64 on the same numbers."""
    tensors = leaves([t.to(dtype) for t in tensors])
    wide = leaves([t.detach().double() for t in tensors])
    value, exact = function(*tensors), published(*wide)
    assert value.dtype == statistics_dtype(dtype)
    assert_close(value, exact, rows=rows)
    gradients = torch.autograd.grad(value, tensors)
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, wide), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, rows=rows)


def coral_as_published(source, target):
    """Equations 1 to 3 of Sun and Saenko 2016."""

    def covariance(data):
        n = len(data)
        ones = torch.ones(1, n, dtype=data.dtype)
        return (data.T @ data - (ones @ data).T @ (ones @ data) / n) / (n - 1)

    return (covariance(source) - covariance(target)).norm() ** 2 / (4 * source.shape[1] ** 2)


def off_diagonal(x):
    return x - x.diag().diag()


def covariance_term(x):
    """Equations 3 and 4 of Bardes et al. 2022."""
    centred = x - x.mean(0)
    return off_diagonal(centred.T @ centred / (len(x) - 1)).pow(2).sum() / x.shape[1]


def variance_term(x):
    """Equations 1 and 2 of Bardes et al. 2022."""
    return torch.relu(1 - torch.sqrt(x.var(0) + 1e-4)).mean()


def published_matrix(x):
    """Equation 3 of Gatys et al. 2016, for every sample."""
    maps = x.flatten(2)
    return torch.einsum("nik,njk->nij", maps, maps)


def style_of_one_layer(features, style):
    """Equation 4 of Gatys et al. 2016, averaged over the batch."""
    channels, size = features.shape[1], features.shape[2] * features.shape[3]
    difference = published_matrix(features) - published_matrix(style)
    return difference.square().sum((1, 2)).mean() / (4 * channels**2 * size**2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(20, 30, 5), (3, 5, 40)])
def test_deep_coral(rows, dtype):
    n, m, columns = rows
    domains = [rows_of((n, columns)), 1.5 * rows_of((m, columns), seed=1)]
    assert_value_and_gradients(mo.coral_loss, coral_as_published, domains, dtype, rows=n + m + columns)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [NARROW, WIDE, (2, 2), (10, 1)])
def test_covariance_term_of_vicreg(shape, dtype):
    x = rows_of(shape)
    # As a difference of squares it is exact to epsilons of the whole covariance, not of what is off the diagonal.
    total = x.T.cov().square().sum() / shape[1]
    assert (mo.vicreg_covariance(x) - covariance_term(x)).abs() <= 1e-13 * total
    if shape[1] > 1:
        assert_value_and_gradients(mo.vicreg_covariance, covariance_term, [x], dtype, rows=shape[0] * shape[1])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [NARROW, WIDE])
def test_variance_term_of_vicreg(shape, dtype):
    assert_value_and_gradients(mo.vicreg_variance, variance_term, [rows_of(shape)], dtype, rows=sum(shape))


FLATTENED = {
    "coral": lambda x: mo.coral_loss(x, 1.5 * x.flip(0)[:-1]),
    "coral of maps and rows": lambda x: mo.coral_loss(x, 1.5 * x.flip(0)[:-1].reshape(len(x) - 1, -1)),
    "vicreg variance": mo.vicreg_variance,
    "vicreg covariance": mo.vicreg_covariance,
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(20, 3, 2, 2), (4, 3, 2, 2), (9, 5, 3), (9,), (4, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize("name", FLATTENED)
def test_dimensions_after_the_batch_are_columns(name, layout, shape):
    x = rows_of(shape)
    if layout == "channels last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x.repeat_interleave(2, 0)[::2]
    x.requires_grad_()
    rows = x.detach().reshape(len(x), -1).requires_grad_()
    value, expected = FLATTENED[name](x), FLATTENED[name](rows)
    assert_close(value, expected, rows=1000)
    (gradient,), (wanted,) = torch.autograd.grad(value, x), torch.autograd.grad(expected, rows)
    assert gradient.shape == x.shape
    assert_close(gradient.reshape(len(x), -1), wanted, rows=1000)


def test_variance_term_with_other_constants():
    x = rows_of(NARROW)
    expected = torch.relu(2.5 - torch.sqrt(x.var(0) + 0.1)).mean()
    assert_close(mo.vicreg_variance(x, gamma=2.5, eps=0.1), expected, rows=20)


@pytest.mark.parametrize("shape", [NARROW, WIDE])
def test_vicreg_of_two_views_as_in_the_code_of_its_authors(shape):
    """Their `forward`, but for the invariance term."""
    x, y = rows_of(shape), rows_of(shape, seed=1)
    batch_size, num_features = shape
    cx, cy = x - x.mean(dim=0), y - y.mean(dim=0)
    std_x, std_y = torch.sqrt(cx.var(dim=0) + 0.0001), torch.sqrt(cy.var(dim=0) + 0.0001)
    std_loss = torch.mean(F.relu(1 - std_x)) / 2 + torch.mean(F.relu(1 - std_y)) / 2
    cov_x, cov_y = (cx.T @ cx) / (batch_size - 1), (cy.T @ cy) / (batch_size - 1)
    cov_loss = sum(off_diagonal(c).pow(2).sum().div(num_features) for c in (cov_x, cov_y))
    assert_close((mo.vicreg_variance(x) + mo.vicreg_variance(y)) / 2, std_loss, rows=100)
    assert_close(mo.vicreg_covariance(x) + mo.vicreg_covariance(y), cov_loss, rows=100)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_matrices(dtype):
    x = rows_of((3, 4, 5, 2)).to(dtype)
    matrices = mo.gram_matrix(x)
    assert matrices.dtype == statistics_dtype(dtype)
    assert torch.equal(matrices, matrices.mT)
    assert_close(matrices, published_matrix(x.double()), rows=10)
    assert_close(mo.gram_matrix(x, "mean"), published_matrix(x.double()) / 40, rows=10)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("styles", [1, 3])
def test_style_loss(styles, dtype):
    tensors = [rows_of((3, 4, 5, 2)), 1.5 * rows_of((styles, 4, 5, 2), seed=1)]

    def ours(features, style):
        return mo.style_loss(features, mo.gram_matrix(style))

    # Matrices that are rounded lose more than sums do where their difference is small.
    assert_value_and_gradients(ours, style_of_one_layer, tensors, dtype, rows=100)


def test_style_loss_over_layers_as_published():
    features = [rows_of((1, 4, 5, 2)), rows_of((1, 6, 3, 3))]
    style = [rows_of((1, 4, 5, 2), seed=1), rows_of((1, 6, 3, 3), seed=1)]
    target = [mo.gram_matrix(x) for x in style]
    terms = [style_of_one_layer(x, y) for x, y in zip(features, style, strict=True)]
    assert_close(mo.style_loss(features, target), sum(terms) / 2, rows=100)
    assert_close(mo.style_loss(features, target, weight=[3.0, 0.5]), 3 * terms[0] + 0.5 * terms[1], rows=100)


def test_style_loss_of_the_tutorial():
    """Its `gram_matrix` and `mse_loss`, summed over layers; style images of another size are fine."""

    def gram_matrix(input):
        a, b, c, d = input.size()
        features = input.view(a * b, c * d)
        return torch.mm(features, features.t()).div(a * b * c * d)

    features = [rows_of((1, 4, 5, 2)), rows_of((1, 6, 3, 3))]
    style = [rows_of((1, 4, 6, 6), seed=1), rows_of((1, 6, 2, 3), seed=1)]
    expected = sum(F.mse_loss(gram_matrix(x), gram_matrix(y)) for x, y in zip(features, style, strict=True))
    target = [mo.gram_matrix(y, "mean") for y in style]
    assert_close(mo.style_loss(features, target, normalize="mean"), expected, rows=100)
    # Where sizes are equal, it is the published loss times 4 / C^2.
    y = mo.gram_matrix(features[0] * 2)
    published = mo.style_loss(features[0], y)
    assert_close(mo.style_loss(features[0], y / 40, normalize="mean"), published * 4 / 4**2, rows=100)


FUNCTIONS = {
    "coral, narrow": (mo.coral_loss, [NARROW, (6, 5)]),
    "coral, wide": (mo.coral_loss, [WIDE, WIDE]),
    "vicreg variance": (mo.vicreg_variance, [NARROW]),
    "vicreg covariance, narrow": (mo.vicreg_covariance, [NARROW]),
    "vicreg covariance, wide": (mo.vicreg_covariance, [(3, 6)]),
    "gram matrix": (mo.gram_matrix, [(2, 3, 2, 2)]),
    "style": (lambda x, y: mo.style_loss(x, mo.gram_matrix(y)), [(2, 3, 2, 2), (1, 3, 2, 2)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_twice_differentiable(name):
    function, shapes = FUNCTIONS[name]
    tensors = leaves([rows_of(shape, seed=seed) for seed, shape in enumerate(shapes)])
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_and_under_autocast_the_numbers_are_the_same(name):
    function, shapes = FUNCTIONS[name]
    tensors = [rows_of(shape, torch.float32, seed) for seed, shape in enumerate(shapes)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call, enabled in ((function, False), (compiled, False), (function, True)):
        inputs = leaves(tensors)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = call(*inputs).sum()
        results.append([value.detach(), *torch.autograd.grad(value, inputs)])
    torch._dynamo.reset()
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


X, MAPS = torch.randn(4, 3), torch.randn(2, 3, 2, 2)
MATRIX = mo.gram_matrix(MAPS)
WRONG = {
    "coral of a list": (lambda: mo.coral_loss([X], X), TypeError, "source: got list"),
    "coral of integers": (lambda: mo.coral_loss(X, X.long()), TypeError, "target: got dtype torch.int64"),
    "coral of widths": (lambda: mo.coral_loss(X, X[:, :2]), ValueError, "target: got 2 columns, expected 3"),
    "coral of maps": (lambda: mo.coral_loss(MAPS, MAPS[:, :2]), ValueError, "target: got 8 columns, expected 12"),
    "coral of dtypes": (lambda: mo.coral_loss(X, X.double()), TypeError, "target: got dtype torch.float64"),
    "coral of devices": (lambda: mo.coral_loss(X, X.to("meta")), ValueError, "target: got device meta"),
    "coral of one row": (lambda: mo.coral_loss(X, X[:1]), ValueError, "target.*at least two rows"),
    "vicreg of a list": (lambda: mo.vicreg_covariance([X]), TypeError, "x: got list"),
    "vicreg of no columns": (lambda: mo.vicreg_variance(X[:, :0]), ValueError, r"x: got shape \(4, 0\)"),
    "vicreg of one row": (lambda: mo.vicreg_covariance(X[:1]), ValueError, "x.*at least two rows"),
    "style of rows": (lambda: mo.gram_matrix(X), ValueError, r"features: got shape \(4, 3\), expected \(N, C, H, W\)"),
    "style normalized": (lambda: mo.gram_matrix(MAPS, "l2"), ValueError, "normalize: got 'l2'"),
    "style of layers": (lambda: mo.style_loss([MAPS, MAPS], [MATRIX]), ValueError, "target: got 1 layers, expected 2"),
    "style of maps": (lambda: mo.style_loss(MAPS, MAPS), ValueError, r"^target: got shape \(2, 3, 2, 2\)"),
    "style of batches": (lambda: mo.style_loss(MAPS[:1], MATRIX), ValueError, r"expected \(1 or 1, 3, 3\)"),
    "style weights": (lambda: mo.style_loss(MAPS, MATRIX, weight=[1.0, 2.0]), ValueError, "weight: got 2 weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert raised.type is error
