"""Wrong arguments: the right exception, with the argument's name, what was got and what was expected."""

import pytest
import torch
from helpers import assert_raises, make_target

import moment_ops as mo

X = torch.randn(4, 3)
TARGET = make_target([(3,)])
NAN = float("nan")


FEATURES = {
    "array": (X.numpy(), TypeError, "input", "ndarray", "Tensor"),
    "none": (None, TypeError, "input", "NoneType"),
    "number": (3.0, TypeError, "input", "float"),
    "generator": ((x for x in [X]), TypeError, "input", "generator"),
    "empty list": ([], ValueError, "input", "empty"),
    "empty tuple": ((), ValueError, "input", "empty"),
    "array in list": ([X, X.numpy()], TypeError, r"input\[1\]", "ndarray"),
    "nested": ([[X]], TypeError, r"input\[0\]", "list"),
    "int": (X.long(), TypeError, "input", "int64", "float32"),
    "bool": (X.bool(), TypeError, "input", "bool"),
    "complex": (X.to(torch.complex64), TypeError, "input", "complex64"),
    "int in list": ([X, X.int()], TypeError, r"input\[1\]", "int32"),
    "sparse": (X.to_sparse(), TypeError, "input", "sparse"),
    "scalar": (torch.tensor(1.0), ValueError, "input", "scalar"),
    "mixed dtypes": ([X, X.double()], TypeError, r"input\[1\]", "float64", "float32"),
    "mixed devices": ([X, torch.empty(4, 3, device="meta")], ValueError, r"input\[1\]", "meta", "cpu"),
    "empty batch": (X[:0], ValueError, r"^input:", r"\(0, 3\)", "at least one row"),
    "empty batches": ([X[:0], X[:0]], ValueError, r"input\[0\]", r"\(0, 3\)"),
    "different batches": ([X, X[:3]], ValueError, r"input\[1\]", "3", "4"),
    "no columns": (X[:, :0], ValueError, r"^input:", r"\(4, 0\)"),
}


@pytest.mark.parametrize("case", FEATURES)
def test_moments_of_wrong_features(case):
    features, error, *fragments = FEATURES[case]
    assert_raises(lambda: mo.moments(features), error, *fragments)


@pytest.mark.parametrize("case", FEATURES)
def test_moment_loss_of_wrong_features(case):
    features, error, *fragments = FEATURES[case]
    assert_raises(lambda: mo.moment_loss(features, TARGET), error, *fragments)


@pytest.mark.parametrize("case", FEATURES)
def test_the_module_of_wrong_features(case):
    features, error, *fragments = FEATURES[case]
    assert_raises(lambda: mo.MomentLoss(TARGET)(features), error, *fragments)


@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        ({"dim": 2}, ValueError, ("dim", "2", r"\(4, 3\)")),
        ({"dim": -3}, ValueError, ("dim", "-3")),
        ({"dim": (0, 0)}, ValueError, ("dim", "twice")),
        ({"dim": (0, -2)}, ValueError, ("dim", "twice")),
        ({"dim": ()}, ValueError, ("dim", "empty")),
        ({"dim": 0.0}, TypeError, ("dim", "0.0", "int")),
        ({"dim": True}, TypeError, ("dim", "True")),
        ({"dim": None}, TypeError, ("dim", "None")),
        ({"dim": ("0",)}, TypeError, ("dim",)),
        ({"correction": -1}, ValueError, ("correction", "-1")),
        ({"correction": 1.0}, TypeError, ("correction", "1.0", "int")),
        ({"correction": True}, TypeError, ("correction", "True")),
        ({"correction": None}, TypeError, ("correction", "None")),
    ],
)
def test_moments_with_wrong_options(options, error, fragments):
    assert_raises(lambda: mo.moments(X, **options), error, *fragments)


def test_moments_over_a_dimension_that_one_layer_lacks():
    assert_raises(lambda: mo.moments([X[None], X], dim=2), ValueError, "dim", r"\(4, 3\)")


