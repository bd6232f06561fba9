"""The covariance loss: values and derivatives, averages, state, methods and errors, against float64."""

import copy
import io

import pytest
import torch
from helpers import DTYPES, assert_close, assert_same_bits, make_features, statistics_dtype
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import moment_ops as mo
from bench import memory
from moment_ops.losses.covariance_arguments import choose_method
from moment_ops.ops import triangle

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((5,), (3, 2))
WIDTHS = (5, 6)
ENTRIES = 61
AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.7),
    "adam": mo.AdamMovingAverage(lr=0.1),
    "adam, sum": mo.AdamMovingAverage(lr=0.1, reduction="sum"),
}


def symmetric(width, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + width)
    a = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    return (a @ a.mT + torch.eye(width)).to(dtype)


def targets(dtype=torch.float32, widths=WIDTHS):
    return [symmetric(width, dtype=dtype) for width in widths]


def target_moments(dtype=torch.float32, correction=1):
    mean = torch.linspace(-1, 1, sum(WIDTHS), dtype=dtype)
    return mo.Moments(mean, cov=tuple(targets(dtype)), correction=correction, shapes=tuple((w,) for w in WIDTHS))


def inputs(rows=7, dtype=torch.float64, seed=0, shapes=SHAPES):
    return [x.requires_grad_() for x in make_features(rows, shapes, dtype, seed)]


def covariances(layers, correction=1):
    """In float64 PyTorch; differentiable."""
    rows = [x.double().flatten(1) for x in layers]
    centred = [x - x.mean(0) for x in rows]
    return [x.mT @ x / (len(x) - correction) for x in centred]


def distance(layers, matrices, weights=(1.0, 1.0), correction=1):
    return sum(
        w * (c - t.double()).square().sum()
        for c, t, w in zip(covariances(layers, correction), matrices, weights, strict=True)
    )


def mean_distance(layers, mean):
    return (torch.cat([x.double().flatten(1).mean(0) for x in layers]) - mean.double()).square().sum()


def assert_loss(ours, theirs, layers, rows=1000, wide=None):
    """`wide`: the leaves of `theirs`, where they are not the layers: gradients of narrower ones come rounded."""
    assert_close(ours, theirs, rows=rows)
    wanted = torch.autograd.grad(theirs, wide or layers, retain_graph=True)
    for got, exact in zip(torch.autograd.grad(ours, layers), wanted, strict=True):
        assert_close(got, exact, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 128, 300, 1100])
def test_value_and_gradient_are_those_of_float64(dtype, width):
    layers = inputs(20, dtype, shapes=[(width,)])
    goal = symmetric(width, dtype=statistics_dtype(dtype))
    loss = mo.covariance_loss(layers, target=goal)
    assert loss.dtype == statistics_dtype(dtype)
    wide = [x.detach().double().requires_grad_() for x in layers]
    assert_loss(loss, distance(wide, [goal], (1.0,)), layers, rows=width, wide=wide)


@pytest.mark.parametrize("packed", [True, False])
def test_the_value_without_gradients_is_the_same(packed):
    (x,) = make_features(700, [(1100,)])
    goal = symmetric(1100)
    loss = mo.CovarianceLoss(goal) if packed else lambda x: mo.covariance_loss(x, target=goal)
    assert_close(loss(x), distance([x], [goal], (1.0,)), rows=1100)


def test_weights_reduction_and_layers():
    layers = inputs()
    ours = mo.covariance_loss(layers, target=targets(torch.float64), cov_weight=[0.5, 2.0], reduction="mean")
    assert_loss(ours, distance(layers, targets(torch.float64), (0.5, 2.0)) / ENTRIES, layers)


def test_moments_bring_their_correction_and_their_means():
    layers = inputs()
    goal = target_moments(torch.float64, correction=2)
    ours = mo.covariance_loss(layers, target=goal, mean_weight=0.3, cov_weight=2.0)
    theirs = distance(layers, goal.cov, (2.0, 2.0), correction=2) + 0.3 * mean_distance(layers, goal.mean)
    assert_loss(ours, theirs, layers)
    assert_loss(mo.CovarianceLoss(goal, mean_weight=0.3, cov_weight=2.0)(layers), theirs, layers)


