"""The distance of two sets of features: both methods, which one is taken, past batches, state and errors."""

import io

import pytest
import torch
from helpers import assert_close, assert_same_bits
from test_covariance_loss import ENTRIES, assert_loss, covariances, distance, inputs, mean_distance, state_of
from torch.autograd import gradgradcheck

import moment_ops as mo
from moment_ops.losses.covariance_distance import cheaper_method

pytestmark = pytest.mark.usefixtures("backend")

METHODS = ("covariance", "gram")


def others(rows=9):
    return [y.detach() for y in inputs(rows, seed=3)]


@pytest.mark.parametrize("kind", ["function", "class"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("joint", [False, True])
def test_both_methods_give_the_distance(kind, method, joint):
    features, other = inputs(), others()
    options = {"method": method, "joint": joint, "mean_weight": 0.3, "reduction": "mean"}
    if kind == "function":
        ours = mo.covariance_distance(features, other, **options)
    else:
        ours = mo.CovarianceDistance(other, **options)(features)
    x, y = features, other
    if joint:
        x, y = ([torch.cat([z.flatten(1) for z in group], 1)] for group in (x, y))
    mean = torch.cat([z.flatten(1).mean(0) for z in y])
    weights = [1.0] * len(x)
    theirs = distance(x, covariances(y), weights) / (121 if joint else ENTRIES) + 0.3 * mean_distance(x, mean) / 11
    assert_loss(ours, theirs, features)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("correction", [0, 2])
def test_weights_and_correction(method, correction):
    features, other = inputs(), others()
    options = {"method": method, "cov_weight": [0.5, 2.0], "correction": correction}
    theirs = distance(features, covariances(other, correction), (0.5, 2.0), correction)
    assert_loss(mo.covariance_distance(features, other, **options), theirs, features)
    assert_loss(mo.CovarianceDistance(other, **options)(features), theirs, features)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mean_weight", [0.0, 0.5])
def test_other_features_get_gradients(method, mean_weight):
    features, other = inputs(), inputs(9, seed=3)
    ours = mo.covariance_distance(features, other, method=method, mean_weight=mean_weight)
    mean = torch.cat([y.flatten(1).mean(0) for y in other])
    moved = (torch.cat([x.flatten(1).mean(0) for x in features]) - mean).square().sum()
    assert_loss(ours, distance(features, covariances(other)) + mean_weight * moved, features + other)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives(method):
    def loss(*tensors):
        return mo.covariance_distance(list(tensors[:2]), list(tensors[2:]), method=method, mean_weight=0.5)

    assert gradgradcheck(loss, (*inputs(5), *inputs(4, seed=2)))


@pytest.mark.parametrize("method", METHODS)
def test_features_of_two_dtypes_are_compared_in_the_wider_one(method):
    features, other = inputs(), [y.float() for y in others()]
    ours = mo.covariance_distance(features, other, method=method)
    assert ours.dtype == torch.float64
    # In covariances the narrower ones are float32.
    theirs = distance(features, covariances(other))
    assert_close(ours.float() if method == "covariance" else ours, theirs, rows=1000)


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_other_shapes_have_the_same_columns(method):
    x, y = (z[0].detach() for z in (inputs(shapes=[(3, 4, 5)]), inputs(9, shapes=[(60,)], seed=3)))
    expected = mo.covariance_distance(x.flatten(1), y, method=method)
    last = x.to(memory_format=torch.channels_last)
    assert_close(mo.covariance_distance(last, y, method=method), expected, rows=1000)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_may_be_a_single_column(method):
    x, y = (z[0].detach() for z in (inputs(shapes=[()]), inputs(9, shapes=[()], seed=3)))
    expected = mo.covariance_distance(x.unsqueeze(1), y.unsqueeze(1), method=method, mean_weight=1.0)
    assert_same_bits(mo.covariance_distance(x, y, method=method, mean_weight=1.0), expected)
    assert_close(mo.CovarianceDistance(y, method=method, mean_weight=1.0)(x), expected, rows=10)


def test_auto_takes_the_method_with_fewer_products():
    assert cheaper_method(8, 8, [1000]) == "gram"
    assert cheaper_method(1000, 1000, [8]) == "covariance"
    loss = mo.CovarianceDistance(torch.randn(8, 1000))
    assert loss.method == "gram"
    assert mo.CovarianceDistance(torch.randn(8, 1000), method="covariance").method == "covariance"
    assert mo.CovarianceDistance(torch.randn(1000, 8)).method == "covariance"


def test_auto_takes_the_one_method_that_the_options_leave():
    wide, narrow = torch.randn(8, 1000), torch.randn(1000, 8)
    assert mo.CovarianceDistance(narrow, estimator="unbiased").method == "gram"
    assert mo.CovarianceDistance(narrow, queue=2).method == "gram"
    assert mo.CovarianceDistance(wide, precision="bf16").method == "covariance"


def test_auto_takes_inner_products_where_a_matrix_does_not_fit(monkeypatch):
    monkeypatch.setattr("moment_ops.covariances._free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr("moment_ops.losses.covariance_distance.cheaper_method", lambda *_, **__: "covariance")
    x, y = torch.randn(2, 20_000), torch.randn(2, 20_000)
    assert mo.CovarianceDistance(y).method == "gram"
    assert mo.covariance_distance(x, y) == mo.covariance_distance(x, y, method="gram")
    with pytest.raises(ValueError, match="method='gram'"):
        mo.covariance_distance(x, y, method="covariance")


@pytest.mark.parametrize("precision", ["bf16", "tf32", "bf16x3"])
def test_a_precision_is_honoured_or_refused(precision):
    """Through inner products there is full precision alone, also where they would be cheaper."""
    x, y = torch.randn(8, 200), torch.randn(8, 200)
    expected = mo.covariance_distance(x, y, method="covariance", precision=precision)
    assert_same_bits(mo.covariance_distance(x, y, precision=precision), expected)
    assert_close(mo.CovarianceDistance(y, precision=precision)(x), expected, rows=200)
    for options in ({"method": "gram"}, {"estimator": "unbiased"}):
        with pytest.raises(ValueError, match=f"precision: got '{precision}', expected 'ieee'"):
            mo.covariance_distance(x, y, precision=precision, **options)
        with pytest.raises(ValueError, match=f"precision: got '{precision}', expected 'ieee'"):
            mo.CovarianceDistance(y, precision=precision, **options)
    with pytest.raises(ValueError, match=f"precision: got '{precision}', expected 'ieee'"):
        mo.CovarianceDistance(y, precision=precision, queue=1)


def with_past(features, past):
    """The rows of a batch, and those of earlier ones."""
    return [torch.cat([x, *[old[i].detach() for old in past]]) for i, x in enumerate(features)]


@pytest.mark.parametrize("mean_weight", [0.0, 1.0])
@pytest.mark.parametrize("sizes", [(7, 7, 7, 7), (5, 1, 9, 2, 14, 6), (10, 10, 10), (30, 25, 3)])
def test_the_last_rows_of_past_batches_count_among_the_rows(mean_weight, sizes):
    """For the covariance; the means are those of the batch."""
    other, queue = others(), 10
    loss, past = mo.CovarianceDistance(other, queue=queue, mean_weight=mean_weight), []
    mean = torch.cat([y.flatten(1).mean(0) for y in other])
    for seed, rows in enumerate(sizes):
        features = inputs(rows, seed=seed)
        theirs = distance(with_past(features, past), covariances(other))
        theirs = theirs + mean_weight * mean_distance(features, mean)
        assert_loss(loss(features), theirs, features)
        kept = with_past([x[:0] for x in features], [*past, features])
        past = [[x[-queue:] for x in kept]]
    before = state_of(loss)
    loss.eval()(inputs(seed=9))
    assert_same_bits(state_of(loss), before)


def test_one_row_is_enough_where_there_are_past_ones():
    loss = mo.CovarianceDistance(others(), queue=10)
    with pytest.raises(ValueError, match="input: got a batch of 1, expected more than 1 rows"):
        loss(inputs(1))
    loss(inputs(2))
    features = inputs(1, seed=1)
    assert_loss(loss(features), distance(with_past(features, [inputs(2)]), covariances(others())), features)


def test_a_queue_is_filled_without_a_loss():
    first, second = (mo.CovarianceDistance(others(), queue=10) for _ in range(2))
    batches = [inputs(rows, seed=rows) for rows in (4, 9, 1)]
    first.eval().fill(iter(batches))
    assert not first.training
    for batch in batches[:2]:
        second(batch)
    second.fill(batches[2:])
    assert_same_bits(state_of(first), state_of(second))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_past_rows_resume_bit_for_bit(steps):
    first, second = (mo.CovarianceDistance(others(), queue=16) for _ in range(2))
    for seed in range(steps):
        first(inputs(seed=seed))
    second([x.float() for x in inputs()])
    second.load_state_dict(first.state_dict())
    for seed in (7, 8, 9):
        assert_same_bits(first(inputs(seed=seed)), second(inputs(seed=seed)))
    first.reset()
    assert_same_bits(first(inputs()), mo.CovarianceDistance(others(), queue=16)(inputs()).detach())


@pytest.mark.parametrize(("saved", "wanted"), [(16, 32), (32, 16), (1, 2)])
def test_a_queue_of_another_size_is_refused_and_changes_nothing(saved, wanted):
    first, second = (mo.CovarianceDistance(others(), queue=rows) for rows in (saved, wanted))
    first(inputs())
    second(inputs(seed=8))
    before = state_of(second)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match=f"queue: got a state of {saved} past rows, expected {wanted}"):
        second.load_state_dict(torch.load(file))
    assert_same_bits(state_of(second), before)
    features = inputs()
    past = [x[-wanted:] for x in inputs(seed=8)]
    assert_loss(second(features), distance(with_past(features, [past]), covariances(others())), features)


@pytest.mark.parametrize("method", METHODS)
def test_the_state_resumes_bit_for_bit(method):
    first = mo.CovarianceDistance(others(), method=method, mean_weight=0.5)
    second = mo.CovarianceDistance([2 * y for y in others()], method=method, mean_weight=0.5)
    second.load_state_dict(first.state_dict())
    assert_same_bits(first(inputs()), second(inputs()))


def test_reset_takes_other_features():
    loss = mo.CovarianceDistance(others(), mean_weight=0.5, method="covariance")
    address = loss.covariance_loss.target_cov.data_ptr()
    new = [2 * y for y in others(12)]
    loss.reset(new)
    assert loss.covariance_loss.target_cov.data_ptr() == address
    expected = mo.CovarianceDistance(new, mean_weight=0.5, method="covariance")
    assert_same_bits(loss(inputs()), expected(inputs()))


def test_reset_follows_the_cheaper_method():
    loss = mo.CovarianceDistance(torch.randn(8, 1000))
    narrow, x = torch.randn(1000, 8), torch.randn(7, 8)
    loss.reset(narrow)
    assert loss.method == "covariance"
    assert_same_bits(loss(x), mo.CovarianceDistance(narrow)(x))


@pytest.mark.parametrize("method", METHODS)
def test_it_compiles_to_one_graph(method):
    torch._dynamo.reset()
    plain = mo.CovarianceDistance(others(), method=method, mean_weight=0.5)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    features = inputs()
    ours, theirs = compiled(features), plain(features)
    assert_same_bits(ours.detach(), theirs.detach())
    assert_same_bits(torch.autograd.grad(ours, features), torch.autograd.grad(theirs, features))
    torch._dynamo.reset()


X, Y = torch.randn(5, 3), torch.randn(6, 3)
ERRORS = {
    "no layers": ([], Y, {}, ValueError, "input: got an empty"),
    "integers": (X.long(), Y, {}, TypeError, "input.*int64"),
    "array": (X.numpy(), Y, {}, TypeError, "input.*ndarray"),
    "other array": (X, Y.numpy(), {}, TypeError, "other.*ndarray"),
    "empty input": (X[:0], Y, {}, ValueError, "input.*empty batch"),
    "empty other": (X, Y[:0], {}, ValueError, "other.*empty batch"),
    "one row": (X[:1], Y, {}, ValueError, "input: got a batch of 1, expected more than 1 rows"),
    "one other row": (X, Y[:1], {}, ValueError, "other: got a batch of 1, expected more than 1 rows"),
    "three rows": (X[:3], Y, {"estimator": "unbiased"}, ValueError, "input: got 3 rows.* 4 with estimator 'unbiased'"),
    "three other rows": (
        X,
        Y[:3],
        {"estimator": "unbiased"},
        ValueError,
        "other: got 3 rows.* 4 with estimator 'unbiased'",
    ),
    "number of layers": ([X, X], [Y], {}, ValueError, "input: got 2 layers, expected 1 as in other"),
    "widths": (X, Y[:, :2], {}, ValueError, "input: got 3 columns .* expected 2 as in other"),
    "devices": (X.to("meta"), Y, {}, ValueError, "input: got device meta, expected cpu as in other"),
    "method": (X, Y, {"method": "both"}, ValueError, "method: got 'both'"),
    "reduction": (X, Y, {"reduction": "max"}, ValueError, "reduction: got 'max'"),
    "precision": (X, Y, {"precision": "fp8"}, ValueError, "precision: got 'fp8'"),
    "estimator": (X, Y, {"estimator": "v"}, ValueError, "estimator: got 'v', expected 'biased' or 'unbiased'"),
    "unbiased covariance": (
        X,
        Y,
        {"estimator": "unbiased", "method": "covariance"},
        ValueError,
        "estimator: got 'unbiased' with method 'covariance'",
    ),
    "correction": (X, Y, {"correction": -1}, ValueError, "correction: got -1"),
    "unbiased over N": (X, Y, {"estimator": "unbiased", "correction": 0}, ValueError, "correction: got 0"),
    "weights": (X, Y, {"cov_weight": [1.0, 1.0]}, ValueError, "cov_weight: got 2 weights, expected one per layer, 1"),
    "weight": (X, Y, {"cov_weight": "1"}, TypeError, "cov_weight: got str"),
    "joint": (X, Y, {"joint": "yes"}, TypeError, "joint: got 'yes'"),
    "joint weights": ([X, X], [Y, Y], {"joint": True, "cov_weight": [1.0, 1.0]}, ValueError, "cov_weight: got 2.* 1"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("kind", ["function", "class"])
def test_wrong_arguments(case, kind):
    input, other, options, error, message = ERRORS[case]
    calls = {
        "function": lambda: mo.covariance_distance(input, other, **options),
        "class": lambda: mo.CovarianceDistance(other, **options)(input),
    }
    with pytest.raises(error, match=message) as raised:
        calls[kind]()
    assert raised.type is error


def test_the_class_checks_the_values_of_the_other_features():
    with pytest.raises(ValueError, match=r"^other: got non-finite values"):
        mo.CovarianceDistance(Y * float("nan"))


def test_wrong_queues():
    with pytest.raises(TypeError, match=r"queue: got 1\.5"):
        mo.CovarianceDistance(Y, queue=1.5)
    with pytest.raises(TypeError, match="queue: got True"):
        mo.CovarianceDistance(Y, queue=True)
    with pytest.raises(ValueError, match="queue: got -1, expected a non-negative number of past rows"):
        mo.CovarianceDistance(Y, queue=-1)
    with pytest.raises(ValueError, match="queue: got 2 with method 'covariance'"):
        mo.CovarianceDistance(Y, queue=2, method="covariance")