MATCHED = {
    "columns": (torch.randn(4, 5), ValueError, "input", r"\(5,\)", r"\(3,\)"),
    "rank": (torch.randn(4, 3, 1), ValueError, "input", r"\(3, 1\)", r"\(3,\)"),
    "layers": ([X, X], ValueError, "input", "2 layers", "1"),
    "moments of another shape": (mo.Moments(torch.zeros(5)), ValueError, "input", r"\(5,\)", r"\(3,\)"),
    "means alone": (mo.Moments(torch.zeros(3)), ValueError, "input", "variances"),
    "device": (torch.empty(4, 3, device="meta"), ValueError, "input", "meta", "cpu"),
}


@pytest.mark.parametrize("case", MATCHED)
@pytest.mark.parametrize("form", ["function", "module"])
def test_features_that_do_not_match_the_target(case, form):
    features, error, *fragments = MATCHED[case]
    loss = mo.MomentLoss(TARGET) if form == "module" else lambda x: mo.moment_loss(x, TARGET)
    assert_raises(lambda: loss(features), error, *fragments)


OPTIONS = [
    ({"reduction": "none"}, ValueError, ("reduction", "none", "mean", "sum")),
    ({"reduction": None}, ValueError, ("reduction", "None")),
    ({"mean_weight": "1"}, TypeError, ("mean_weight", "str")),
    ({"mean_weight": None}, TypeError, ("mean_weight", "NoneType")),
    ({"var_weight": [1.0, 2.0]}, ValueError, ("var_weight", "2", "1")),
    ({"var_weight": ["1"]}, TypeError, ("var_weight",)),
    ({"var_weight": torch.ones(4)}, ValueError, ("var_weight", r"\(4,\)", r"\(3,\)")),
    ({"var_weight": torch.ones(3, dtype=torch.complex64)}, TypeError, ("var_weight", "complex64")),
]


@pytest.mark.parametrize(("options", "error", "fragments"), OPTIONS)
def test_the_loss_with_wrong_options(options, error, fragments):
    assert_raises(lambda: mo.moment_loss(X, TARGET, **options), error, *fragments)


@pytest.mark.parametrize(("options", "error", "fragments"), OPTIONS)
def test_the_module_with_wrong_options(options, error, fragments):
    assert_raises(lambda: mo.MomentLoss(TARGET, **options), error, *fragments)


@pytest.mark.parametrize("target", [torch.zeros(3), None, [X]])
def test_a_target_that_is_no_moments(target):
    name = type(target).__name__
    assert_raises(lambda: mo.moment_loss(X, target), TypeError, "target", name, "Moments")
    if target is not None:
        assert_raises(lambda: mo.MomentLoss(TARGET).reset(target), TypeError, "target", name)
    assert_raises(lambda: mo.MomentLoss(target), TypeError, "target", name, "Moments")


@pytest.mark.parametrize("average", [0.9, "adam", mo.MovingAverage, TARGET])
def test_an_average_that_is_none(average):
    assert_raises(lambda: mo.MomentLoss(TARGET, average), TypeError, "average", "MovingAverage")


@pytest.mark.parametrize(
    ("mean", "var", "fragment"),
    [([NAN, 0, 0], [1, 1, 1], "mean"), ([0, 0, 0], [1, NAN, 1], "var"), ([0, 0, 0], [1, -1, 1], "negative")],
)
def test_the_module_checks_the_values_of_its_target(mean, var, fragment):
    target = mo.Moments(torch.tensor(mean), torch.tensor(var), shapes=((3,),), validate=False)
    target = mo.Moments(target.mean.float(), target.var.float(), shapes=((3,),), validate=False)
    assert_raises(lambda: mo.MomentLoss(target), ValueError, fragment)


V = torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "error", "fragments"),
    [
        ({"mean": [0.0]}, TypeError, ("mean", "list", "Tensor")),
        ({"mean": torch.zeros(3, dtype=torch.int64)}, TypeError, ("mean", "int64")),
        ({"mean": torch.zeros(3, 1)}, ValueError, ("mean", r"\(3, 1\)")),
        ({"mean": torch.zeros(0)}, ValueError, ("mean", r"\(0,\)")),
        ({"mean": torch.tensor([NAN])}, ValueError, ("mean", "finite")),
        ({"mean": torch.tensor([float("inf")])}, ValueError, ("mean", "finite")),
        ({"mean": V, "var": torch.zeros(4)}, ValueError, ("var", r"\(4,\)", r"\(3,\)")),
        ({"mean": V, "var": V.double()}, TypeError, ("var", "float64", "float32")),
        ({"mean": V, "var": torch.empty(3, device="meta")}, ValueError, ("var", "meta", "cpu")),
        ({"mean": V, "var": torch.tensor([0.0, -1.0, 0.0])}, ValueError, ("var", "negative", "-1")),
        ({"mean": V, "var": torch.tensor([0.0, NAN, 0.0])}, ValueError, ("var", "finite")),
        ({"mean": V, "var": [0.0] * 3}, TypeError, ("var", "list")),
        ({"mean": V, "correction": -1}, ValueError, ("correction", "-1")),
        ({"mean": V, "correction": 0.5}, TypeError, ("correction", "0.5")),
        ({"mean": V, "shapes": ((4,),)}, ValueError, ("shapes", "4", "3")),
        ({"mean": V, "shapes": ((-3,), (-1,))}, ValueError, ("shapes",)),
        ({"mean": V, "shapes": (3,)}, TypeError, ("shapes",)),
        ({"mean": V, "count": [1, 2]}, ValueError, ("count", "2", "1")),
        ({"mean": V, "count": 0}, ValueError, ("count", "0")),
        ({"mean": V, "count": 2.5}, TypeError, ("count", "2.5")),
        ({"mean": V, "count": "many"}, TypeError, ("count",)),
        ({"mean": V, "names": ("a", "b")}, ValueError, ("names", "2", "1")),
        ({"mean": V, "cov": (torch.eye(3), torch.eye(3))}, ValueError, ("cov", "2", "1")),
        ({"mean": V, "cov": torch.eye(4)}, ValueError, (r"cov\[0\]", r"\(4, 4\)", r"\(3, 3\)")),
        ({"mean": V, "cov": torch.arange(9.0).view(3, 3)}, ValueError, (r"cov\[0\]", "asymmetric")),
        ({"mean": V, "cov": torch.eye(3) * NAN}, ValueError, (r"cov\[0\]", "finite")),
        ({"mean": V, "cov": -torch.eye(3)}, ValueError, (r"cov\[0\]", "negative")),
    ],
)
def test_moments_made_of_wrong_parts(arguments, error, fragments):
    assert_raises(lambda: mo.Moments(**arguments), error, *fragments)


def counted(**changes):
    return mo.Moments(**({"mean": V, "var": V, "count": 4} | changes))


@pytest.mark.parametrize(
    ("parts", "error", "fragments"),
    [
        ((), ValueError, ("parts",)),
        ((counted(), X), TypeError, (r"parts\[1\]", "Tensor", "Moments")),
        (([counted()],), TypeError, (r"parts\[0\]", "list")),
        ((counted(), counted(count=None)), ValueError, (r"parts\[1\]", "count")),
        (
            (counted(), counted(mean=torch.zeros(4), var=None)),
            ValueError,
            (r"parts\[1\]", r"\(4,\)", r"\(3,\)"),
        ),
        ((counted(), counted(shapes=((3, 1),))), ValueError, (r"parts\[1\]", r"\(3, 1\)")),
        ((counted(), counted(correction=0)), ValueError, (r"parts\[1\]", "correction", "0", "1")),
        ((counted(), counted(var=None)), ValueError, (r"parts\[1\]", "variances")),
        ((counted(var=None), counted()), ValueError, (r"parts\[1\]", "variances")),
    ],
)
def test_parts_that_cannot_be_merged(parts, error, fragments):
    assert_raises(lambda: mo.Moments.merge(*parts), error, *fragments)