@pytest.mark.parametrize("kind", ["function", "class"])
@pytest.mark.parametrize("method", ["primal", "dual"])
@pytest.mark.parametrize("joint", [False, True])
def test_samples_are_compared_by_both_methods_alike(kind, method, joint):
    layers, samples = inputs(), [y.detach() for y in inputs(9, seed=3)]
    options = {"method": method, "joint": joint, "mean_weight": 0.3, "reduction": "mean"}
    if kind == "function":
        ours = mo.covariance_loss(layers, samples=samples, **options)
    else:
        ours = mo.CovarianceLoss(samples=samples, **options)(layers)
    x, y = layers, samples
    if joint:
        x, y = ([torch.cat([z.flatten(1) for z in group], 1)] for group in (x, y))
    mean = torch.cat([z.flatten(1).mean(0) for z in y])
    weights = [1.0] * len(x)
    theirs = distance(x, covariances(y), weights) / (121 if joint else ENTRIES) + 0.3 * mean_distance(x, mean) / 11
    assert_loss(ours, theirs, layers)


@pytest.mark.parametrize("method", ["primal", "dual"])
def test_samples_get_gradients(method):
    layers, samples = inputs(), inputs(9, seed=3)
    ours = mo.covariance_loss(layers, samples=samples, method=method)
    assert_loss(ours, distance(layers, covariances(samples)), layers + samples)


def test_targets_get_gradients():
    layers = inputs()
    goal = [t.requires_grad_() for t in targets(torch.float64)]
    ours = torch.autograd.grad(mo.covariance_loss(layers, target=goal), goal)
    theirs = torch.autograd.grad(distance(layers, goal), goal)
    for got, wanted in zip(ours, theirs, strict=True):
        # The target is symmetric: both sides of it together.
        assert_close(got + got.mT, wanted + wanted.mT, rows=100)


def make_loss(average, train=False, **options):
    """A loss whose average has run for two steps."""
    loss = mo.CovarianceLoss(target_moments(torch.float64), average=AVERAGES[average], **options)
    for seed in (5, 6):
        loss([x.detach() for x in inputs(seed=seed)])
    return loss.train(train)


def pure(loss):
    return lambda *layers: copy.deepcopy(loss)(list(layers))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("mean_weight", [0.0, 0.5])
@pytest.mark.parametrize("train", [False, True])
def test_first_and_second_derivatives(average, mean_weight, train):
    """In training, the average is a constant of Adam, and the batch's own part of a moving average."""
    loss = make_loss(average, train, mean_weight=mean_weight, cov_weight=[0.5, 2.0])
    layers = inputs(5)
    if not (train and average.startswith("adam")):
        assert gradcheck(pure(loss), layers)
    assert gradgradcheck(pure(loss), layers) if average in ("none", "moving") or not train else True


@pytest.mark.parametrize("method", ["primal", "dual"])
def test_second_derivatives_by_samples(method):
    layers = inputs(5)

    def loss(*tensors):
        return mo.covariance_loss(list(tensors[:2]), samples=list(tensors[2:]), method=method, mean_weight=0.5)

    assert gradgradcheck(loss, (*layers, *inputs(4, seed=2)))


class Adam:
    """torch.optim.Adam on the mean squared error between the average and target - covariance."""

    def __init__(self, goal, reduction):
        self.goal = torch.cat([t.double().flatten() for t in goal])
        self.v = torch.zeros_like(self.goal).requires_grad_()
        self.optimizer = torch.optim.Adam([self.v], lr=0.1, betas=(0.5, 0.999))
        self.reduction = reduction

    def __call__(self, layers):
        difference = self.goal - torch.cat([c.flatten() for c in covariances(layers)])
        self.optimizer.zero_grad()
        torch.nn.functional.mse_loss(self.v, difference.detach(), reduction=self.reduction).backward()
        self.optimizer.step()
        return (self.v.detach() * difference).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("width", [5, 140])
def test_adam_is_that_of_torch_on_all_entries_of_the_matrices(reduction, width):
    shapes = [(width,), (3, 2)]
    goal = targets(torch.float64, (width, 6))
    average = mo.AdamMovingAverage(lr=0.1, reduction=reduction)
    ours, theirs = mo.CovarianceLoss(goal, average=average), Adam(goal, reduction)
    for seed in range(4):
        layers = inputs(9, seed=seed, shapes=shapes)
        assert_loss(ours(layers), theirs(layers), layers, rows=10_000)


@pytest.mark.parametrize("width", [5, 140])
def test_a_moving_average_of_covariances_starts_from_the_first_batch(width):
    goal = [symmetric(width, dtype=torch.float64)]
    loss, average = mo.CovarianceLoss(goal, average=mo.MovingAverage(0.7), reduction="mean"), None
    for seed in range(4):
        layers = inputs(9, seed=seed, shapes=[(width,)])
        (cov,) = covariances(layers)
        # The gradient has the batch's share from the first step on.
        average = 0.7 * (cov.detach() if average is None else average) + 0.3 * cov
        theirs = (average - goal[0]).square().mean()
        average = average.detach()
        assert_loss(loss(layers), theirs, layers)


