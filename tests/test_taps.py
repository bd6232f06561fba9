"""`MomentExtractor`: the numbers of the plain network, with its memory, in every dtype and mode."""

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    assert_same_bits,
    epsilon,
    exact_moments,
)
from tapped_networks import (
    NAMES,
    NETWORKS,
    Chain,
    Flow,
    Residual,
    ShapeFlow,
    Shared,
    make_images,
    make_network,
    plain_features,
)
from test_relu_moments import saved_bytes
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import moment_ops as mo
from moment_ops.taps import functions

WEIGHTS = (1.0, 0.7)


def score(m):
    """A scalar of all moments, curved in each."""
    return WEIGHTS[0] * m.mean.square().sum() + WEIGHTS[1] * m.var.square().sum()


def plain_moments(net, images):
    return mo.moments(plain_features(net, images))


def gradient(function, images):
    return torch.autograd.grad(score(function(images)), images)[0]


def relative(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_and_gradients_are_those_of_the_plain_network(kind, layout):
    net = make_network(kind).to(memory_format=layout)
    images = make_images().detach().to(memory_format=layout).requires_grad_()
    extractor = mo.MomentExtractor(net)
    m, plain = extractor(images), plain_moments(net, images)
    assert m.names == NAMES[kind]
    assert (m.shapes, m.correction) == (plain.shapes, plain.correction)
    assert torch.equal(m.count, plain.count)
    assert relative(m.mean, plain.mean) < 1e-13
    assert relative(m.var, plain.var) < 1e-12
    expected = gradient(lambda x: plain_moments(net, x), images)
    assert relative(gradient(extractor, images), expected) < 1e-12


@pytest.mark.parametrize("kind", NETWORKS)
def test_moments_and_features_come_from_one_run(kind):
    extractor, images = mo.MomentExtractor(make_network(kind)), make_images()
    m, features = extractor.moments_and_features(images)
    alone = extractor(images)
    assert_same_bits(m.mean, alone.mean)
    assert_same_bits(m.var, alone.var)
    for ours, theirs in zip(features, extractor.features(images), strict=True):
        assert_same_bits(ours, theirs)
    total = score(m) + sum(y.sin().sum() for y in features)
    plain = plain_features(make_network(kind), images)
    expected = score(mo.moments(plain)) + sum(y.sin().sum() for y in plain)
    gradients = [torch.autograd.grad(value, images)[0] for value in (total, expected)]
    assert relative(*gradients) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Chain, Residual, Shared, Flow])
def test_in_every_dtype_the_error_is_that_of_the_plain_network(kind, dtype):
    net, images = make_network(kind, dtype), make_images(32, dtype)
    exact_net, exact_images = copy.deepcopy(net).double(), images.detach().double().requires_grad_()
    exact = plain_moments(exact_net, exact_images)
    exact_gradient = gradient(lambda x: plain_moments(exact_net, x), exact_images)
    extractor, plain = mo.MomentExtractor(net), plain_moments(net, images)
    m = extractor(images)
    assert m.mean.dtype == m.var.dtype == torch.float32
    for ours, theirs, truth in (
        (m.mean, plain.mean, exact.mean),
        (m.var, plain.var, exact.var),
        (gradient(extractor, images), gradient(lambda x: plain_moments(net, x), images), exact_gradient),
    ):
        assert relative(ours, truth) <= 2 * relative(theirs, truth) + epsilon(dtype)


@pytest.mark.parametrize("kind", NETWORKS)
def test_features_are_what_the_moments_are_of(kind):
    net, images = make_network(kind), make_images()
    extractor = mo.MomentExtractor(net)
    features = extractor.features(images)
    assert isinstance(features, list)
    for ours, theirs in zip(features, plain_features(net, images), strict=True):
        assert relative(ours, theirs) < 1e-13
    m = extractor(images)
    mean, var = exact_moments(features)
    assert relative(m.mean, mean) < 1e-14
    assert relative(m.var, var) < 1e-13


