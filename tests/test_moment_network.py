"""`MomentNetwork`: hidden units, parameter gradients and input as moments; the objective that trains the network."""

import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import moment_ops as mo
from moment_ops.training.moment_networks import ConvMomentNetwork, SmallMomentNetwork

PARTS = ("hidden", "gradient", "input")


def small_network(dtype=torch.float64):
    """Two hidden layers and a last one without bias, for images (N, 2, 4, 4)."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.Tanh(),
        nn.Linear(4, 1, bias=False),
    ).to(dtype)


def images(rows=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)


def part_of(m, group):
    """The packed means of one group."""
    sizes = zip(m.names, m.mean.split(m.sizes), strict=True)
    return torch.cat([mean for name, mean in sizes if name.partition("/")[0] == group])


def per_sample_means(f, x):
    """Parameter gradients sample by sample, averaged: what the mean gradient has to be."""
    rows = [torch.autograd.grad(f(row).sum(), list(f.parameters())) for row in x.split(1)]
    return torch.cat([torch.stack(grads).mean(0).flatten() for grads in zip(*rows, strict=True)])


def test_moments_are_hidden_units_in_execution_order_then_parameter_gradients_then_the_input():
    f, x = small_network(), images()
    m = mo.MomentNetwork(f).moments(x)
    assert m.names == (
        "hidden/1:0",
        "hidden/4:0",
        "gradient/0.weight",
        "gradient/0.bias",
        "gradient/3.weight",
        "gradient/3.bias",
        "gradient/5.weight",
        "input",
    )
    assert m.shapes == ((3, 2, 2), (4,), (3, 2, 3, 3), (3,), (4, 12), (4,), (1, 4), (2, 4, 4))
    assert (m.var, m.count.tolist()) == (None, [5] * 8)
    hidden = torch.cat([f[:2](x).mean(0).flatten(), f[:5](x).mean(0)])
    torch.testing.assert_close(part_of(m, "hidden"), hidden)
    torch.testing.assert_close(part_of(m, "gradient"), per_sample_means(f, x))
    torch.testing.assert_close(part_of(m, "input"), x.mean(0).flatten())


@pytest.mark.parametrize("group", PARTS)
def test_the_gradient_to_the_input_through_each_part_alone_is_that_of_finite_differences(group):
    """A gradient moment without a graph of its own would give zeros here, and teach a generator nothing."""
    net = mo.MomentNetwork(small_network())
    x = images(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: part_of(net.moments(x), group), x)
    gradient = torch.autograd.grad(part_of(net.moments(x), group).square().sum(), x)[0]
    assert gradient.abs().max() > 1e-4


def test_moments_are_twice_differentiable():
    net = mo.MomentNetwork(small_network())
    assert torch.autograd.gradgradcheck(lambda x: net.moments(x).mean, images(2).requires_grad_())


def test_matching_gradient_moments_alone_moves_the_input_towards_the_data():
    net = mo.MomentNetwork(small_network(), weights={"hidden": 0, "input": 0})
    with torch.no_grad():
        target = net.moments(images(8, seed=1) + 1)
    loss_fn = mo.MomentLoss(target, mean_weight=net.mean_weight(target), reduction="sum")
    x = images(8).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    losses = []
    for _ in range(100):
        loss = loss_fn(net.moments(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_parameters_of_the_network_get_no_gradients_and_it_stays_as_it_was():
    f = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten())
    f = nn.Sequential(f, nn.Linear(12, 1, bias=False)).double()
    before = {name: value.clone() for name, value in f.state_dict().items()}
    net = mo.MomentNetwork(f)
    net.moments(images().requires_grad_()).mean.sum().backward()
    assert all(parameter.grad is None for parameter in f.parameters())
    assert all(module.training and not module._forward_hooks for module in f.modules())
    assert all(torch.equal(value, before[name]) for name, value in f.state_dict().items())


def test_moments_of_data_build_no_graph_and_leave_no_tensors_behind():
    net = mo.MomentNetwork(small_network())
    x = images()
    net.moments(x)

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors()
    m = net.moments(x)
    assert not m.mean.requires_grad
    del m
    # Other tests may leave some that are collected meanwhile.
    assert tensors() <= before


@pytest.mark.parametrize("sizes", [(40,), (32, 8), (1, 38, 1), (7,) * 5 + (5,)])
def test_moments_of_a_data_set_do_not_depend_on_its_batches(sizes):
    net = mo.MomentNetwork(small_network())
    x = images(40)
    m = mo.dataset_moments(net.moments, x.split(list(sizes)))
    whole = net.moments(x)
    torch.testing.assert_close(m.mean, whole.mean, rtol=1e-12, atol=1e-14)
    assert (m.names, m.count.tolist(), m.var) == (whole.names, whole.count.tolist(), None)


def test_batch_norm_and_dropout_do_not_make_moments_depend_on_the_batch():
    f = nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))
    net = mo.MomentNetwork(nn.Sequential(f, nn.Linear(6, 1, bias=False)).double())
    x = images(12)
    parts = [net.moments(part) for part in x.split([1, 11])]
    torch.testing.assert_close(mo.Moments.merge(*parts).mean, net.moments(x).mean)


def test_calls_of_functions_and_modules_called_twice_are_hidden_layers_of_their_own():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(32, 32), nn.ELU(), nn.Linear(32, 1, bias=False)

        def forward(self, x):
            h = functional.leaky_relu(self.first(x.flatten(1)), 0.1)
            return self.last(torch.tanh(self.act(self.act(self.first(h)) + 1)))

    m = mo.MomentNetwork(Network().double()).moments(images())
    assert [name for name in m.names if name.startswith("hidden")] == [
        "hidden/leaky_relu:0",
        "hidden/act:0",
        "hidden/act:1",
        "hidden/tanh:0",
    ]


@pytest.mark.parametrize(
    ("hidden", "expected"),
    [
        (nn.LeakyReLU, ["1:0"]),
        ((nn.Tanh, nn.Flatten), ["2:0", "4:0"]),
        ("4", ["4:0"]),
        (["0", "4:0"], ["0:0", "4:0"]),
        (lambda name, module: isinstance(module, nn.Linear), ["3:0", "5:0"]),
    ],
)
def test_hidden_layers_are_chosen_by_type_name_or_predicate(hidden, expected):
    m = mo.MomentNetwork(small_network(), hidden).moments(images())
    assert [name for name in m.names if name.startswith("hidden")] == [f"hidden/{name}" for name in expected]


def test_weights_multiply_the_squared_distances_of_their_group():
    net = mo.MomentNetwork(small_network(), weights={"hidden": 0.1, "input": 3.0})
    real, fake = net.moments(images(seed=1)), net.moments(images())
    squares = {group: (part_of(real, group) - part_of(fake, group)).square().sum() for group in PARTS}
    loss = mo.moment_loss(fake, real, mean_weight=net.mean_weight(real), reduction="sum")
    expected = 0.1 * squares["hidden"] + squares["gradient"] + 3.0 * squares["input"]
    torch.testing.assert_close(loss, expected)


def test_a_loss_with_an_average_restarts_with_the_moments_of_a_retrained_network_in_the_same_memory():
    net = mo.MomentNetwork(small_network(torch.float32), weights={"input": 0.1})
    x, real = images(dtype=torch.float32).requires_grad_(), images(seed=1, dtype=torch.float32)
    target = net.moments(real)
    average = mo.AdamMovingAverage(5e-3, reduction="sum")
    loss_fn = mo.MomentLoss(target, average, mean_weight=net.mean_weight(target), reduction="sum")
    loss_fn(net.moments(x))
    addresses = {name: value.data_ptr() for name, value in loss_fn.named_buffers()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    loss_fn.reset(net.moments(real))
    assert {name: value.data_ptr() for name, value in loss_fn.named_buffers()} == addresses
    fresh = mo.MomentLoss(net.moments(real), average, mean_weight=net.mean_weight(target), reduction="sum")
    assert torch.equal(loss_fn(net.moments(x)), fresh(net.moments(x)))


def test_a_second_backward_gives_the_same_and_notices_changed_parameters():
    net = mo.MomentNetwork(small_network())
    x = images().requires_grad_()
    loss = net.moments(x).mean.square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], first)
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="parameters were changed"):
        torch.autograd.grad(loss, x)


def test_under_autocast_moments_are_float32_and_teach():
    net = mo.MomentNetwork(small_network(torch.float32))
    x = images(dtype=torch.float32).requires_grad_()
    exact = torch.autograd.grad(net.moments(x).mean.square().sum(), x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        m = net.moments(x)
    assert m.mean.dtype == torch.float32
    rough = torch.autograd.grad(m.mean.square().sum(), x)[0]
    # Some ten roundings to bfloat16 on the way.
    assert (rough - exact).norm() < 10 * torch.finfo(torch.bfloat16).eps * exact.norm()


def test_of_a_compiled_network_what_was_compiled_is_used():
    f = small_network()
    assert mo.MomentNetwork(torch.compile(f)).f is f


def step_on_a_part(rank, sizes):
    """Loss, and gradient of this process's rows of the images; without a rank, of all rows."""
    torch.manual_seed(0)
    net = mo.MomentNetwork(small_network())
    x = images(sum(sizes))
    if rank is not None:
        x = x.split(list(sizes))[rank]
    x = x.requires_grad_()
    target = net.moments(images(20, seed=1))
    average = mo.AdamMovingAverage(0.1, reduction="sum")
    group = False if rank is None else None
    loss = mo.MomentLoss(target, average, reduction="sum", process_group=group)(net.moments(x))
    loss.backward()
    return loss.detach(), x.grad


