"""Features with names, as extractors return them in a mapping; and features that are nested."""

from collections import OrderedDict, UserDict

import pytest
import torch
from helpers import assert_raises, assert_same_bits, make_features

import moment_ops as mo
from moment_ops.ops import backends

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = {"layer1": (3,), "layer2": (2, 2), "layer3": (3,)}
NAMES = tuple(SHAPES)
ROWS = 6


def features(names=NAMES, seed=0):
    return dict(zip(names, make_features(ROWS, SHAPES.values(), seed=seed), strict=True))


def unnamed(seed=0):
    return list(features(seed=seed).values())


def matrices(names=NAMES):
    return {name: torch.eye(x[0].numel()) for name, x in features(names).items()}


def target(names=NAMES):
    m = mo.moments(features(names, seed=1))
    return mo.Moments(m.mean, m.var, tuple(matrices().values()), m.count, shapes=m.shapes, names=names)


def maps(names=NAMES):
    return {name: x.view(ROWS, 1, -1, 1) for name, x in features(names).items()}


# By name: a function of features, and one of the names of its target and the names that it is called with.
LOSSES = {
    "moment_loss": lambda names, given: mo.moment_loss(given, target(names)),
    "MomentLoss": lambda names, given: mo.MomentLoss(target(names))(given),
    "covariance_loss": lambda names, given: mo.covariance_loss(given, target(names)),
    "covariance_loss of matrices": lambda names, given: mo.covariance_loss(given, matrices(names)),
    "covariance_distance": lambda names, given: mo.covariance_distance(given, features(names, seed=1)),
    "CovarianceLoss": lambda names, given: mo.CovarianceLoss(target(names))(given),
    "CovarianceDistance": lambda names, given: mo.CovarianceDistance(features(names, seed=1))(given),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


class Outputs(OrderedDict):
    """As the outputs of a model of Hugging Face."""


@pytest.mark.parametrize("mapping", [dict, OrderedDict, Outputs, UserDict])
@pytest.mark.parametrize("dim", [0, (0, 1)])
def test_moments_of_a_mapping_are_those_of_its_values_with_its_names(mapping, dim):
    given = features()
    given["layer3"] = given["layer3"].flip(1)
    m = mo.moments(mapping(given), dim=dim)
    expected = mo.moments(list(given.values()), dim=dim)
    assert m.names == NAMES
    assert m.shapes == expected.shapes
    assert_same_bits([m.mean, m.var, m.count], [expected.mean, expected.var, expected.count])


def test_the_order_is_that_of_the_mapping():
    given = features()
    m = mo.moments({name: given[name] for name in reversed(NAMES)})
    assert m.names == NAMES[::-1]
    assert_same_bits(m.mean, mo.moments(list(given.values())[::-1]).mean)


def test_keys_of_another_type_become_strings():
    assert mo.moments(dict(enumerate(unnamed()))).names == ("0", "1", "2")


def test_a_sequence_has_no_names():
    assert mo.moments(unnamed()).names is None


def test_covariances_of_a_mapping_are_those_of_its_values():
    assert_same_bits(mo.covariance(features()), mo.covariance(unnamed()))


def test_a_style_is_matched_by_name():
    style = {name: mo.gram_matrix(x) + 1 for name, x in maps().items()}
    assert_same_bits(mo.style_loss(maps(), style), mo.style_loss(list(maps().values()), list(style.values())))
    assert_raises(lambda: mo.style_loss(maps(("a", "b", "c")), style), ValueError, "^input: .*'a'.*'layer1'")


@losses
def test_a_loss_takes_a_mapping(loss):
    assert_same_bits(loss(NAMES, features()), loss(NAMES, unnamed()))


@losses
def test_layers_of_other_names_are_an_error(loss):
    names = ("layer3", "layer2", "layer1")
    assert_raises(lambda: loss(NAMES, features(names)), ValueError, "^input: .*'layer3' at position 0.*'layer1' as in")


def test_alike_calls_with_other_names_are_told_apart():
    loss = mo.MomentLoss(target())
    for _ in range(2):
        loss(features())
        assert_raises(lambda: loss(features(("a", "b", "c"))), ValueError, "'a'.*'layer1'")
        assert mo.moments(features(("a", "b", "c"))).names == ("a", "b", "c")
        assert mo.moments(features()).names == NAMES


def test_alike_calls_with_other_names_share_a_plan(monkeypatch):
    chosen = []
    fill = backends.fill
    monkeypatch.setattr(backends, "fill", lambda *arguments: chosen.append(arguments[0]) or fill(*arguments))
    for names in (NAMES, ("a", "b", "c"), NAMES):
        mo.moments({name: torch.ones(7, 11, 13) for name in names})
    assert chosen == ["moments"]


@pytest.mark.parametrize("call", [mo.moments, mo.covariance, LOSSES["MomentLoss"], LOSSES["CovarianceLoss"]])
def test_what_is_no_tensor_is_named_by_its_key(call):
    given = features() | {"hidden": (torch.ones(ROWS, 3),)}
    function = call if call in (mo.moments, mo.covariance) else lambda given: call(NAMES, given)
    for _ in range(2):
        assert_raises(lambda: function(given), TypeError, r"^input\['hidden'\]: got tuple, expected a Tensor")


def test_errors_about_shapes_and_dtypes_name_the_keys():
    other_rows = features() | {"layer2": torch.ones(ROWS + 1, 2, 2)}
    assert_raises(lambda: mo.moments(other_rows), ValueError, r"^input\['layer2'\]: .*as in input\['layer1'\]")
    other_dtype = features() | {"layer3": torch.ones(ROWS, 3).double()}
    assert_raises(lambda: mo.moments(other_dtype), TypeError, r"^input\['layer3'\]: .*as in input\['layer1'\]")
    assert_raises(lambda: mo.moments({}), ValueError, "^input: got an empty mapping")


@losses
def test_a_layer_of_another_width_is_named_by_its_key(loss):
    given = features() | {"layer2": torch.ones(ROWS, 2, 3)}
    assert_raises(lambda: loss(NAMES, given), ValueError, r"^input\['layer2'\]: got .*\(.*2, 3\), expected .* as in")


def test_a_tensor_alone_is_named_by_the_argument():
    alone = mo.moments(torch.randn(ROWS, 3))
    assert_raises(lambda: mo.moment_loss(torch.ones(ROWS, 4), alone), ValueError, "^input: got features of shape")
    assert_raises(lambda: mo.covariance_loss(torch.ones(ROWS, 4), torch.eye(3)), ValueError, "^input: got 4 columns")


def test_moments_of_another_shape_are_named_by_their_layer():
    given = mo.moments(features() | {"layer2": torch.ones(ROWS, 4)})
    assert_raises(lambda: mo.moment_loss(given, target()), ValueError, r"^input\['layer2'\]: got features of shape")


def test_a_wrong_target_is_named_by_its_key():
    skew = torch.eye(4) + torch.ones(4, 4).triu(1)
    for wrong, message in (
        (torch.ones(4, 3), r"got shape \(4, 3\), expected a square matrix"),
        (skew, "got an asymmetric matrix"),
        (torch.full((4, 4), torch.nan), "got non-finite values"),
    ):
        given = matrices() | {"layer2": wrong}
        assert_raises(lambda given=given: mo.CovarianceLoss(given), ValueError, rf"^target\['layer2'\]: {message}")
    style = {name: mo.gram_matrix(x) for name, x in maps().items()} | {"layer2": torch.ones(ROWS, 2, 2)}
    assert_raises(lambda: mo.style_loss(maps(), style), ValueError, r"^target\['layer2'\]: got shape \(6, 2, 2\)")


def test_wrong_features_to_keep_are_named_by_their_key():
    given = features() | {"layer3": torch.full((ROWS, 3), torch.nan)}
    assert_raises(lambda: mo.CovarianceDistance(given), ValueError, r"^other\['layer3'\]: got non-finite values")


def test_what_does_not_fit_into_memory_is_named_by_its_key(monkeypatch):
    monkeypatch.setattr("moment_ops.covariances._free_bytes", lambda device: 1 << 30)
    wide = {"narrow": torch.ones(ROWS, 3), "wide": torch.ones(ROWS, 1).expand(ROWS, 40_000)}
    for call, argument in (
        (mo.covariance, "input"),
        (lambda x: mo.covariance_distance(x, x, method="covariance"), "other"),
        (lambda x: mo.CovarianceDistance(x, method="covariance"), "other"),
        (lambda x: mo.dataset_moments(lambda batch: batch, [x], cov=True), "features"),
    ):
        assert_raises(lambda call=call: call(wide), ValueError, rf"^{argument}\['wide'\]: its covariance is 40000")


@pytest.mark.parametrize("cov", [False, True])
def test_a_data_set_keeps_the_names_of_its_features(cov):
    m = mo.dataset_moments(lambda seed: features(seed=seed), range(3), cov=cov)
    assert m.names == NAMES
    expected = mo.dataset_moments(lambda seed: unnamed(seed), range(3), cov=cov)
    assert_same_bits([m.mean, m.var, m.cov], [expected.mean, expected.var, expected.cov])


@pytest.mark.parametrize("cov", [False, True])
def test_batches_whose_names_differ_are_an_error(cov):
    batches = [features(), features(("layer3", "layer2", "layer1"))]
    assert_raises(lambda: mo.dataset_moments(lambda given: given, batches, cov=cov), ValueError, "layer3.*expected")


def test_a_mapping_compiles():
    torch._dynamo.reset()
    loss = mo.MomentLoss(target())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(features()), loss(features()))


