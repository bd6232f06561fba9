"""Where the taps of a `MomentExtractor` are: names, selection, errors, and what becomes of the network."""

import copy
import re

import pytest
import torch
from helpers import assert_raises
from tapped_networks import (
    NAMES,
    NETWORKS,
    UNTRACEABLE,
    AddedTo,
    Block,
    Chain,
    Flow,
    Residual,
    Shared,
    UsedLater,
    Viewed,
    is_watched,
    make_images,
    make_network,
    plain_features,
)
from torch import nn
from torch.nn import functional

import moment_ops as mo
from moment_ops.taps import functions


def score(moments):
    return (moments.mean.square() + moments.var.square()).sum()


def assert_same_moments_and_gradients(extractor, features):
    """Those of `features`, a plain function of the images."""
    images = make_images()
    m, plain = extractor(images), mo.moments(features(images))
    torch.testing.assert_close(m.mean, plain.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.var, plain.var, rtol=1e-11, atol=1e-12)
    ours, theirs = (torch.autograd.grad(score(value), images)[0] for value in (m, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


# Names


@pytest.mark.parametrize("kind", NETWORKS)
def test_names_are_module_paths_and_call_indices_in_execution_order(kind):
    extractor = mo.MomentExtractor(make_network(kind))
    if kind in UNTRACEABLE:
        assert is_watched(extractor) == [True]
        assert extractor.names is None
        extractor(make_images())
    assert extractor.names == NAMES[kind]
    assert mo.MomentExtractor(make_network(kind, seed=1)).names in (NAMES[kind], None)
    assert extractor.names == extractor(make_images()).names


@pytest.mark.parametrize("kind", [Chain, Residual, Shared])
def test_a_watched_network_has_the_names_and_numbers_of_a_traced_one(kind, monkeypatch):
    net, images = make_network(kind), make_images()
    traced = mo.MomentExtractor(net)
    monkeypatch.setattr("moment_ops.taps.tracing._Tracer.trace", lambda *_: 1 / 0)
    watched = mo.MomentExtractor(net)
    assert is_watched(watched) == [True]
    m, expected = watched(images), traced(images)
    assert (m.names, m.shapes) == (expected.names, expected.shapes)
    torch.testing.assert_close(m.mean, expected.mean, rtol=1e-12, atol=1e-12)
    assert_same_moments_and_gradients(watched, lambda x: plain_features(net, x))


def test_a_network_may_be_a_single_module():
    images = make_images()
    extractor = mo.MomentExtractor(nn.ReLU())
    assert extractor.names == ("ReLU:0",)
    assert torch.equal(extractor.features(images)[0], images.relu())


# Several networks


@pytest.mark.parametrize("kinds", [(Chain, Residual), (Flow, Chain), (Flow, Flow)])
@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList, iter])
def test_several_networks_are_one_feature_set(kinds, container):
    nets = [make_network(kind, seed=i) for i, kind in enumerate(kinds)]
    extractor = mo.MomentExtractor(container(nets))
    assert_same_moments_and_gradients(extractor, lambda x: [y for net in nets for y in plain_features(net, x)])
    assert extractor.names == tuple(f"{i}/{name}" for i, kind in enumerate(kinds) for name in NAMES[kind])


@pytest.mark.parametrize("container", [dict, nn.ModuleDict])
def test_networks_may_have_names(container):
    extractor = mo.MomentExtractor(container({"vgg": make_network(Chain), "resnet": make_network(Residual)}))
    assert extractor.names[:3] == ("vgg/2:0", "vgg/5:0", "vgg/8:0")
    assert extractor.names[3:] == tuple(f"resnet/{name}" for name in NAMES[Residual])


def test_names_of_an_extractor_choose_layers_of_another():
    nets = [make_network(Chain), make_network(Residual)]
    names = mo.MomentExtractor(nets).names
    fewer = mo.MomentExtractor(nets, names[:5])
    assert fewer.names == names[:5]
    m, features = fewer(make_images()), mo.MomentExtractor(nets).features(make_images())
    torch.testing.assert_close(m.mean, mo.moments(features[:5]).mean)


# Selection