def test_a_loss_merges_these_moments_over_processes(ranks):
    """Gradients are as DistributedDataParallel, which averages them, wants them."""
    sizes = (5, 2)
    loss, grad = step_on_a_part(None, sizes)
    results = ranks(step_on_a_part, sizes)
    for (part_loss, part_grad), rows in zip(results, grad.split(list(sizes)), strict=True):
        torch.testing.assert_close(part_loss, loss)
        torch.testing.assert_close(part_grad / len(sizes), rows)


# The objective.


def naive_objective(f, real, generated, penalised, penalty_weight, squared_norm):
    loss = -functional.logsigmoid(f(real)).mean() - functional.logsigmoid(-f(generated)).mean()
    penalties = []
    for x in penalised:
        grads = torch.autograd.grad(f(x).mean(), list(f.parameters()), create_graph=True)
        penalties.append((sum(g.square().sum() for g in grads) - squared_norm) ** 2)
    return loss + penalty_weight * sum(penalties) / len(penalties)


@pytest.mark.parametrize("penalty", ["real", "generated", "both"])
def test_the_objective_is_the_logistic_loss_plus_the_penalty_and_so_are_its_gradients(penalty):
    f, real, generated = small_network(), images(6), images(4, seed=1)
    penalised = {"real": [real], "generated": [generated], "both": [real, generated]}[penalty]
    loss = mo.MomentNetwork(f).objective(real, generated, penalty=penalty, penalty_weight=0.7, squared_norm=0.3)
    expected = naive_objective(f, real, generated, penalised, 0.7, 0.3)
    torch.testing.assert_close(loss, expected)
    parameters = list(f.parameters())
    for grad, exact in zip(*(torch.autograd.grad(y, parameters) for y in (loss, expected)), strict=True):
        torch.testing.assert_close(grad, exact)


