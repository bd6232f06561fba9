"""torch.compile and autocast: one graph over batch sizes, the numbers of eager mode."""

from collections.abc import Iterator

import pytest
import torch
from helpers import assert_close, assert_same_bits, make_features, make_target, state_of
from torch import nn

import moment_ops as mo
from moment_ops.ops.relu_moments import identity_moments, relu_moments

SHAPES = ((5,), (3, 2, 2))
AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.9),
    "moving, corrected": mo.MovingAverage(0.9, bias_correction=True),
    "adam": mo.AdamMovingAverage(lr=0.1),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def run(step, rows, layout=torch.contiguous_format):
    features = [x.to(memory_format=layout) if x.dim() == 4 else x for x in make_features(rows, SHAPES)]
    features = [x.requires_grad_() for x in features]
    value = step(features)
    return [value.detach(), *torch.autograd.grad(value, features)]


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("source", ["features", "moments"])
def test_the_loss_compiles_to_one_graph_over_batch_sizes(average_kind, source):
    plain, compiled = (mo.MomentLoss(make_target(SHAPES), AVERAGES[average_kind]) for _ in range(2))
    counter = Counter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(features):
        return compiled(features if source == "features" else mo.moments(features))

    graphs = []
    for rows in (8, 5, 13):
        ours = run(step, rows)
        theirs = run(lambda features: plain(features if source == "features" else mo.moments(features)), rows)
        assert_same_bits(ours, theirs)
        graphs.append(counter.graphs)
    assert_same_bits(state_of(compiled), state_of(plain))
    # The compiler may begin anew within the first call, when it finds that a float is a constant.
    assert len(set(graphs)) == 1


def full_queue():
    loss = mo.CovarianceDistance(make_features(9, SHAPES, seed=9), queue=12, mean_weight=0.5)
    loss.fill([make_features(12, SHAPES, seed=8)])
    return loss


def covariance_loss():
    mean, cov = torch.zeros(17), (torch.eye(5), torch.eye(12))
    target = mo.Moments(mean, cov=cov, shapes=SHAPES)
    return mo.CovarianceLoss(target, mo.MovingAverage(0.9), mean_weight=0.5)


@pytest.mark.parametrize("where", ["in the graph", "after it"])
@pytest.mark.parametrize(
    "make", [lambda: mo.MomentLoss(make_target(SHAPES), mo.AdamMovingAverage(lr=0.1)), covariance_loss, full_queue]
)
def test_a_compiled_step_may_be_committed_later(make, where):
    plain, compiled = make(), make()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(features):
        value = compiled(features, commit=False)
        if where == "in the graph":
            compiled.commit()
        return value

    for _ in range(3):
        assert_same_bits(run(step, 7), run(plain, 7))
        if where == "after it":
            compiled.commit()
    assert_same_bits(dict(compiled.state_dict()), dict(plain.state_dict()))


def test_moments_compile_and_come_out_as_moments():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(features):
        return mo.moments(features)

    features = make_features(6, SHAPES)
    compiled, eager = step(features), mo.moments(features)
    assert isinstance(compiled, mo.Moments)
    assert_same_bits([compiled.mean, compiled.var, compiled.count], [eager.mean, eager.var, eager.count])
    assert (compiled.shapes, compiled.correction) == (eager.shapes, eager.correction)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_moment_loss_compiles_with_weights_and_means_alone(mode):
    target = make_target(SHAPES, var=False)
    loss = mo.MomentLoss(target, mo.AdamMovingAverage(lr=0.1), mean_weight=[1.0, 2.0]).train(mode == "train")
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert run(step, 6)[0].isfinite()
    assert int(loss.step) == (mode == "train")
    function = torch.compile(lambda x: mo.moment_loss(x, target, reduction="sum"), fullgraph=True, backend="aot_eager")
    assert_same_bits(run(function, 6), run(lambda x: mo.moment_loss(x, target, reduction="sum"), 6))