SELECTIONS = {
    "type": (nn.ReLU, NAMES[Residual]),
    "types": ((nn.Linear, nn.ReLU), (*NAMES[Residual], "head:0")),
    "own type": (Block, ("layer1.0:0", "layer1.1:0")),
    "container": (nn.Sequential, ("layer1:0",)),
    "whole network": (Residual, ("Residual:0",)),
    "module name": ("layer1.0", ("layer1.0:0",)),
    "call name": ("layer1.0.relu:1", ("layer1.0.relu:1",)),
    "all calls": (["layer1.0.relu"], ("layer1.0.relu:0", "layer1.0.relu:1")),
    "names in any order": (["head", "conv", "relu:0"], ("conv:0", "relu:0", "head:0")),
    "predicate on names": (lambda name, module: name.startswith("layer1.1.bn"), ("layer1.1.bn1:0", "layer1.1.bn2:0")),
    "predicate on modules": (lambda name, module: isinstance(module, nn.ReLU), NAMES[Residual]),
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("case", SELECTIONS)
def test_layers_by_type_name_or_predicate(case, watched, monkeypatch):
    layers, expected = SELECTIONS[case]
    net, images = make_network(Residual).eval(), make_images()
    if watched:
        monkeypatch.setattr("moment_ops.taps.tracing._Tracer.trace", lambda *_: 1 / 0)
    extractor = mo.MomentExtractor(net, layers)
    extractor(images)
    assert extractor.names == expected


def hooked(net, types):
    """Outputs of modules by plain hooks."""

    def features(images):
        outputs = []
        hooks = [
            module.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
            for module in net.modules()
            if isinstance(module, types)
        ]
        net.eval()(images)
        for hook in hooks:
            hook.remove()
        return outputs

    return features


@pytest.mark.parametrize("types", [nn.Conv2d, nn.BatchNorm2d, (nn.Conv2d, nn.BatchNorm2d, nn.Linear, Block)])
@pytest.mark.parametrize("kind", [Chain, Residual])
@pytest.mark.parametrize("watched", [False, True])
def test_identity_taps_have_the_moments_and_gradients_of_hooks(kind, types, watched, monkeypatch):
    """Also where the network goes on in place: in-place ReLUs and sums after the tap."""
    net = make_network(kind)
    if watched:
        monkeypatch.setattr("moment_ops.taps.tracing._Tracer.trace", lambda *_: 1 / 0)
    assert_same_moments_and_gradients(mo.MomentExtractor(net, types), hooked(net, types))


class Attention(nn.Module):
    """Modules that return tuples."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = x.flatten(1, 2)
        y, _ = self.attention(x, x, x)
        y, state = self.lstm(y)
        return self.head(y), state


def test_of_a_tuple_the_first_tensor_is_tapped():
    net = Attention().double().eval()
    images = make_images()
    extractor = mo.MomentExtractor(net, (nn.MultiheadAttention, nn.LSTM))
    x = images.flatten(1, 2)
    y, _ = net.attention(x, x, x)
    for ours, theirs in zip(extractor.features(images), [y, net.lstm(y)[0]], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert extractor(images).shapes == ((24, 8), (24, 4))


# In-place operations


@pytest.mark.parametrize("kind", [UsedLater, Viewed, AddedTo, Shared])
def test_in_place_operations_keep_their_meaning(kind):
    net = make_network(kind)
    extractor = mo.MomentExtractor(net)
    assert is_watched(extractor) == [False]
    assert_same_moments_and_gradients(extractor, lambda x: plain_features(net, x))
    images = make_images().detach()
    kept = images.clone()
    extractor(images)
    assert torch.equal(images, kept)


def count_calls(extractor, function):
    return sum(node.target is function for node in extractor.nets[0].graph.nodes)


def test_an_in_place_relu_is_fused_unless_a_view_sees_what_it_writes():
    assert count_calls(mo.MomentExtractor(make_network(UsedLater)), functions.relu_tap) == 3
    assert count_calls(mo.MomentExtractor(make_network(Viewed)), functions.identity_tap) == 1
    chain = mo.MomentExtractor(make_network(Chain))
    assert (count_calls(chain, functions.relu_tap), count_calls(chain, functions.identity_tap)) == (3, 0)


class Changed(nn.Module):
    """Goes on in place with what a ReLU returned."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = functional.relu(self.conv(x))
        y += 1
        return torch.relu(y - 1.5)


@pytest.mark.parametrize("watched", [False, True])
def test_features_are_not_changed_by_what_follows_in_place(watched, monkeypatch):
    net, images = make_network(Changed), make_images().detach()
    if watched:
        monkeypatch.setattr("moment_ops.taps.tracing._Tracer.trace", lambda *_: 1 / 0)
    extractor = mo.MomentExtractor(net)
    first = net.conv(images).relu()
    second = (first + 1 - 1.5).relu()
    for ours, theirs in zip(extractor.features(images), (first, second), strict=True):
        torch.testing.assert_close(ours, theirs)
    if not watched:
        assert_same_moments_and_gradients(extractor, lambda x: (y := net.conv(x).relu(), (y - 0.5).relu()))


# Folding


def batch_norms(extractor):
    return [m for m in extractor.modules() if isinstance(m, nn.BatchNorm2d)]


def test_batch_norm_is_folded_where_it_is_exact():
    assert not batch_norms(mo.MomentExtractor(make_network(Chain)))
    assert not batch_norms(mo.MomentExtractor(make_network(Residual)))
    # The convolution's output is wanted itself.
    assert len(batch_norms(mo.MomentExtractor(make_network(Chain), (nn.Conv2d, nn.ReLU)))) == 2
    assert len(batch_norms(mo.MomentExtractor(make_network(Chain, torch.bfloat16)))) == 2


class Twice(nn.Module):
    """A convolution, then a BatchNorm, that are called twice, and outputs that are used twice."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.bn3, self.bn4 = nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        x = torch.relu(self.bn1(self.shared(x)))
        x = torch.relu(self.bn2(self.shared(x)))
        x = torch.relu(self.bn3(self.conv1(x)))
        x = torch.relu(self.bn3(self.conv2(x)))
        y = self.conv3(x)
        return torch.relu(self.bn4(y) + y)


def test_batch_norm_is_not_folded_into_what_others_use():
    net = make_network(Twice)
    extractor = mo.MomentExtractor(net)
    assert len(batch_norms(extractor)) == 4
    assert_same_moments_and_gradients(extractor, lambda x: plain_features(net, x))


def test_dilated_grouped_strided_and_reflecting_convolutions_are_folded():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, (1, 3), stride=(2, 1), padding="valid", bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    )
    net = make_network(lambda: net)
    extractor = mo.MomentExtractor(net)
    assert not batch_norms(extractor)
    assert_same_moments_and_gradients(extractor, lambda x: plain_features(net, x))


def test_hooks_of_the_network_are_obeyed():
    net = make_network(Chain)
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    net[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_same_moments_and_gradients(mo.MomentExtractor(net), lambda x: plain_features(net, x))


# The user's network, and the extractor's own


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_network_of_the_user_stays_as_it_is(kind):
    net = make_network(kind)
    net.eval()[0].train() if kind is Chain else net.train()
    net(make_images()).sum().backward()
    state = copy.deepcopy(net.state_dict())
    before = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), dict(vars(m))) for m in net.modules()]
    parameters = [(p, p.requires_grad, p.grad.clone(), p._version) for p in net.parameters()]
    extractor = mo.MomentExtractor(net)
    extractor(make_images()).mean.sum().backward()
    extractor.features(make_images())
    after = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), dict(vars(m))) for m in net.modules()]
    assert before == after
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    for now, (parameter, requires_grad, grad, version) in zip(net.parameters(), parameters, strict=True):
        assert now is parameter
        assert (now.requires_grad, now._version) == (requires_grad, version)
        assert torch.equal(now.grad, grad)


@pytest.mark.parametrize("kind", [Residual, Flow])
def test_the_extractor_is_frozen_and_in_evaluation_mode_for_ever(kind):
    net, images = make_network(kind), make_images()
    net(images).sum().backward()
    extractor = mo.MomentExtractor(net)
    expected = extractor(images).mean
    parent = nn.Sequential(extractor)
    for change in (extractor.train, parent.train, extractor.eval, parent.eval):
        change()
        assert not any(module.training for module in extractor.modules())
        assert torch.equal(extractor(images).mean, expected)
    assert not any(p.requires_grad or p.grad is not None for p in extractor.parameters())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(extractor(images).mean, expected)
    assert extractor(images.detach()).mean.requires_grad is False


class Fails(nn.Module):
    def forward(self, x):
        raise AssertionError("what follows the last tap was run")


@pytest.mark.parametrize("kind", [Chain, Flow])
def test_what_follows_the_last_tap_is_not_run(kind):
    net = make_network(kind)
    extractor = mo.MomentExtractor(net)
    extractor(make_images())
    runs = []
    for module in extractor.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    extractor(make_images())
    extractor.features(make_images())
    assert runs == []
    if kind is Chain:
        assert not any(isinstance(m, nn.Linear) for m in extractor.modules())


# Errors


NET = make_network(Residual)
ERRORS = {
    "no network": (lambda: mo.MomentExtractor([]), ValueError, "nets: got an empty list, expected at least one Module"),
    "not a network": (lambda: mo.MomentExtractor(torch.relu), TypeError, "nets: got builtin"),
    "not networks": (lambda: mo.MomentExtractor([NET, 3]), TypeError, r"nets\[1\]: got int"),
    "nothing matches": (lambda: mo.MomentExtractor(NET, nn.GELU), ValueError, "GELU", "conv:0, bn:0, relu:0, "),
    "nothing matches in one": (
        lambda: mo.MomentExtractor([NET, nn.Linear(3, 3)]),
        ValueError,
        "nothing in network 1 matches",
        "available: 1 Linear; by name: 1/Linear:0",
    ),
    "no such name": (
        lambda: mo.MomentExtractor(NET, ["conv", "cnov"]),
        ValueError,
        r"no cnov \(similar: conv, conv:0\); available: 7 Conv2d, 6 ReLU",
        "conv:0, bn:0",
    ),
    "no such call": (lambda: mo.MomentExtractor(NET, "layer1.0.relu:2"), ValueError, "layer1.0.relu:1"),
    "a scripted network": (
        lambda: mo.MomentExtractor(torch.jit.script(nn.ReLU())),
        TypeError,
        "nets: got a ScriptModule",
    ),
    "scripted networks": (
        lambda: mo.MomentExtractor([NET, torch.jit.script(nn.ReLU())]),
        TypeError,
        r"nets\[1\]: got a",
    ),
    "no layers": (lambda: mo.MomentExtractor(NET, []), TypeError, r"layers: got \[\]"),
    "number": (lambda: mo.MomentExtractor(NET, 3), TypeError, "layers: got 3, expected module types, names"),
    "mixed": (lambda: mo.MomentExtractor(NET, ["conv", nn.ReLU]), TypeError, "layers: got"),
    "other type": (lambda: mo.MomentExtractor(NET, int), TypeError, "layers: got <class 'int'>"),
    "no tensor": (
        lambda: mo.MomentExtractor(ReturnsText(), "text")(make_images()),
        TypeError,
        "layers: a selected module returned str",
    ),
    "no images": (lambda: mo.MomentExtractor(NET)(make_images()[:0]), ValueError, "empty batch"),
}


class Text(nn.Module):
    def forward(self, x):
        return "text"


class ReturnsText(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = Text()

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.text(x)


def test_an_error_about_a_large_network_fits_on_a_screen():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(400)])
    with pytest.raises(
        ValueError, match=r"available: 4\d\d Sequential, 400 Linear, 400 BatchNorm1d; by name: 0.0:0"
    ) as raised:
        mo.MomentExtractor(net)
    assert re.search(r", and \d+ more$", str(raised.value))
    assert len(str(raised.value)) < 1800


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case):
    call, *expected = ERRORS[case]
    assert_raises(call, *expected)


def test_a_watched_network_says_on_its_first_call_what_there_is():
    net = make_network(Flow)
    assert_raises(
        lambda: mo.MomentExtractor(net, nn.GELU)(make_images()), ValueError, "GELU", "conv:0, bn:0, act:0, relu:0"
    )
    assert_raises(lambda: mo.MomentExtractor(net, ["conv", "cnov"])(make_images()), ValueError, "no cnov ", "conv:0")


def test_a_watched_network_that_takes_another_path_is_an_error():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    extractor = mo.MomentExtractor(Branches())
    extractor(torch.ones(2, 3))
    assert_raises(lambda: extractor(-torch.ones(2, 3)), ValueError, r"\['b:0'\], expected \['a:0'\] as in")