def test_the_gradient_of_the_objective_is_that_of_finite_differences():
    f, real, generated = small_network(), images(3), images(3, seed=1)
    net = mo.MomentNetwork(f)

    def objective(*parameters):
        return net.objective(real, generated, penalty="both", penalty_weight=0.5)

    assert torch.autograd.gradcheck(objective, tuple(f.parameters()))


def test_the_alternating_penalty_takes_turns_which_the_state_dict_keeps():
    f, real, generated = small_network(), images(), images(seed=1)
    net = mo.MomentNetwork(f)
    by_name = {name: net.objective(real, generated, penalty=name) for name in ("real", "generated")}
    net = mo.MomentNetwork(f)
    assert torch.equal(net.objective(real, generated), by_name["real"])
    other = mo.MomentNetwork(f)
    other.load_state_dict(net.state_dict())
    for each in (net, other):
        assert torch.equal(each.objective(real, generated), by_name["generated"])
    net.eval()
    for _ in range(2):
        assert torch.equal(net.objective(real, generated), by_name["real"])


def test_the_objective_reports_its_parts():
    net = mo.MomentNetwork(small_network())
    real, generated = images(6), images(6, seed=1)
    parts = net.objective_parts(real, generated, penalty="generated", penalty_weight=0.5, squared_norm=2.0)
    norm = part_of(net.moments(generated), "gradient").square().sum()
    torch.testing.assert_close(parts.squared_norm, norm)
    torch.testing.assert_close(parts.penalty, 0.5 * (norm - 2.0) ** 2)
    torch.testing.assert_close(parts.loss, parts.logistic + parts.penalty)
    right = (net.f(real) > 0).sum() + (net.f(generated) < 0).sum()
    assert parts.accuracy.item() == pytest.approx(right.item() / 12)


