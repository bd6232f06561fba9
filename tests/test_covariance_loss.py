"""The covariance loss: values and derivatives, averages, state and errors, against float64."""

import copy
import io

import pytest
import torch
from helpers import DTYPES, assert_close, assert_same_bits, make_features, statistics_dtype
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import moment_ops as mo
from bench import memory
from moment_ops.ops import triangle

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((5,), (3, 2))
WIDTHS = (5, 6)
ENTRIES = 61
AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.7),
    "moving, corrected": mo.MovingAverage(0.7, bias_correction=True),
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


def covariances(features, correction=1):
    """In float64 PyTorch; differentiable."""
    rows = [x.double().flatten(1) for x in features]
    centred = [x - x.mean(0) for x in rows]
    return [x.mT @ x / (len(x) - correction) for x in centred]


def distance(features, matrices, weights=(1.0, 1.0), correction=1):
    return sum(
        w * (c - t.double()).square().sum()
        for c, t, w in zip(covariances(features, correction), matrices, weights, strict=True)
    )


def mean_distance(features, mean):
    return (torch.cat([x.double().flatten(1).mean(0) for x in features]) - mean.double()).square().sum()


def assert_loss(ours, theirs, features, rows=1000, wide=None):
    """`wide`: the leaves of `theirs`, where they are not the layers: gradients of narrower ones come rounded."""
    assert_close(ours, theirs, rows=rows)
    wanted = torch.autograd.grad(theirs, wide or features, retain_graph=True)
    for got, exact in zip(torch.autograd.grad(ours, features), wanted, strict=True):
        assert_close(got, exact, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 128, 300, 1100])
def test_value_and_gradient_are_those_of_float64(dtype, width):
    features = inputs(20, dtype, shapes=[(width,)])
    target = symmetric(width, dtype=statistics_dtype(dtype))
    loss = mo.covariance_loss(features, target)
    assert loss.dtype == statistics_dtype(dtype)
    wide = [x.detach().double().requires_grad_() for x in features]
    assert_loss(loss, distance(wide, [target], (1.0,)), features, rows=width, wide=wide)


@pytest.mark.parametrize("packed", [True, False])
def test_the_value_without_gradients_is_the_same(packed):
    (x,) = make_features(700, [(1100,)])
    target = symmetric(1100)
    loss = mo.CovarianceLoss(target) if packed else lambda x: mo.covariance_loss(x, target)
    assert_close(loss(x), distance([x], [target], (1.0,)), rows=1100)


def test_weights_reduction_and_layers():
    features = inputs()
    ours = mo.covariance_loss(features, targets(torch.float64), cov_weight=[0.5, 2.0], reduction="mean")
    assert_loss(ours, distance(features, targets(torch.float64), (0.5, 2.0)) / ENTRIES, features)


def test_moments_bring_their_correction_and_their_means():
    features = inputs()
    target = target_moments(torch.float64, correction=2)
    ours = mo.covariance_loss(features, target, mean_weight=0.3, cov_weight=2.0)
    theirs = distance(features, target.cov, (2.0, 2.0), correction=2) + 0.3 * mean_distance(features, target.mean)
    assert_loss(ours, theirs, features)
    assert_loss(mo.CovarianceLoss(target, mean_weight=0.3, cov_weight=2.0)(features), theirs, features)


@pytest.mark.parametrize("kind", ["function", "class"])
def test_joint_layers_are_one_feature_vector(kind):
    features, target_cov = inputs(), symmetric(11, dtype=torch.float64)
    target = mo.Moments(torch.linspace(-1, 1, 11).double(), cov=target_cov)
    options = {"joint": True, "mean_weight": 0.3, "reduction": "mean"}
    ours = mo.covariance_loss(features, target, **options) if kind == "function" else None
    ours = mo.CovarianceLoss(target, **options)(features) if ours is None else ours
    one = [torch.cat([x.flatten(1) for x in features], 1)]
    assert_loss(ours, distance(one, [target_cov], (1.0,)) / 121 + 0.3 * mean_distance(one, target.mean) / 11, features)