def state_of(loss):
    return {k: v.clone() for k, v in loss.state_dict().items() if "target" not in k}


@pytest.mark.parametrize("average", ["moving", "adam"])
def test_the_state_advances_in_training_alone_and_once_a_call(average):
    loss = make_loss(average, mean_weight=1.0)
    before = state_of(loss)
    loss(inputs())
    assert_same_bits(state_of(loss), before)
    loss.train()(inputs())
    after = state_of(loss)
    assert after["step"] == before["step"] + 1 == 3
    assert after["mean_loss.step"] == 3
    assert not torch.equal(after["cov_average"], before["cov_average"])


@pytest.mark.parametrize("average", AVERAGES)
def test_the_saved_state_resumes_bit_for_bit(average):
    loss = make_loss(average, True, mean_weight=1.0)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = mo.CovarianceLoss(
        mo.Moments(torch.zeros(11).double(), cov=tuple(torch.eye(w).double() for w in WIDTHS), shapes=((5,), (6,))),
        average=AVERAGES[average],
        mean_weight=1.0,
    )
    other.load_state_dict(torch.load(file))
    for seed in (7, 8):
        assert_same_bits(loss(inputs(seed=seed)), other(inputs(seed=seed)))
    assert_same_bits(loss.state_dict(), other.state_dict())