def test_a_mapping_goes_through_transforms():
    loss = mo.MomentLoss(target())
    gradients = torch.func.grad(loss)(features())
    expected = torch.func.grad(loss)(unnamed())
    assert tuple(gradients) == NAMES
    assert_same_bits(list(gradients.values()), expected)


def nested(layout):
    rows = [torch.ones(3), torch.ones(2)]
    return torch.nested.nested_tensor(rows, layout=layout)


CALLS = {
    "moments": mo.moments,
    "moments of a list": lambda x: mo.moments([torch.ones(2, 3), x]),
    "covariance": mo.covariance,
    "moment_loss": lambda x: mo.moment_loss(x, target()),
    "covariance_loss": lambda x: mo.covariance_loss(x, torch.eye(3)),
    "covariance_distance of the other": lambda x: mo.covariance_distance(torch.ones(4, 3), x),
    "coral_loss": lambda x: mo.coral_loss(x, torch.ones(2, 3)),
    "vicreg_variance": mo.vicreg_variance,
    "gram_matrix": mo.gram_matrix,
    "style_loss": lambda x: mo.style_loss(x, x),
    "Moments": mo.Moments,
    "frechet_distance": lambda x: mo.frechet_distance(x, torch.eye(3), torch.zeros(3), torch.eye(3)),
}


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nested_tensors_are_an_error(call, layout):
    for _ in range(2):
        assert_raises(lambda: call(nested(layout)), TypeError, "nested")
