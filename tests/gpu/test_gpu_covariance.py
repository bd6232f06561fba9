"""Covariances on the GPU: numbers against float64 on the CPU, precisions, streams, graphs, memory and determinism."""

import pytest
import torch
from helpers import assert_close, assert_same_bits, make_features
from on_gpu import cpu, moved
from test_covariance import BOUNDS, LAYOUTS, OPS, correlated, exact, relative_error

import moment_ops as mo
from moment_ops.ops import backends, triangle
from moment_ops.ops.covariance import covariance_match_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Up to a comma, names are kinds.
AVERAGES = {
    "none": [],
    "moving": [0.9, 0.0],
    "moving, corrected": [0.9, 1.0],
    "adam": [1e-2, 0.5, 0.999, 1e-8, 0.1],
}


@pytest.fixture(autouse=True)
def _has_kernels(backend):
    reason = backends._cannot_run(backend, "covariance", "cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 40, 1000, 9001])
@pytest.mark.parametrize("width", [1, 5, 128, 129, 300, 1100])
def test_it_is_the_covariance_of_the_same_numbers_in_float64(width, rows, dtype):
    (x,) = make_features(rows, [(width,)], dtype)
    cov = mo.covariance(moved(x))
    assert torch.equal(cov, cov.mT)
    assert relative_error(cov.cpu(), exact(x)) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("shape", [(3000, 60), (500, 2048)])
def test_a_precision_bounds_the_error(precision, dtype, shape):
    x = correlated(*shape, 3.0).to(dtype)
    cov = mo.covariance(x.cuda(), precision=precision)
    assert torch.equal(cov, cov.mT)
    assert relative_error(cov.cpu(), exact(x)) <= BOUNDS[precision]


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(100_000, 8), (100_000, 520), (600, 1100)])
def test_means_far_from_zero_cost_no_digits(shape, ratio):
    x = correlated(*shape, ratio)
    assert relative_error(mo.covariance(x.cuda()).cpu(), exact(x)) <= 1e-6


@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_many_rows_of_many_columns_are_promoted(precision):
    x = torch.randn(20_000, 4096) + 1
    cov = mo.covariance(x.cuda(), precision=precision)
    assert relative_error(cov.cpu(), exact(x)) <= BOUNDS[precision]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.7, 10.0, 60.0])
def test_features_of_16_bits_lose_nothing_on_tensor_cores(dtype, ratio):
    x = (torch.randn(2000, 1040) * 3 + 3 * ratio * torch.randn(1040).sign()).to(dtype)
    assert relative_error(mo.covariance(x.cuda()).cpu(), exact(x)) <= 1e-6