def test_layers_may_be_single_columns():
    features = inputs(shapes=[(), (3,)])
    target = [symmetric(1, dtype=torch.float64), symmetric(3, dtype=torch.float64)]
    columns = [features[0].unsqueeze(1), features[1]]
    assert_loss(mo.covariance_loss(features, target), distance(columns, target), features)
    (joint,) = (symmetric(4, dtype=torch.float64),)
    one = [torch.cat(columns, 1)]
    assert_loss(mo.covariance_loss(features, joint, joint=True), distance(one, [joint], (1.0,)), features)


def test_targets_get_gradients():
    features = inputs()
    target = [t.requires_grad_() for t in targets(torch.float64)]
    ours = torch.autograd.grad(mo.covariance_loss(features, target), target)
    theirs = torch.autograd.grad(distance(features, target), target)
    for got, wanted in zip(ours, theirs, strict=True):
        # The target is symmetric: both sides of it together.
        assert_close(got + got.mT, wanted + wanted.mT, rows=100)


def make_loss(average_kind, train=False, **options):
    """A loss whose average has run for two steps."""
    loss = mo.CovarianceLoss(target_moments(torch.float64), average=AVERAGES[average_kind], **options)
    for seed in (5, 6):
        loss([x.detach() for x in inputs(seed=seed)])
    return loss.train(train)


def pure(loss):
    return lambda *features: copy.deepcopy(loss)(list(features))


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("mean_weight", [0.0, 0.5])
@pytest.mark.parametrize("train", [False, True])
def test_first_and_second_derivatives(average_kind, mean_weight, train):
    """In training, the average is a constant of Adam, and the batch's own part of a moving average."""
    loss = make_loss(average_kind, train, mean_weight=mean_weight, cov_weight=[0.5, 2.0])
    features = inputs(5)
    if not (train and average_kind.startswith("adam")):
        assert gradcheck(pure(loss), features)
    assert gradgradcheck(pure(loss), features) if not average_kind.startswith("adam") or not train else True


class Adam:
    """torch.optim.Adam on the mean squared error between the average and target - covariance."""

    def __init__(self, target, reduction):
        self.target = torch.cat([t.double().flatten() for t in target])
        self.v = torch.zeros_like(self.target).requires_grad_()
        self.optimizer = torch.optim.Adam([self.v], lr=0.1, betas=(0.5, 0.999))
        self.reduction = reduction

    def __call__(self, features):
        difference = self.target - torch.cat([c.flatten() for c in covariances(features)])
        self.optimizer.zero_grad()
        torch.nn.functional.mse_loss(self.v, difference.detach(), reduction=self.reduction).backward()
        self.optimizer.step()
        return (self.v.detach() * difference).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("width", [5, 140])
def test_adam_is_that_of_torch_on_all_entries_of_the_matrices(reduction, width):
    shapes = [(width,), (3, 2)]
    target = targets(torch.float64, (width, 6))
    average = mo.AdamMovingAverage(lr=0.1, reduction=reduction)
    ours, theirs = mo.CovarianceLoss(target, average=average), Adam(target, reduction)
    for seed in range(4):
        features = inputs(9, seed=seed, shapes=shapes)
        assert_loss(ours(features), theirs(features), features, rows=10_000)


@pytest.mark.parametrize("width", [5, 140])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_moving_average_of_covariances_follows_a_loop(width, corrected):
    target, configuration = [symmetric(width, dtype=torch.float64)], mo.MovingAverage(0.7, bias_correction=corrected)
    loss, average = mo.CovarianceLoss(target, average=configuration, reduction="mean"), None
    for seed in range(4):
        features = inputs(9, seed=seed, shapes=[(width,)])
        (cov,) = covariances(features)
        share = 0.3 / (1 - 0.7 ** (seed + 1)) if corrected else 0.3
        # It starts from the first batch. The gradient has the batch's share from the first step on.
        average = (1 - share) * (cov.detach() if average is None else average) + share * cov
        theirs = (average - target[0]).square().mean()
        average = average.detach()
        assert_loss(loss(features), theirs, features)
        assert_close(loss.cov_average, triangle.pack(average), rows=1000)


