"""The CUDA kernels' own sources, compiled for the host, against float64: indexing, masks, reductions, launches."""

import os
import subprocess
import sys
from pathlib import Path

import host_kernels
import host_module
import pytest
import torch
from helpers import DTYPES, epsilon, exact_moments, mean_bound, mean_error, statistics_dtype, var_bound, var_error

from moment_ops.ops import reference
from moment_ops.ops.records import Match


def features(shapes, dtype, shift=3.0):
    return [(torch.randn(shape, dtype=torch.float64) + shift).to(dtype) for shape in shapes]


# Tails of rows and columns; blocks of one group of threads, of many, and of many for few columns; chunks that are
# folded once and twice; several of everything.
SHAPES = {
    "one row": [(1, 40)],
    "one column": [(100, 1)],
    "tail of rows": [(13, 64)],
    "tail of columns": [(16, 67)],
    "few columns": [(70, 12)],
    "one tile": [(7, 1100)],
    "many columns": [(20, 140_000)],
    "exactly one chunk": [(512, 20)],
    "several chunks": [(1700, 24)],
    "chunks folded twice": [(4700, 5)],
    "wide with chunks": [(1100, 530)],
    "many layers": [(5, 3 + i % 7) for i in range(150)],
    "mixed": [(600, 7, 3), (600, 130), (600, 1), (600, 4, 4, 4)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_within_the_bounds(module, shapes, dtype):
    input = features(shapes, dtype)
    mean, var, _ = host_kernels.moments(module, input)
    exact_mean, exact_var = exact_moments(input)
    if shapes[0][0] == 1:
        assert torch.equal(mean, torch.cat([x[0].flatten() for x in input]).to(mean.dtype))
        assert var.isnan().all()
        return
    assert mean_error(mean, exact_mean, exact_var) <= mean_bound(dtype)
    assert var_error(var, exact_var) <= var_bound(dtype)


def test_more_layers_than_fit_a_launch_take_more_launches(module):
    input = features([(4, 3)] * (2 * module.max_layers + 1), torch.float32)
    mean, _, launches = host_kernels.moments(module, input)
    assert launches == 3
    assert torch.allclose(mean, torch.cat([x.mean(0) for x in input]))


@pytest.mark.parametrize("shapes", [SHAPES["wide with chunks"], SHAPES["chunks folded twice"], [(20, 1000)]])
def test_results_do_not_depend_on_the_order_of_blocks(module, shapes):
    input = features(shapes, torch.float32)
    first = host_kernels.moments(module, input)[:2]
    for order in (1, 2, 3):
        for a, b in zip(first, host_kernels.moments(module, input, order=order)[:2], strict=True):
            assert torch.equal(a, b)


LAYOUTS = {
    "rows apart": lambda: torch.randn(40, 200)[:, 8:72],
    "misaligned": lambda: torch.randn(40, 65)[:, 1:],
    "every other row": lambda: torch.randn(80, 64)[::2],
    "channels last": lambda: torch.randn(10, 8, 5, 3).to(memory_format=torch.channels_last),
    "channels last, odd": lambda: torch.randn(10, 3, 5, 7).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(module, make):
    x = make()
    mean, var, _ = host_kernels.moments(module, [x])
    exact_mean, exact_var = exact_moments([x])
    assert mean_error(mean, exact_mean, exact_var) <= mean_bound(torch.float32)
    assert var_error(var, exact_var) <= var_bound(torch.float32)


@pytest.mark.parametrize("correction", [0, 1, 2, 6])
def test_corrections(module, correction):
    input = features([(5, 17)], torch.float32)
    var = host_kernels.moments(module, input, correction)[1]
    expected = reference.moments(input, 0, correction, True)[1]
    assert torch.allclose(var, expected, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shapes", [SHAPES["mixed"], SHAPES["tail of columns"], SHAPES["many layers"], [(130, 520)]])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["mean", "var", "both", "added", "scaled"])
def test_moments_backward(module, shapes, dtype, given):
    input = features(shapes, dtype)
    columns = sum(x[0].numel() for x in input)
    wide = statistics_dtype(dtype)
    mean = reference.moments(input, 0, 1, False)[0].to(wide)
    grad_mean = torch.randn(columns, dtype=wide) if given != "var" else None
    grad_var = torch.randn(columns, dtype=wide) if given != "mean" else None
    grad = features(shapes, dtype) if given == "added" else ()
    scale = torch.tensor([0.37], dtype=wide) if given == "scaled" else None
    count = torch.full((len(input),), input[0].shape[0] + 9)
    out = host_kernels.moments_backward(module, input, mean, count, grad_mean, grad_var, grad, 1, scale)
    exact = [None if t is None else t.double() for t in (grad_mean, grad_var)]
    expected = reference.moments_backward(
        [g.double() for g in grad],
        *exact,
        [x.double() for x in input],
        mean.double(),
        count,
        0,
        1,
        None if scale is None else scale.double(),
    )
    for y, e in zip(out, expected, strict=True):
        assert y.dtype == dtype
        assert (y.double() - e).abs().max() <= 8 * epsilon(dtype) * (1 + e.abs().max())


def test_a_variance_without_use_sends_no_gradient_from_a_single_row(module):
    x = torch.randn(1, 10)
    out = host_kernels.moments_backward(module, [x], x[0], torch.tensor([1]), torch.ones(10), torch.zeros(10))
    assert torch.equal(out[0], torch.ones(1, 10))


def options_of(average_kind, columns):
    return {
        "none": [],
        "moving": [0.8, 0.0],
        "moving, corrected": [0.8, 1.0],
        "adam": [1e-2, 0.5, 0.999, 1e-8, 2 / columns],
    }[average_kind]


def new_state(average_kind, columns, dtype, has_var):
    kind = average_kind.partition(",")[0]
    per_quantity = {"none": 0, "moving": 1, "adam": 3}[kind]
    state = [torch.zeros(columns, dtype=dtype) for _ in range(per_quantity * (2 if has_var else 1))]
    if kind == "moving":
        state.append(torch.zeros(columns, dtype=torch.bool))
    if average_kind != "none":
        state.append(torch.zeros(1, dtype=torch.int64))
    return state


@pytest.mark.parametrize("shapes", [SHAPES["mixed"], SHAPES["several chunks"], SHAPES["many layers"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("average_kind", ["none", "moving", "moving, corrected", "adam"])
@pytest.mark.parametrize("source", ["features", "moments", "means alone", "weighted"])
def test_match(module, shapes, dtype, average_kind, source):
    """Three steps, the second without an update, against the reference in float64."""
    wide = statistics_dtype(dtype)
    columns = sum(torch.Size(s[1:]).numel() for s in shapes)
    has_var = source != "means alone"
    targets = (torch.randn(columns, dtype=wide) + 3, torch.rand(columns, dtype=wide) if has_var else None)
    weights = (torch.rand(columns, dtype=wide), None) if source == "weighted" else (None, None)
    scales = (1.0, 0.5)
    state = new_state(average_kind, columns, wide, has_var)
    exact_state = [s.to(torch.float64, copy=True) if s.is_floating_point() else s.clone() for s in state]
    for step, update in enumerate((True, False, True)):
        input = features(shapes, dtype)
        if step == 0:
            input[0][0].flatten()[0] = float("nan")
        mean, var = reference.moments([x.double() for x in input], 0, 1, True)
        arguments = (scales, weights, 0.25, average_kind, options_of(average_kind, columns))
        given = ([], mean.to(wide), var.to(wide)) if source == "moments" else (input, None, None)
        loss, batch_mean, grad_mean, grad_var = host_kernels.match_(
            module, *given, targets, *arguments, state, update, order=step
        )
        target_mean, target_var, *exact_weights = (None if v is None else v.double() for v in (*targets, *weights))
        averaging = average_kind.partition(",")[0], options_of(average_kind, columns), exact_state, update
        match = Match(target_mean, target_var, *scales, *exact_weights, 0.25, *averaging)
        exact_loss, exact_grad_mean, exact_grad_var = reference.match_(mean, var if has_var else None, match)
        tolerance = 2e-5 if wide == torch.float32 else 1e-12

        def close(a, b, tolerance=tolerance):
            return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)

        assert close(batch_mean, mean)
        assert close(loss, exact_loss)
        assert close(grad_mean, exact_grad_mean)
        assert not has_var or close(grad_var, exact_grad_var)
        for mine, exact in zip(state, exact_state, strict=True):
            assert close(mine, exact)


def test_all_halves_convert_exactly(module):
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
        values = bits.view(dtype)
        name = str(dtype).removeprefix("torch.")
        mine = torch.tensor([module.from_bits(name, int(b)) for b in bits.tolist()])
        assert torch.equal(mine.nan_to_num(12345), values.float().nan_to_num(12345))


def test_rounding_to_halves_is_to_nearest_even(module):
    values = torch.cat([torch.randn(3000) * 10.0**e for e in (-9, -6, -3, 0, 3, 5)])
    values = torch.cat([values, torch.tensor([65519.0, 65520.0, float("inf"), -0.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25])])
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        mine = torch.tensor([module.to_bits(name, v) for v in values.tolist()], dtype=torch.int32)
        assert torch.equal(mine, values.to(dtype).view(torch.uint16).to(torch.int32))


def test_merging_two_groups_is_the_group_of_both(module):
    a, b = torch.randn(7, dtype=torch.float64) + 100, torch.randn(12, dtype=torch.float64) - 5

    def parts(x):
        return x.mean().item(), (x - x.mean()).square().sum().item(), len(x)

    mean, m2 = module.merge(*parts(a), *parts(b))
    both = parts(torch.cat([a, b]))
    assert (mean, m2) == pytest.approx(both[:2], rel=1e-13)


def test_merging_with_nothing_changes_nothing(module):
    assert module.merge(1.5, 2.5, 9, 0.0, 0.0, 0) == (1.5, 2.5)
    assert module.merge(0.0, 0.0, 0, 1.5, 2.5, 9) == (1.5, 2.5)


@pytest.mark.skipif("MOMENT_OPS_TESTING_MODULE" in os.environ, reason="runs inside itself")
def test_no_access_outside_of_the_arrays():
    """The same tests under the address sanitizer, in a process of their own."""
    library = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(library.stdout.strip()).is_absolute():
        pytest.skip("no address sanitizer")
    path = host_module.build_module("-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer")
    environment = os.environ | {
        "LD_PRELOAD": library.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "MOMENT_OPS_TESTING_MODULE": str(path),
    }
    chosen = "test_layouts or (test_moments_within and (tail or several or mixed)) or (test_match and mixed and adam)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