@pytest.mark.parametrize("average", ["moving", "adam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_keeps_its_dtype(average, dtype):
    loss = mo.CovarianceLoss(targets(), average=AVERAGES[average]).to(dtype)
    assert all(v.dtype in (torch.float32, torch.bool, torch.int64) for v in loss.state_dict().values())
    loss([x.to(dtype) for x in inputs()])


@pytest.mark.parametrize("average", ["moving", "adam"])
def test_entries_that_are_not_finite_leave_their_state_untouched(average):
    loss = mo.CovarianceLoss([symmetric(140)], average=AVERAGES[average])
    loss(make_features(9, [(140,)])[0])
    before = triangle.unpack(loss.cov_average, 140)
    x = make_features(9, [(140,)], seed=1)[0]
    x[3, 130] = float("nan")
    assert not loss(x).isfinite()
    after = triangle.unpack(loss.cov_average, 140)
    changed = after != before
    assert not changed[130].any()
    assert changed[:130, :130].all()
    assert after.isfinite().all()


def test_reset_restarts_the_average_and_takes_a_new_target():
    loss = make_loss("adam", True, mean_weight=1.0)
    address = loss.target_cov.data_ptr()
    loss.reset()
    assert loss.step == 0
    assert not loss.cov_average.any()
    assert not loss.mean_loss.mean_average.any()
    new = [2 * t for t in targets(torch.float64)]
    loss.reset(mo.Moments(torch.zeros(11).double(), cov=tuple(new), shapes=((5,), (6,))))
    assert loss.target_cov.data_ptr() == address
    assert torch.equal(triangle.unpack(triangle.split(loss.target_cov, WIDTHS)[0], 5), new[0])
    loss.reset(samples=inputs(9, seed=3))
    assert loss.widths == list(WIDTHS)


def test_a_random_start_is_symmetric_and_bounded_by_all_entries():
    loss = mo.CovarianceLoss([symmetric(200)], average=mo.AdamMovingAverage(init="uniform"))
    value = triangle.unpack(loss.cov_average, 200)
    assert torch.equal(value, value.mT)
    assert 0.9 / 200 < value.abs().max() <= 1 / 200


def test_a_recompute_under_checkpointing_raises():
    loss = mo.CovarianceLoss(targets(torch.float64), average=AVERAGES["adam"])
    value = checkpoint(lambda *x: loss(list(x)), *inputs(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="checkpoint"):
        value.backward()


def test_forward_mode_raises():
    x = inputs()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        mo.covariance_loss([forward_ad.make_dual(x[0], torch.ones_like(x[0])), x[1]], target=targets(torch.float64))


@pytest.mark.parametrize("average", ["none", "moving", "adam"])
def test_it_compiles_to_one_graph(average):
    torch._dynamo.reset()
    plain, compiled = (
        mo.CovarianceLoss(target_moments(), average=AVERAGES[average], mean_weight=0.5) for _ in range(2)
    )
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        layers = inputs(dtype=torch.float32, seed=seed)
        ours, theirs = step(layers), plain(layers)
        assert_same_bits(ours.detach(), theirs.detach())
        assert_same_bits(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers))
    assert_same_bits(state_of(compiled), state_of(plain))
    torch._dynamo.reset()


def test_autocast_changes_nothing():
    layers = inputs(dtype=torch.float32)
    loss = make_loss("adam", mean_weight=0.5).float()
    plain = loss(layers)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(layers)
        grads = torch.autograd.grad(value, layers)
    assert_same_bits([value.detach(), grads], [plain.detach(), torch.autograd.grad(plain, layers)])


def test_the_queue_counts_the_rows_of_past_batches():
    samples = [y.detach() for y in inputs(9, seed=3)]
    loss, past = mo.CovarianceLoss(samples=samples, average=mo.QueueAverage(2)), []
    assert loss.method == "dual"
    for seed in range(4):
        layers = inputs(seed=seed)
        joined = [torch.cat([x, *[old[i] for old in past]]) for i, x in enumerate(layers)]
        assert_loss(loss(layers), distance(joined, covariances(samples)), layers)
        past = [*past, [x.detach() for x in layers]][-2:]
    before = state_of(loss)
    loss.eval()(inputs(seed=9))
    assert_same_bits(state_of(loss), before)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_queue_resumes_bit_for_bit(steps):
    samples = [y.detach() for y in inputs(9, seed=3)]
    first, second = (mo.CovarianceLoss(samples=samples, average=mo.QueueAverage(2)) for _ in range(2))
    for seed in range(steps):
        first(inputs(seed=seed))
    second.load_state_dict(first.state_dict())
    for seed in (7, 8, 9):
        assert_same_bits(first(inputs(seed=seed)), second(inputs(seed=seed)))
    first.reset()
    assert_same_bits(first(inputs()), mo.CovarianceLoss(samples=samples, average=mo.QueueAverage(2))(inputs()).detach())


def test_a_queue_wants_batches_of_one_size():
    loss = mo.CovarianceLoss(samples=inputs(9), average=mo.QueueAverage(2))
    loss(inputs(7))
    with pytest.raises(ValueError, match=r"input: got a batch of 6 rows, expected 7"):
        loss(inputs(6))


def test_auto_takes_the_method_with_fewer_products():
    wide, narrow = [torch.zeros(8, 1000)], [torch.zeros(1000, 8)]
    options = {"kept": False, "estimator": "biased", "joint": False}
    assert choose_method("auto", wide, 8, **options) == "dual"
    assert choose_method("auto", narrow, 1000, **options) == "primal"
    assert choose_method("primal", wide, 8, **options) == "primal"
    assert choose_method("auto", narrow, 1000, kept=False, estimator="unbiased", joint=False) == "dual"
    loss = mo.CovarianceLoss(samples=torch.randn(8, 1000))
    assert loss.method == "dual"
    assert mo.CovarianceLoss(samples=torch.randn(8, 1000), average=mo.MovingAverage(0.5)).method == "primal"


def test_auto_takes_the_dual_where_a_matrix_does_not_fit(monkeypatch):
    monkeypatch.setattr("moment_ops.covariances._free_bytes", lambda device: 1 << 30)
    # So many rows that the primal needs fewer products.
    samples = [torch.empty(1, 20_000).expand(200_000, -1)]
    assert choose_method("auto", samples, 200_000, kept=False, estimator="biased", joint=False) == "dual"
    with pytest.raises(ValueError, match="method='dual'"):
        mo.covariance_loss(torch.randn(2, 20_000), samples=torch.randn(2, 20_000), method="primal")


X = torch.randn(4, 3)
EYE = torch.eye(3)
NAN = torch.full((3, 3), float("nan"))
FUNCTION_ERRORS = {
    "neither": ({}, ValueError, "target, samples: got neither"),
    "both": ({"target": EYE, "samples": X}, ValueError, "target, samples: got both"),
    "not square": ({"target": EYE[:2]}, ValueError, r"target: got shape \(2, 3\), expected a square matrix"),
    "width": ({"target": torch.eye(4)}, ValueError, "input: got 3 columns .* expected 4 as target"),
    "layers": ({"target": [EYE, EYE]}, ValueError, "input: got 1 layers, expected 2 as in target"),
    "target type": ({"target": 3.0}, TypeError, "target: got float"),
    "no covariances": ({"target": mo.Moments(torch.zeros(3))}, ValueError, "target: got Moments without covariances"),
    "mean of matrices": ({"target": EYE, "mean_weight": 1.0}, ValueError, "mean_weight: .* give Moments"),
    "samples' width": ({"samples": torch.randn(4, 5)}, ValueError, "input: got 3 columns .* expected 5 as samples"),
    "one sample": ({"samples": X[:1]}, ValueError, "samples: got a batch of 1"),
    "method": ({"target": EYE, "method": "both"}, ValueError, "method: got 'both'"),
    "dual of a target": ({"target": EYE, "method": "dual"}, ValueError, "method: got 'dual' with a target"),
    "reduction": ({"target": EYE, "reduction": "max"}, ValueError, "reduction: got 'max'"),
    "precision": ({"target": EYE, "precision": "fp8"}, ValueError, "precision: got 'fp8'"),
    "estimator": ({"samples": X, "estimator": "best"}, ValueError, "estimator: got 'best'"),
    "unbiased primal": (
        {"samples": X, "estimator": "unbiased", "method": "primal"},
        ValueError,
        "estimator: got 'unbiased' with method 'primal'",
    ),
    "unbiased target": ({"target": EYE, "estimator": "unbiased"}, ValueError, "estimator: .* expected samples"),
    "correction": ({"target": EYE, "correction": -1}, ValueError, "correction: got -1"),
    "joint": ({"samples": X, "joint": "yes"}, TypeError, "joint: got 'yes'"),
    "weight": ({"target": EYE, "cov_weight": "1"}, TypeError, "cov_weight: got str"),
    "weights": ({"target": EYE, "cov_weight": [1.0, 2.0]}, ValueError, "cov_weight: got 2 weights, expected .* 1"),
    "device": ({"target": EYE.to("meta")}, ValueError, "input: got device cpu, expected meta"),
}


@pytest.mark.parametrize("case", FUNCTION_ERRORS)
def test_wrong_arguments(case):
    options, error, message = FUNCTION_ERRORS[case]
    with pytest.raises(error, match=message):
        mo.covariance_loss(X, **options)


def test_one_row_has_no_covariance():
    with pytest.raises(ValueError, match="input: got a batch of 1, expected more than 1 rows"):
        mo.covariance_loss(X[:1], target=EYE)
    with pytest.raises(ValueError, match="input: got a batch of 1, expected more than 1 rows"):
        mo.CovarianceLoss(EYE)(X[:1])


SKEW = EYE + torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]])
CLASS_ERRORS = {
    "neither": ({}, ValueError, "got neither"),
    "asymmetric": ({"target": SKEW}, ValueError, "asymmetric matrix, entries differ by 1"),
    "nan": ({"target": NAN}, ValueError, "not finite"),
    "negative": ({"target": -EYE}, ValueError, "negative variance"),
    "average": ({"target": EYE, "average": 0.9}, TypeError, "average: got float"),
    "queue of a target": ({"target": EYE, "average": mo.QueueAverage(2)}, ValueError, "average: got QueueAverage"),
    "primal queue": (
        {"samples": X, "average": mo.QueueAverage(2), "method": "primal"},
        ValueError,
        "average: got QueueAverage with method 'primal'",
    ),
    "dual average": (
        {"samples": X, "average": mo.MovingAverage(0.5), "method": "dual"},
        ValueError,
        "average: got MovingAverage.* with method 'dual'",
    ),
    "weights": ({"target": EYE, "cov_weight": [1.0, 2.0]}, ValueError, "cov_weight: got 2 weights"),
}


@pytest.mark.parametrize("case", CLASS_ERRORS)
def test_wrong_arguments_of_the_class(case):
    options, error, message = CLASS_ERRORS[case]
    with pytest.raises(error, match=message):
        mo.CovarianceLoss(**options)


def test_wrong_queues():
    with pytest.raises(TypeError, match=r"batches: got 1\.5"):
        mo.QueueAverage(1.5)
    with pytest.raises(ValueError, match="batches: got 0"):
        mo.QueueAverage(0)


@pytest.mark.parametrize(("rows", "width"), [(1024, 2048), (4096, 1024)])
@pytest.mark.parametrize("kind", ["function", "class"])
def test_the_value_needs_less_memory_than_a_matrix(backend, rows, width, kind):
    if backend == "reference":
        pytest.skip("the reference makes copies in float64")
    memory.return_freed_memory()
    x, goal = torch.randn(rows, width), torch.eye(width)
    loss = mo.CovarianceLoss(goal) if kind == "class" else lambda x: mo.covariance_loss(x, target=goal)
    loss(x)
    peak = memory.peak_over_rest(lambda: loss(x))
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert peak < 4 * width * width