def test_the_objective_teaches_the_network_to_tell_real_from_generated():
    net = mo.MomentNetwork(small_network())
    real, generated = images(32) + 0.5, images(32, seed=1) - 0.5
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        parts = net.objective_parts(real, generated)
        parts.loss.backward()
        optimizer.step()
    assert parts.accuracy > 0.95


def test_samples_get_no_gradients_from_the_objective():
    real, generated = images().requires_grad_(), images(seed=1).requires_grad_()
    mo.MomentNetwork(small_network()).objective(real, generated).backward()
    assert real.grad is None
    assert generated.grad is None


# Rescaling.


@pytest.mark.parametrize("squared_norm", [0.5, 1.0, 10.0])
def test_rescaling_gives_the_mean_gradient_the_squared_norm_asked_for(squared_norm):
    torch.manual_seed(1)
    net, x = mo.MomentNetwork(small_network()), images(64)
    net.rescale(x, squared_norm)
    norm = part_of(net.moments(x), "gradient").square().sum().item()
    assert norm == pytest.approx(squared_norm, rel=1e-3)


def test_rescaling_makes_signals_of_one_size_in_all_layers():
    """In a network of linear layers without biases, outputs then have sizes c, c^2, c^3."""
    f = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False)).double()
    with torch.no_grad():
        f[0].weight.mul_(100)
    x = images(64).flatten(1)
    mo.MomentNetwork(f, hidden=nn.Linear).rescale(x)
    first, second, third = (f[: i + 1](x).square().mean().sqrt() for i in range(3))
    torch.testing.assert_close(second, first**2)
    torch.testing.assert_close(third, first**3)


def test_rescaling_around_a_constant_gradient_is_an_error_that_names_the_parameter():
    f = nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"squared_norm: got 1\.0, but the gradient of 3\.bias is the same"):
        mo.MomentNetwork(f).rescale(images(), 1.0)


def test_rescaling_a_layer_that_gives_only_zeros_is_an_error_that_names_it():
    f = small_network()
    with torch.no_grad():
        f[3].weight.zero_()
        f[3].bias.zero_()
    with pytest.raises(ValueError, match="outputs of layer 3 of f have a root mean square of 0"):
        mo.MomentNetwork(f).rescale(images())


def test_rescaling_a_network_without_linear_layers_is_an_error():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return torch.tanh(self.scale * x.flatten(1)).sum(1)

    with pytest.raises(ValueError, match="Scaled has no linear layer or convolution"):
        mo.MomentNetwork(Scaled()).rescale(images())


# The ready networks.


@pytest.mark.parametrize(
    ("width", "size", "parameters", "hidden"),
    [(128, 32, 4_584_577, 286_720), (384, 32, 41_180_545, 860_160), (128, 64, 4_609_153, 1_146_880)],
)
def test_the_convolutional_network_has_the_published_size(width, size, parameters, hidden):
    with torch.device("meta"):
        f = ConvMomentNetwork(3, size, width, last_bias=True)
        assert sum(p.numel() for p in f.parameters()) == parameters
        units = []
        for module in f.modules():
            if isinstance(module, nn.LeakyReLU):
                module.register_forward_hook(lambda module, args, y: units.append(y[0].numel()))
        assert f(torch.empty(2, 3, size, size)).shape == (2,)
    assert sum(units) == hidden


def test_the_small_network_has_181984_moments_on_digits():
    m = mo.MomentNetwork(SmallMomentNetwork()).moments(torch.randn(2, 1, 32, 32))
    assert len(m.mean) == 181_984


@pytest.mark.parametrize("network", [ConvMomentNetwork, SmallMomentNetwork])
def test_ready_networks_take_any_channels_width_and_size_without_a_constant_gradient(network):
    net = mo.MomentNetwork(network(2, 16, width=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = net.moments(torch.randn(2, 2, 16, 16, requires_grad=True))
    m.mean.sum().backward()
    with pytest.raises(ValueError, match="image_size: got 20, expected a multiple of 8"):
        network(2, 20)