def test_the_gradient_of_features_and_moments_together():
    net, images = make_network(Residual), make_images()
    extractor = mo.MomentExtractor(net)
    total = sum(y.sum() for y in extractor.features(images)) + score(extractor(images))
    plain = plain_features(net, images)
    expected = sum(y.sum() for y in plain) + score(mo.moments(plain))
    assert relative(*(torch.autograd.grad(value, images)[0] for value in (total, expected))) < 1e-12


@pytest.mark.parametrize("kind", [Chain, Residual, Shared, ShapeFlow])
def test_differentiable_twice(kind):
    extractor, images = mo.MomentExtractor(make_network(kind)), make_images(2)[:, :, :4, :4]
    images = images.detach().requires_grad_() if kind is not Chain else make_images(2)
    loss = mo.MomentLoss(extractor(make_images(5)[..., : images.shape[3]][..., : images.shape[2], :]), reduction="sum")
    assert gradcheck(lambda x: loss(extractor(x)), images, fast_mode=True)
    assert gradgradcheck(lambda x: loss(extractor(x)), images, fast_mode=True)


@pytest.mark.parametrize("average", [None, mo.MovingAverage(0.9), mo.AdamMovingAverage(lr=0.1)])
def test_the_loss_of_an_extractor_is_that_of_its_features(average):
    extractor, images = mo.MomentExtractor(make_network(Residual)), make_images()
    target = extractor(make_images(50, seed=3))
    losses = [mo.MomentLoss(target, average) for _ in range(2)]
    for seed in range(3):
        images = make_images(seed=seed)
        ours, theirs = losses[0](extractor(images)), losses[1](extractor.features(images))
        assert relative(ours, theirs) < 1e-12
        assert relative(*(torch.autograd.grad(value, images)[0] for value in (ours, theirs))) < 1e-11


def test_a_batch_of_one_row_has_means():
    m = mo.MomentExtractor(make_network(Chain))(make_images(1))
    assert m.mean.isfinite().all()
    assert m.var.isnan().all()


# Data sets and losses


def test_dataset_moments_keep_names_and_shapes(tmp_path):
    net, images = make_network(Residual, torch.float32), make_images(50, torch.float32).detach()
    extractor = mo.MomentExtractor(net)
    target = mo.dataset_moments(extractor, images.split(7))
    mean, var = exact_moments(plain_features(net, images))
    assert relative(target.mean, mean) < 1e-5
    assert relative(target.var, var) < 1e-4
    assert target.names == extractor.names
    target.save(tmp_path / "target.npz")
    loaded = mo.Moments.load(tmp_path / "target.npz")
    assert (loaded.names, loaded.shapes) == (target.names, target.shapes)
    assert mo.MomentLoss(loaded)(extractor(images)) < 1e-9


def test_a_target_of_other_layers_is_an_error():
    net, images = make_network(Shared), make_images()
    first, last = (mo.MomentExtractor(net, names)(images) for names in (["relu:0", "relu:1"], ["relu:1", "relu:2"]))
    message = re.escape("input: got layer 'relu:1' at position 0, expected 'relu:0' as in target")
    for call in (mo.MomentLoss(first), lambda m: mo.moment_loss(m, first)):
        with pytest.raises(ValueError, match=message):
            call(last)
        call(first)
        # Without names on either side there is nothing to compare.
        call(mo.Moments(last.mean, last.var, count=last.count, shapes=last.shapes))


def merged_step(rank, sizes):
    """The loss and the gradient to the images of one process, or of all for rank None."""
    extractor = mo.MomentExtractor(make_network(Residual))
    loss = mo.MomentLoss(extractor(make_images(20, seed=4)), mo.AdamMovingAverage(lr=0.1))
    images = make_images(sum(sizes)).detach()
    images = (images if rank is None else images.split(list(sizes))[rank]).requires_grad_()
    value = loss(extractor(images))
    return value.detach(), torch.autograd.grad(value, images)[0]


