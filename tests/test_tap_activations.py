"""Which calls of a network an extractor taps by default, and those within PyTorch's own composite modules."""

import pytest
import torch
from tapped_networks import is_watched
from torch import nn
from torch.nn import functional

import moment_ops as mo


class Activations(nn.Module):
    """Every kind, as modules, functions and methods."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.modules_ = nn.ModuleList([nn.GELU(), nn.SiLU(inplace=True), nn.PReLU(), nn.Sigmoid(), nn.Hardswish()])

    def forward(self, x):
        x = self.first(x)
        for module in self.modules_:
            x = module(x)
        x = functional.leaky_relu(x, 0.2) + functional.gelu(x) + torch.selu(x)
        return (x.relu() * x.sigmoid()).tanh() + functional.softmax(functional.softplus(x), -1)


TAPPED = (
    "modules_.0:0", "modules_.1:0", "modules_.2:0", "modules_.4:0", "leaky_relu:0", "gelu:0", "selu:0", "relu:0",
    "softplus:0",
)  # fmt: skip


@pytest.mark.parametrize("watched", [False, True])
def test_activations_are_tapped_by_default_but_those_that_gate(watched, monkeypatch):
    torch.manual_seed(0)
    net, images = Activations().double(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    if watched:
        monkeypatch.setattr("moment_ops.taps.tracing._Tracer.trace", lambda *_: 1 / 0)
    extractor = mo.MomentExtractor(net)
    m = extractor(images)
    assert extractor.names == TAPPED
    assert m.count.tolist() == [5] * 9
    expected = functional.gelu(net.first(images))
    torch.testing.assert_close(m.layers()[0][0], expected.mean(0))
    last = mo.MomentExtractor(net, "softplus")(images)
    torch.testing.assert_close(m.layers()[-1][0], last.mean)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (nn.ReLU, ("relu:0",)),
        (nn.GELU, ("modules_.0:0", "gelu:0")),
        (nn.Sigmoid, ("modules_.3:0", "sigmoid:0")),
        ((nn.Tanh, nn.Softmax), ("tanh:0", "softmax:0")),
        (["tanh", "leaky_relu:0"], ("leaky_relu:0", "tanh:0")),
        (lambda name, module: isinstance(module, nn.SELU), ("selu:0",)),
    ],
)
@pytest.mark.parametrize("watched", [False, True])
def test_calls_of_functions_are_of_their_modules_type(layers, expected, watched, monkeypatch):
    if watched:
        monkeypatch.setattr("moment_ops.taps.tracing._Tracer.trace", lambda *_: 1 / 0)
    extractor = mo.MomentExtractor(Activations(), layers)
    extractor(torch.randn(5, 4))
    assert extractor.names == expected


def test_activations_of_timm_are_of_the_type_that_they_compute():
    class Swish(nn.Module):
        __module__ = "timm.layers.activations"

        def forward(self, x):
            return x * x.sigmoid()

    net = nn.Sequential(nn.Linear(4, 4), Swish())
    for layers in (nn.SiLU, mo.MomentExtractor(net).names):
        extractor = mo.MomentExtractor(net, layers)
        assert extractor.names == ("1:0",)


class Transformer(nn.Module):
    def __init__(self, activation):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x)[:, 0])


@pytest.mark.parametrize(
    ("activation", "layers", "expected"),
    [
        ("gelu", None, ("encoder.layers.0.gelu:0", "encoder.layers.1.gelu:0")),
        (functional.relu, nn.ReLU, ("encoder.layers.0.relu:0", "encoder.layers.1.relu:0")),
        (nn.SiLU(), None, ("encoder.layers.0.activation:0", "encoder.layers.1.activation:0")),
        ("relu", nn.TransformerEncoderLayer, ("encoder.layers.0:0", "encoder.layers.1:0")),
        ("relu", "encoder.layers.1.norm1", ("encoder.layers.1.norm1:0",)),
        ("relu", ["encoder.layers.0.linear1", "head"], ("encoder.layers.0.linear1:0", "head:0")),
    ],
)
def test_layers_within_a_transformer_of_torch_are_tapped(activation, layers, expected):
    torch.manual_seed(0)
    net, x = Transformer(activation).eval(), torch.randn(5, 6, 8)
    extractor = mo.MomentExtractor(net) if layers is None else mo.MomentExtractor(net, layers)
    with torch.no_grad():
        m = extractor(x)
    assert extractor.names == expected
    assert m.names == expected


def test_a_transformer_runs_layer_by_layer_with_the_numbers_of_the_plain_one():
    torch.manual_seed(0)
    net, x = Transformer("relu").double().eval(), torch.randn(5, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = net.encoder(x)
        (got,) = mo.MomentExtractor(net, "encoder.layers.1").features(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_what_lies_beside_a_recurrent_network_is_traced():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.act = nn.GRU(4, 8, batch_first=True), nn.ReLU()

        def forward(self, x):
            return self.act(self.rnn(x)[0])

    extractor = mo.MomentExtractor(Net(), (nn.GRU, nn.ReLU))
    assert is_watched(extractor) == [False]
    assert extractor.names == ("rnn:0", "act:0")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (nn.ReLU, ("layers.0.relu:0", "layers.1.relu:0")),
        ("layers.1.linear1", ("layers.1.linear1:0",)),
        (lambda name, module: name == "layers.0.norm1:0", ("layers.0.norm1:0",)),
        (nn.TransformerEncoder, ("TransformerEncoder:0",)),
    ],
)
def test_a_transformer_may_be_the_whole_network(layers, expected):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    extractor = mo.MomentExtractor(nn.TransformerEncoder(layer, 2), layers)
    extractor(torch.randn(5, 6, 8))
    assert extractor.names == expected