@pytest.mark.parametrize("rows", [2, 513, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_column_has_no_covariance(rows, dtype):
    values = torch.tensor([0.1, -3.3e4, 1e-5, 0.0]).to(dtype)
    x = torch.cat([values.expand(rows, 4), torch.randn(rows, 3).to(dtype)], 1)
    cov = mo.covariance(x.cuda())
    assert not cov[:4].any()
    assert cov[4:, 4:].diagonal().min() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", BOUNDS)
def test_a_value_that_is_not_finite_spoils_its_row_and_column_alone(precision, dtype, value):
    x = make_features(40, [(300,)], dtype)[0].cuda()
    clean = mo.covariance(x, precision=precision).cpu()
    x[7, 170] = value
    cov = mo.covariance(x, precision=precision).cpu()
    others = torch.arange(300) != 170
    assert_same_bits(cov[others][:, others], clean[others][:, others])
    assert not cov[170].isfinite().any()
    assert not cov[:, 170].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_nothing(layout):
    x = moved(LAYOUTS[layout](make_features(20, [(140,)])[0]))
    assert_same_bits(mo.covariance(x), mo.covariance(x.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [40, 3000])
@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_gradients(dtype, rows, precision):
    (x,) = make_features(rows, [(520,)], dtype)
    layer = x.cuda().requires_grad_()
    weight = torch.randn(520, 520, dtype=torch.float64)
    (dx,) = torch.autograd.grad((mo.covariance(layer, precision=precision) * weight.float().cuda()).sum(), layer)
    assert dx.dtype == dtype
    expected = (x.double() - x.double().mean(0)) @ (weight + weight.mT) / (rows - 1)
    if precision == "ieee":
        assert_close(dx.cpu(), expected, rows=520)
    else:
        assert relative_error(dx.cpu(), expected) <= BOUNDS[precision] + torch.finfo(dtype).eps


def symmetric_matrices(widths, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(width, width, generator=generator, dtype=torch.float64) for width in widths]
    return [m + m.mT for m in matrices]


def packed(widths, seed):
    return torch.cat([triangle.pack(m) for m in symmetric_matrices(widths, seed)])


def new_state(average_kind, widths):
    step = torch.tensor(3)
    if average_kind == "none":
        return []
    if average_kind.startswith("moving"):
        return [packed(widths, 5), packed(widths, 6) > 0, step]
    return [packed(widths, 5), packed(widths, 6), packed(widths, 7).abs(), step]


def match(features, average_kind, dtype, device, keep=True, state=None):
    """[loss, mean, grad, *state] of `covariance_match_`, one target full, the others packed."""
    widths = [x.shape[1] for x in features]
    targets = [t if i == 0 else triangle.pack(t) for i, t in enumerate(symmetric_matrices(widths, 4))]
    targets = [t.to(dtype).to(device) for t in targets]
    if state is None:
        state = [(s.to(dtype) if s.is_floating_point() else s).to(device) for s in new_state(average_kind, widths)]
    weights = [0.5 + i for i in range(len(features))]
    results = OPS.covariance_match_(
        features, 1, targets, weights, average_kind.partition(",")[0], AVERAGES[average_kind], state, True, keep, "ieee"
    )  # fmt: skip
    return [*results, *state]


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "widths"), [(20, (130, 7, 64, 520)), (5000, (70, 300)), (300, (2056, 1001))])
def test_loss_derivative_and_state_of_several_layers(average_kind, keep, dtype, rows, widths):
    features = make_features(rows, [(width,) for width in widths], dtype)
    got = cpu(match([x.cuda() for x in features], average_kind, torch.float32, "cuda", keep))
    with mo.backend("reference"):
        expected = match([x.double() for x in features], average_kind, torch.float64, "cpu", keep)
    for ours, theirs in zip(got, expected, strict=True):
        if ours.is_floating_point() and ours.numel():
            assert_close(ours, theirs, rows=rows)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [33, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_of_packed_matrices(rows, dtype):
    widths = (520, 5, 1000)
    features = make_features(rows, [(width,) for width in widths], dtype)
    grad, grad_mean = packed(widths, 8).float(), torch.randn(sum(widths))
    mean = torch.cat([x.double().mean(0) for x in features]).float()
    got = covariance_match_backward(
        [x.cuda() for x in features], mean.cuda(), grad.cuda(), grad_mean.cuda(), scale=torch.tensor(-1.5).cuda(),
        correction=1, precision="ieee",
    )  # fmt: skip
    matrices = symmetric_matrices(widths, 8)
    for dx, x, m, g, c in zip(got, features, mean.split(widths), grad_mean.split(widths), matrices, strict=True):
        expected = g.double() / rows - 3 / (rows - 1) * (x.double() - m.double()) @ c.float().double()
        assert_close(dx.cpu(), expected, rows=x.shape[1])


def random_features(rows=700, widths=(520, 70), seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(rows, width, generator=generator, device="cuda") for width in widths]


def step(features, average_kind, state=None):
    """Everything that a training step computes."""
    loss, mean, grad, *state = match(features, average_kind, torch.float32, "cuda", state=state)
    gradients = covariance_match_backward(features, mean, grad, mean, scale=None, correction=1, precision="ieee")
    return [loss, mean, grad, *state, *gradients]


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_ten_runs_are_the_same_to_the_last_bit(average_kind):
    features = random_features()
    first = step(features, average_kind)
    for _ in range(9):
        assert_same_bits(step(features, average_kind), first)


@pytest.mark.parametrize("precision", BOUNDS)
def test_nothing_waits_for_the_gpu(precision, request):
    layer = random_features()[0].requires_grad_()
    loss = mo.CovarianceLoss(torch.eye(520), mo.AdamMovingAverage(lr=0.01), precision=precision).cuda()

    def train():
        torch.autograd.grad(loss(layer), layer)
        torch.autograd.grad(mo.covariance(layer, precision=precision).sum(), layer)

    train()
    request.getfixturevalue("no_sync")
    train()


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_a_captured_step_replays_as_it_runs(average_kind):
    static = random_features()
    widths = [x.shape[1] for x in static]
    targets = [t.float().cuda() for t in symmetric_matrices(widths, 4)]

    def fresh_state():
        return [(s.float() if s.is_floating_point() else s).cuda() for s in new_state(average_kind, widths)]

    def run(features, state):
        loss, mean, grad = OPS.covariance_match_(
            features,
            1,
            targets,
            [1.0, 2.0],
            average_kind.partition(",")[0],
            AVERAGES[average_kind],
            state,
            True,
            True,
            "bf16x3",
        )
        return [
            loss,
            *covariance_match_backward(features, mean, grad, mean, scale=None, correction=1, precision="ieee"),
        ]

    captured, plain = fresh_state(), fresh_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static, fresh_state())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(static, captured)
    for seed in range(1, 4):
        batch = random_features(seed=seed)
        for x, fresh in zip(static, batch, strict=True):
            x.copy_(fresh)
        graph.replay()
        assert_same_bits(outputs, run(batch, plain))
    assert_same_bits(captured, plain)


def test_the_scalar_loss_needs_no_matrix():
    """With tiles enough for every processor, the forward without a gradient keeps nothing of the size of a matrix."""
    (x,) = random_features(512, (6144,))
    target = torch.zeros(6144, 6144, device="cuda")
    arguments = ([x], 1, [target], [1.0], "none", [], [], False, False, "bf16x3")
    OPS.covariance_match_(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    OPS.covariance_match_(*arguments)
    assert torch.cuda.max_memory_allocated() - before <= 64 * 4 * 6144


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_the_contract(dtype):
    x = torch.randn(6, 300).to(dtype).cuda().requires_grad_()
    torch.library.opcheck(OPS.covariance.default, (x, 1, True, "ieee"))
    grad, grad_mean, mean = (torch.randn(*s, device="cuda") for s in ((300, 300), (300,), (300,)))
    torch.library.opcheck(OPS.covariance_backward.default, (grad.requires_grad_(), grad_mean, x, mean, 1, True, "ieee"))


def test_more_rows_times_columns_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    rows, width = 2_200_000, 1000
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    cov = mo.covariance(x)
    columns = [0, 500, 999]
    wanted = exact(x[:, columns].cpu())
    assert relative_error(cov.cpu()[columns][:, columns], wanted) <= 1e-6