def state_of(loss):
    return {k: v.clone() for k, v in loss.state_dict().items() if "target" not in k}


@pytest.mark.parametrize("average_kind", ["moving", "moving, corrected", "adam"])
def test_the_state_advances_in_training_alone_and_once_a_call(average_kind):
    loss = make_loss(average_kind, mean_weight=1.0)
    before = state_of(loss)
    loss(inputs())
    assert_same_bits(state_of(loss), before)
    loss.train()(inputs())
    after = state_of(loss)
    assert after["step"] == before["step"] + 1 == 3
    assert after["mean_loss.step"] == 3
    assert not torch.equal(after["cov_average"], before["cov_average"])


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_the_saved_state_resumes_bit_for_bit(average_kind):
    loss = make_loss(average_kind, True, mean_weight=1.0)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = mo.CovarianceLoss(
        mo.Moments(torch.zeros(11).double(), cov=tuple(torch.eye(w).double() for w in WIDTHS), shapes=((5,), (6,))),
        average=AVERAGES[average_kind],
        mean_weight=1.0,
    )
    other.load_state_dict(torch.load(file))
    for seed in (7, 8):
        assert_same_bits(loss(inputs(seed=seed)), other(inputs(seed=seed)))
    assert_same_bits(loss.state_dict(), other.state_dict())


