"""`MomentNetwork`: networks, layers and arguments that it cannot work with are errors that name them."""

import warnings

import pytest
import torch
from test_moment_network import images, small_network
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

import moment_ops as mo


class Returns(nn.Module):
    """A network that gives what a function makes of its features."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(32, 3, bias=False).double(), function

    def forward(self, x):
        return self.function(torch.relu(self.layer(x.flatten(1))))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda h: h, r"\(5, 3\)"),
        (lambda h: h.sum(), r"\(\)"),
        (lambda h: h[:4, 0], r"\(4,\)"),
        (lambda h: h[:, :1, None], r"\(5, 1, 1\)"),
    ],
)
@pytest.mark.parametrize("call", ["moments", "objective"])
def test_an_output_that_is_not_one_value_per_sample_is_an_error(function, shape, call):
    net = mo.MomentNetwork(Returns(function))
    with pytest.raises(ValueError, match=rf"f: Returns returned shape {shape} for .*expected one value per sample"):
        net.moments(images()) if call == "moments" else net.objective(images(), images())


def test_an_output_that_is_no_tensor_is_an_error():
    with pytest.raises(TypeError, match="f: Returns returned tuple"):
        mo.MomentNetwork(Returns(lambda h: (h, h))).moments(images())


def test_a_network_without_parameters_is_an_error():
    with pytest.raises(ValueError, match="Flatten has no parameters"):
        mo.MomentNetwork(nn.Flatten())


def test_a_parameter_that_does_not_require_grad_is_named_at_construction_and_later():
    f = small_network()
    net = mo.MomentNetwork(f)
    f[3].bias.requires_grad_(False)
    for call in (lambda: mo.MomentNetwork(f), lambda: net.moments(images())):
        with pytest.raises(ValueError, match=r"parameter 3\.bias does not require grad"):
            call()


def test_a_parameter_that_the_network_does_not_use_is_named():
    f = small_network()
    f.spare = nn.Identity()
    f.spare.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"parameter spare\.weight is not used by Sequential"):
        mo.MomentNetwork(f).moments(images())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class SquareLayer(nn.Module):
    def forward(self, x):
        return Square.apply(x)


class Attention(nn.Module):
    """PyTorch's fused attention has no second derivative."""

    def forward(self, x):
        return functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("call", ["moments", "objective"])
@pytest.mark.parametrize("layer", [SquareLayer, Attention])
def test_a_layer_that_is_not_twice_differentiable_is_named(layer, call):
    body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sequential(nn.LeakyReLU(0.2, inplace=True), layer()), nn.Flatten())
    net = mo.MomentNetwork(nn.Sequential(body, nn.Linear(12, 1, bias=False)).double())
    with pytest.raises(ValueError, match=rf"layer 0\.1\.1 \({layer.__name__}\) is not twice differentiable"):
        net.moments(images().requires_grad_()) if call == "moments" else net.objective(images(), images())


def test_a_last_layer_that_is_not_twice_differentiable_is_noticed_though_it_raises_nothing_by_itself():
    """Its incoming gradient is a constant, with which such functions give a second derivative of zero."""
    f = nn.Sequential(nn.Flatten(), nn.Linear(32, 1), nn.ReLU(), SquareLayer()).double()
    with pytest.raises(ValueError, match=r"layer 3 \(SquareLayer\)"):
        mo.MomentNetwork(f).moments(images().requires_grad_())


def test_hidden_units_that_are_changed_in_place_are_named():
    f = nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Hardtanh(0, 1, inplace=True), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"the output of 2:0 is changed in place"):
        mo.MomentNetwork(f.double(), nn.ReLU).moments(images())


def test_activations_in_place_are_fine():
    f, g = small_network(), small_network()
    g.load_state_dict(f.state_dict())
    g[1].inplace = True
    x, y = images().requires_grad_(), images().requires_grad_()
    for net, z in ((mo.MomentNetwork(f), x), (mo.MomentNetwork(g), y)):
        net.moments(z).mean.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        (nn.GELU, ValueError, r"hidden: nothing in f matches GELU; available: 2 Linear, .*by name: 0:0, 1:0"),
        ("7", ValueError, r"hidden: there is no 7; available: 2 Linear, .*by name: 0:0, 1:0"),
        (3, TypeError, "hidden: got 3"),
        ("", ValueError, "hidden: there is no ; available"),
    ],
)
def test_a_choice_of_hidden_layers_that_there_are_not_is_an_error_that_lists_all(hidden, error, message):
    with pytest.raises(error, match=message):
        mo.MomentNetwork(small_network(), hidden).moments(images())


def test_hidden_layers_without_the_batch_on_dimension_0_are_named():
    f = nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Flatten(0), nn.Unflatten(0, (-1, 4)))
    f = nn.Sequential(f, nn.Linear(4, 1, bias=False)).double()
    with pytest.raises(ValueError, match=r"hidden: 0\.3:0 returned shape \(20,\), expected 5 samples"):
        mo.MomentNetwork(f, ["0.2", "0.3"]).moments(images())


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"pixels": 1.0}, ValueError, "weights: got the key 'pixels', expected hidden, gradient, input"),
        ({"input": -1.0}, ValueError, r"weights\['input'\]: got -1.0"),
        ({"hidden": float("inf")}, ValueError, r"weights\['hidden'\]: got inf"),
        ({"input": "much"}, TypeError, r"weights\['input'\]: got 'much'"),
        ([1.0, 1.0, 1.0], TypeError, "weights: got list"),
    ],
)
def test_wrong_weights_are_errors(weights, error, message):
    with pytest.raises(error, match=message):
        mo.MomentNetwork(small_network(), weights=weights)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, "x: got NoneType"),
        (torch.zeros(3, 2, 4, 4, dtype=torch.int64), TypeError, "x: got dtype torch.int64"),
        (torch.zeros(0, 2, 4, 4), ValueError, "x: got an empty batch"),
        (torch.tensor(1.0), ValueError, "x: got a scalar"),
    ],
)
def test_wrong_input_is_an_error(x, error, message):
    with pytest.raises(error, match=message):
        mo.MomentNetwork(small_network(torch.float32)).moments(x)


def test_an_unknown_penalty_is_an_error():
    with pytest.raises(ValueError, match="penalty: got 'none', expected 'real' or 'generated'"):
        mo.MomentNetwork(small_network()).objective(images(), images(), penalty="none")


def test_a_bias_in_the_last_layer_is_reported_once_and_others_are_not():
    f = nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    net = mo.MomentNetwork(f)
    with pytest.warns(UserWarning, match=r"the gradient of 3\.bias is the same for all samples"):
        net.objective(images(), images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.objective(images(), images())
        mo.MomentNetwork(small_network()).objective(images(), images())