@pytest.mark.parametrize("layout", ["channels last", "transposed"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_come_in_the_strides_that_the_compiler_expects(layout, backend):
    x = torch.randn(6, 3, 4, 4)
    x = x.to(memory_format=torch.channels_last) if layout == "channels last" else x.permute(1, 0, 2, 3).contiguous()
    x = x if layout == "channels last" else x.permute(1, 0, 2, 3)
    target = make_target([(3, 4, 4)])

    def step(x):
        # A pointwise operation around the operator: its compiled code indexes the gradient by its expected strides.
        return mo.moment_loss(x * 2, target)

    results = []
    with mo.backend(backend):
        for call in (step, torch.compile(step, fullgraph=True, backend="inductor")):
            leaf = x.detach().clone().requires_grad_()
            results.append(torch.autograd.grad(call(leaf), leaf)[0])
    assert_close(results[1], results[0].double())


@pytest.mark.slow
def test_inductor_gives_the_numbers_of_eager_mode():
    plain, compiled = (mo.MomentLoss(make_target(SHAPES), mo.AdamMovingAverage(lr=0.1)) for _ in range(2))
    step = torch.compile(lambda features: compiled([x.relu() for x in features]), fullgraph=True, dynamic=True)
    for rows in (8, 5):
        for ours, theirs in zip(
            run(step, rows), run(lambda features: plain([x.relu() for x in features]), rows), strict=True
        ):
            assert_close(ours, theirs.double(), rows=rows)
    assert_same_bits(state_of(compiled)["step"], state_of(plain)["step"])


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_under_autocast_features_come_in_16_bits_and_statistics_in_32(average_kind):
    loss = mo.MomentLoss(make_target([(4, 6, 6)]), AVERAGES[average_kind])
    conv = nn.Conv2d(3, 4, 3)
    x = torch.randn(8, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        features = conv(x)
        m = mo.moments(features)
        value = loss(features)
    assert features.dtype == torch.bfloat16
    assert m.mean.dtype == m.var.dtype == value.dtype == torch.float32
    value.backward()
    assert conv.weight.grad.dtype == torch.float32
    assert conv.weight.grad.isfinite().all()
    assert {b.dtype for b in loss.buffers() if b.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("source", ["features", "moments", "merged"])
def test_autocast_does_not_change_the_loss_of_float32_features(source):
    features, target = make_features(6, SHAPES), make_target(SHAPES)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            batch = features
            if source != "features":
                batch = mo.moments(features)
            if source == "merged":
                batch = mo.Moments.merge(batch, batch)
            results.append(mo.moment_loss(batch, target))
    assert_same_bits(*results)


def test_a_second_derivative_under_autocast_is_that_without():
    target = make_target(SHAPES)
    results = []
    for enabled in (True, False):
        features = [x.requires_grad_() for x in make_features(6, SHAPES)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            first = torch.autograd.grad(mo.moment_loss(features, target), features, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), features))
    assert_same_bits(*results)


TARGET = make_target(SHAPES)
OTHER = [x[:4] for x in make_features(8, SHAPES, seed=1)]
COVARIANCES = mo.Moments(torch.zeros(17), cov=(torch.eye(5), torch.eye(12)), shapes=SHAPES)
STYLE = mo.gram_matrix(OTHER[1][:1])
WITHOUT_GRADIENTS = {
    "moments": lambda x: mo.moments(x).mean.sum(),
    "moments of channels": lambda x: mo.moments(x[1], dim=(0, 2, 3)).var.sum(),
    "moment_loss": lambda x: mo.moment_loss(x, TARGET),
    "moment_loss of moments": lambda x: mo.moment_loss(mo.moments(x), TARGET),
    "relu_moments": lambda x: sum(y.sum() for y in relu_moments(x[1])),
    "identity_moments": lambda x: sum(y.sum() for y in identity_moments(x[1])),
    "covariance": lambda x: mo.covariance(x[0]).sum(),
    "covariance_loss": lambda x: mo.covariance_loss(x, COVARIANCES, mean_weight=0.5),
    "covariance_distance": lambda x: mo.covariance_distance(x, OTHER, method="covariance"),
    "covariance_distance, gram": lambda x: mo.covariance_distance(x, OTHER, method="gram"),
    "coral_loss": lambda x: mo.coral_loss(x[0], OTHER[0]),
    "vicreg_variance": lambda x: mo.vicreg_variance(x[0]),
    "vicreg_covariance": lambda x: mo.vicreg_covariance(x[0]),
    "style_loss": lambda x: mo.style_loss(x[1], STYLE),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_every_function_compiles_to_one_graph_where_nothing_needs_a_gradient(name):
    # Either the features need none, or gradients are off.
    grad = name in ("moment_loss", "covariance_distance")
    features = [x.requires_grad_(not grad) for x in make_features(6, SHAPES)]
    function = WITHOUT_GRADIENTS[name]
    with torch.set_grad_enabled(grad):
        value = torch.compile(function, fullgraph=True, backend="aot_eager")(features)
        assert not value.requires_grad
        assert_same_bits(value, function(features).detach())