@pytest.mark.parametrize(
    ("make", "error", "fragments"),
    [
        (lambda: mo.MovingAverage(1.0), ValueError, ("decay", "1.0")),
        (lambda: mo.MovingAverage(-0.1), ValueError, ("decay", "-0.1")),
        (lambda: mo.MovingAverage(NAN), ValueError, ("decay", "nan")),
        (lambda: mo.MovingAverage("0.9"), TypeError, ("decay", "str|'0.9'")),
        (lambda: mo.MovingAverage(0.9, bias_correction=1), TypeError, ("bias_correction: got 1", "bool")),
        (lambda: mo.AdamMovingAverage(lr=-1.0), ValueError, ("lr", "-1.0")),
        (lambda: mo.AdamMovingAverage(lr=NAN), ValueError, ("lr", "nan")),
        (lambda: mo.AdamMovingAverage(lr="fast"), TypeError, ("lr", "str|'fast'")),
        (lambda: mo.AdamMovingAverage(betas=(0.5, 1.0)), ValueError, ("betas", "1.0")),
        (lambda: mo.AdamMovingAverage(betas=(0.5,)), ValueError, ("betas",)),
        (lambda: mo.AdamMovingAverage(betas=0.5), TypeError, ("betas", "0.5")),
        (lambda: mo.AdamMovingAverage(eps=-1e-8), ValueError, ("eps", "-1e-08")),
        (lambda: mo.AdamMovingAverage(reduction="none"), ValueError, ("reduction", "none", "mean", "sum")),
        (lambda: mo.AdamMovingAverage(init="normal"), ValueError, ("init", "normal", "zeros", "uniform")),
    ],
)
def test_averages_with_wrong_options(make, error, fragments):
    assert_raises(make, error, *fragments)


@pytest.mark.parametrize(
    ("arguments", "error", "fragments"),
    [
        ((V, torch.eye(3)), TypeError, ("frechet_distance", "mean2")),
        ((V, torch.eye(3), V), TypeError, ("frechet_distance",)),
        ((V[None], torch.eye(3), V, torch.eye(3)), ValueError, ("mean1", r"\(1, 3\)", r"\(D,\)")),
        ((V, torch.eye(4), V, torch.eye(3)), ValueError, ("cov1", r"\(4, 4\)", r"\(3, 3\)")),
        ((V, torch.eye(3), V, torch.zeros(3)), ValueError, ("cov2", r"\(3,\)")),
        ((V, torch.eye(3), torch.zeros(4), torch.eye(4)), ValueError, ("mean2", "4", "3")),
        ((counted(), counted()), ValueError, ("first", "covariance")),
        ((counted(cov=torch.eye(3)), counted()), ValueError, ("second", "covariance")),
        ((counted(cov=torch.eye(3)), V, V, torch.eye(3)), TypeError, ("Moments",)),
    ],
)
def test_a_frechet_distance_of_wrong_arguments(arguments, error, fragments):
    assert_raises(lambda: mo.frechet_distance(*arguments), error, *fragments)


@pytest.mark.parametrize("batches", [[], (), iter(())])
def test_dataset_moments_of_no_batches(batches):
    assert_raises(lambda: mo.dataset_moments(lambda x: x, batches), ValueError, "batches")


def test_dataset_moments_of_features_that_change_shape():
    batches = [torch.randn(3, 4), torch.randn(3, 5)]
    assert_raises(lambda: mo.dataset_moments(lambda x: x, batches), ValueError, r"\(5,\)", r"\(4,\)")


def test_dataset_moments_of_an_extractor_that_gives_no_features():
    assert_raises(lambda: mo.dataset_moments(lambda x: None, [X]), TypeError, "NoneType")


def test_a_backend_of_an_unknown_name():
    def call():
        with mo.backend("metal"):
            pass

    assert_raises(call, ValueError, "backend", "metal", "triton")


def test_an_error_leaves_the_average_as_it_was():
    loss = mo.MomentLoss(TARGET, mo.AdamMovingAverage())
    loss(X)
    with pytest.raises(ValueError, match="input"):
        loss(torch.randn(4, 5))
    assert int(loss.step) == 1