@pytest.mark.parametrize("average_kind", ["moving", "adam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_keeps_its_dtype(average_kind, dtype):
    loss = mo.CovarianceLoss(targets(), average=AVERAGES[average_kind]).to(dtype)
    assert all(v.dtype in (torch.float32, torch.bool, torch.int64) for v in loss.state_dict().values())
    loss([x.to(dtype) for x in inputs()])


@pytest.mark.parametrize("average_kind", ["moving", "adam"])
def test_entries_that_are_not_finite_leave_their_state_untouched(average_kind):
    loss = mo.CovarianceLoss([symmetric(140)], average=AVERAGES[average_kind])
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
        mo.covariance_loss([forward_ad.make_dual(x[0], torch.ones_like(x[0])), x[1]], targets(torch.float64))


@pytest.mark.parametrize("average_kind", ["none", "moving", "adam"])
def test_it_compiles_to_one_graph(average_kind):
    torch._dynamo.reset()
    plain, compiled = (
        mo.CovarianceLoss(target_moments(), average=AVERAGES[average_kind], mean_weight=0.5) for _ in range(2)
    )
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        features = inputs(dtype=torch.float32, seed=seed)
        ours, theirs = step(features), plain(features)
        assert_same_bits(ours.detach(), theirs.detach())
        assert_same_bits(torch.autograd.grad(ours, features), torch.autograd.grad(theirs, features))
    assert_same_bits(state_of(compiled), state_of(plain))
    torch._dynamo.reset()


def test_autocast_changes_nothing():
    features = inputs(dtype=torch.float32)
    loss = make_loss("adam", mean_weight=0.5).float()
    plain = loss(features)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(features)
        grads = torch.autograd.grad(value, features)
    assert_same_bits([value.detach(), grads], [plain.detach(), torch.autograd.grad(plain, features)])


X = torch.randn(4, 3)
EYE = torch.eye(3)
NAN = torch.full((3, 3), float("nan"))
MOMENTS = mo.Moments(torch.zeros(3), cov=EYE)
FUNCTION_ERRORS = {
    "not square": (EYE[:2], {}, ValueError, r"target: got shape \(2, 3\), expected a square matrix"),
    "width": (torch.eye(4), {}, ValueError, "input: got 3 columns .* expected 4 as in target"),
    "layers": ([EYE, EYE], {}, ValueError, "input: got 1 layers, expected 2 as in target"),
    "target type": (3.0, {}, TypeError, "target: got float"),
    "no covariances": (mo.Moments(torch.zeros(3)), {}, ValueError, "target: got Moments without covariances"),
    "mean of matrices": (EYE, {"mean_weight": 1.0}, ValueError, "mean_weight: got 1.0, .* pass Moments"),
    "reduction": (EYE, {"reduction": "max"}, ValueError, "reduction: got 'max'"),
    "precision": (EYE, {"precision": "fp8"}, ValueError, "precision: got 'fp8'"),
    "correction": (EYE, {"correction": -1}, ValueError, "correction: got -1"),
    "correction of moments": (MOMENTS, {"correction": 0}, ValueError, "correction: got 0, expected 1 as in target"),
    "joint": (EYE, {"joint": "yes"}, TypeError, "joint: got 'yes'"),
    "joint matrices": ([EYE, EYE], {"joint": True}, ValueError, "target: got 2 covariances with joint=True, .* one"),
    "weight": (EYE, {"cov_weight": "1"}, TypeError, "cov_weight: got str"),
    "weights": (EYE, {"cov_weight": [1.0, 2.0]}, ValueError, "cov_weight: got 2 weights, expected .* 1"),
    "device": (EYE.to("meta"), {}, ValueError, "input: got device cpu, expected meta"),
}


@pytest.mark.parametrize("case", FUNCTION_ERRORS)
def test_wrong_arguments(case):
    target, options, error, message = FUNCTION_ERRORS[case]
    with pytest.raises(error, match=message):
        mo.covariance_loss(X, target, **options)


def test_one_row_has_no_covariance():
    with pytest.raises(ValueError, match="input: got a batch of 1, expected more than 1 rows"):
        mo.covariance_loss(X[:1], EYE)
    with pytest.raises(ValueError, match="input: got a batch of 1, expected more than 1 rows"):
        mo.CovarianceLoss(EYE)(X[:1])


SKEW = EYE + torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]])
ADAM = mo.AdamMovingAverage()
CLASS_ERRORS = {
    "asymmetric": (SKEW, {}, ValueError, "^target: got an asymmetric matrix, whose entries differ by 1"),
    "nan": (NAN, {}, ValueError, "^target: got non-finite values"),
    "negative": (-EYE, {}, ValueError, "^target: got a negative variance"),
    "average": (EYE, {"average": 0.9}, TypeError, "average: got float"),
    "weights": (EYE, {"cov_weight": [1.0, 2.0]}, ValueError, "cov_weight: got 2 weights"),
    "correction of moments": (MOMENTS, {"correction": 0}, ValueError, "correction: got 0, expected 1 as in target"),
    "joint matrices": ([EYE, EYE], {"joint": True}, ValueError, "target: got 2 covariances with joint=True"),
    "mean of adam": (EYE, {"average": ADAM, "reduction": "mean"}, ValueError, "reduction: got 'mean', .* 'sum'"),
}


@pytest.mark.parametrize("case", CLASS_ERRORS)
def test_wrong_arguments_of_the_class(case):
    target, options, error, message = CLASS_ERRORS[case]
    with pytest.raises(error, match=message):
        mo.CovarianceLoss(target, **options)


@pytest.mark.parametrize(("rows", "width"), [(1024, 2048), (4096, 1024)])
@pytest.mark.parametrize("kind", ["function", "class"])
def test_the_value_needs_less_memory_than_a_matrix(backend, rows, width, kind):
    if backend == "reference":
        pytest.skip("the reference makes copies in float64")
    memory.return_freed_memory()
    x, target = torch.randn(rows, width), torch.eye(width)
    loss = mo.CovarianceLoss(target) if kind == "class" else lambda x: mo.covariance_loss(x, target)
    loss(x)
    peak = memory.peak_over_rest(lambda: loss(x))
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert peak < 4 * width * width