@pytest.mark.parametrize("sizes", [(4, 4), (7, 1), (1, 1)])
def test_two_processes_compute_the_loss_of_one(ranks, sizes):
    results, (value, grad) = ranks(merged_step, sizes), merged_step(None, sizes)
    for ours, _ in results:
        assert relative(ours, value) < 1e-12
    # The gradients are those that DistributedDataParallel averages.
    assert relative(torch.cat([g for _, g in results]) / 2, grad) < 1e-10


# Memory


@pytest.mark.parametrize("kind", [Chain, Residual, Shared])
def test_what_is_saved_beside_the_plain_network_is_the_means(kind):
    net, images = make_network(kind, torch.float32), make_images(64, torch.float32)
    extractor = mo.MomentExtractor(net)
    # BatchNorm is folded on both sides: unfolded it saves its input.
    plain_net = copy.deepcopy(extractor.nets[0])
    plain, _ = saved_bytes(lambda: plain_net(images, functions.FEATURES))
    tapped, m = saved_bytes(lambda: extractor(images))
    assert tapped <= plain + 4 * m.mean.numel()
    unfolded, _ = saved_bytes(lambda: net.eval().requires_grad_(False)(images))
    assert tapped < unfolded + 4 * m.mean.numel()


PEAKS = """
import torch, moment_ops as mo
from torch import nn
from bench.memory import peak_over_rest
torch.set_num_threads(2)
channels = (3, 16, 16, 16, 16)
images = torch.randn(64, 3, 32, 32, requires_grad=True)
grad = torch.randn(64, 16, 32, 32)
for inplace in (False, True):
    pairs = zip(channels, channels[1:])
    net = nn.Sequential(*[m for i, o in pairs for m in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace))])
    net.eval().requires_grad_(False)
    extractor = mo.MomentExtractor(net)
    loss = mo.MomentLoss(extractor(torch.randn(64, 3, 32, 32)), mo.AdamMovingAverage())
    for step in (
        lambda: torch.autograd.grad(net(images), images, grad),
        lambda: torch.autograd.grad(loss(extractor(images)), images),
    ):
        step()
        print(min(peak_over_rest(step) for _ in range(2)))
print(4 * len(loss.target_mean))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's high-water mark")
def test_the_peak_of_a_step_is_that_of_the_plain_network():
    # How many activations fit into the holes of a process's memory is chance: one in six takes one more.
    peaks = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        peaks.append(map(int, result.stdout.split()))
    plain, tapped, plain_in_place, tapped_in_place, vector = map(min, zip(*peaks, strict=True))
    # Half an activation: moments, their gradients, and what the allocator rounds up.
    assert tapped <= plain + 8 * vector
    assert tapped_in_place <= plain_in_place + 8 * vector


# torch.compile, autocast, copies


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", [Chain, Residual, ShapeFlow])
def test_compiles_to_one_graph(kind):
    extractor = mo.MomentExtractor(make_network(kind, torch.float32))
    target = extractor(make_images(30, torch.float32))
    plain, compiled = (mo.MomentLoss(target, mo.AdamMovingAverage(lr=0.1)) for _ in range(2))
    step = torch.compile(lambda images: compiled(extractor(images)), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9):
        images = make_images(rows, torch.float32)
        results = [
            [value.detach(), *torch.autograd.grad(value, images)] for value in (plain(extractor(images)), step(images))
        ]
        assert relative(results[1][0], results[0][0]) < 1e-6
        assert relative(results[1][1], results[0][1]) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor_gives_the_numbers_of_eager_mode():
    extractor, images = mo.MomentExtractor(make_network(Residual, torch.float32)), make_images(6, torch.float32)
    compiled = torch.compile(extractor, fullgraph=True)
    assert relative(compiled(images).mean, extractor(images).mean) < 1e-6
    assert relative(gradient(compiled, images), gradient(extractor, images)) < 1e-5


@pytest.mark.parametrize("kind", [Chain, Residual, Flow])
def test_under_autocast_features_are_in_16_bits_and_moments_in_32(kind):
    net, images = make_network(kind, torch.float32), make_images(32, torch.float32)
    extractor = mo.MomentExtractor(net)
    with torch.autocast("cpu", torch.bfloat16):
        m, features = extractor(images), extractor.features(images)
    assert torch.bfloat16 in {y.dtype for y in features}
    assert m.mean.dtype == m.var.dtype == torch.float32
    exact = plain_moments(net, images)
    assert relative(m.mean, exact.mean) < 4 * epsilon(torch.bfloat16)
    grad = torch.autograd.grad(score(m), images)[0]
    assert relative(grad, gradient(lambda x: plain_moments(net, x), images)) < 16 * epsilon(torch.bfloat16)


@pytest.mark.parametrize("kind", [Residual, Flow])
def test_copies_and_casts_of_an_extractor_work(kind):
    extractor, images = mo.MomentExtractor(make_network(kind, torch.float32)), make_images(dtype=torch.float32)
    m = extractor(images)
    for other in (copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        assert_same_bits(other(images).mean, m.mean)
        assert other.names == extractor.names
    other.load_state_dict(extractor.state_dict())
    wide = copy.deepcopy(extractor).double()(images.double())
    assert wide.mean.dtype == torch.float64
    assert relative(m.mean, wide.mean) < 1e-5


def in_tap(bias):
    return bias


def not_in_convolution(bias):
    return None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_with_the_bias_in_the_tap_the_numbers_are_the_same(monkeypatch, dtype):
    net, images = make_network(Chain, dtype), make_images(32, dtype)
    extractor = mo.MomentExtractor(net)
    monkeypatch.setattr(functions, "bias_in_tap", in_tap)
    monkeypatch.setattr(functions, "bias_in_convolution", not_in_convolution)
    moved = mo.MomentExtractor(net)
    assert "not_in_convolution" in moved.nets[0].code
    # In 16 bits the convolution is rounded before the bias is added, too.
    tolerance = 1e-13 if dtype == torch.float64 else 8 * epsilon(dtype)
    assert relative(moved(images).mean, extractor(images).mean) < tolerance
    assert relative(gradient(moved, images), gradient(extractor, images)) < 10 * tolerance
    for ours, theirs in zip(moved.features(images), extractor.features(images), strict=True):
        assert relative(ours, theirs) < tolerance


NORMS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrized spectral_norm": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_networks_with_normalized_weights_are_tapped_after_they_have_run(norm):
    net = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), norm(nn.Conv2d(4, 4, 3)), nn.ReLU())
    images = torch.randn(2, 3, 8, 8)
    net(images)
    extractor = mo.MomentExtractor(net)
    with torch.no_grad():
        assert_same_bits(extractor.features(images)[-1], net.eval()(images))


class ReturnsLayers(nn.ModuleDict):
    """A container that is a network, as networks that return several layers are."""

    def forward(self, x):
        results = []
        for layer in self.values():
            x = layer(x)
            results.append(x)
        return results


def test_a_container_with_a_forward_of_its_own_is_one_network():
    net = ReturnsLayers({"first": nn.Conv2d(3, 4, 3), "relu": nn.ReLU(), "last": nn.Conv2d(4, 5, 3)})
    extractor = mo.MomentExtractor(net)
    assert extractor.names == ("relu:0",)
    images = torch.randn(2, 3, 8, 8)
    assert_same_bits(extractor.features(images), [net(images)[1]])


@pytest.mark.parametrize("container", [nn.ModuleDict, dict])
def test_plain_containers_are_several_networks(container):
    nets = container({name: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for name in ("one", "two")})
    assert mo.MomentExtractor(nets).names == ("one/1:0", "two/1:0")
