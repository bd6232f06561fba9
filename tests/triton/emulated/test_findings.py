"""What the interpreter hides, and the emulator shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from emulator.hazards import hazards
from emulator.launcher import compiled, run
from triton.runtime.jit import JITFunction

from emulated import contracted
from emulated.cases import emulate, planned
from emulated.columns import MatchFeatures
from emulated.products import Covariance, CovarianceMatch
from moment_ops.kernels import _averages, _common, _products, _reduce, match

TRITON = Path(__file__).parents[1]


def test_a_contracted_test_for_finite_values_updates_everything_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "emulated.contracted"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{TRITON}:{TRITON.parents[1]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    given = contracted.arguments()
    expected = given["m2"] * given["factor"]
    expected[5] = -1
    assert torch.equal(torch.tensor(json.loads(result.stdout)), expected)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_as_compiled_it_leaves_finite_values_alone(architecture):
    """fma(a, b, -(a * b)) is what rounding took from the product: zero for a few of them alone."""
    given = contracted.arguments()
    launch = contracted.launch(given)
    run([launch], [compiled(launch, architecture)])
    product = given["m2"].double() * given["factor"].double()
    exact = product.float().double() == product
    assert exact.sum() < 10
    assert torch.equal(given["state"] == -1, ~exact | product.isinf())


@pytest.fixture
def finite_by_difference():
    """The kernels with the contracted test in place of theirs, and next to the product: nothing is read again."""
    changes = [
        (_common.is_finite, 'tl.abs(value) < float("inf")', "value - value == 0"),
        (_reduce.reduce_columns, "mask & ~(is_finite(mean) & is_finite(m2))", "mask & (mask != mask)"),
    ]
    sources = [function.src for function, _, _ in changes]

    def change(texts):
        for (function, _, _), text in zip(changes, texts, strict=True):
            function._unsafe_update_src(text)
        # Their callers have to be compiled anew.
        for module in (_common, _products, _averages, _reduce, match):
            for function in vars(module).values():
                if isinstance(function, JITFunction):
                    function.hash = None

    changed = [source.replace(*what) for source, (_, *what) in zip(sources, changes, strict=True)]
    assert all(new != old for new, old in zip(changed, sources, strict=True))
    change(changed)
    yield
    change(sources)


F32, BF16 = torch.float32, torch.bfloat16
# Of few rows, so that a variance does not go through shared memory between its product and the test.
MATCHES = {
    "ADAM fp32": lambda: MatchFeatures(7, [(40,)], F32, "adam"),
    "moving fp32": lambda: MatchFeatures(7, [(40,)], F32, "moving"),
    "moving bf16": lambda: MatchFeatures(7, [(40,)], BF16, "moving, uncorrected"),
}


@pytest.mark.parametrize("name", MATCHES)
def test_matches_do_not_move_their_state_with_it_and_this_is_noticed(name, finite_by_difference):
    case = MATCHES[name]()
    with pytest.raises(AssertionError):
        emulate(case, 80)


@pytest.mark.parametrize("name", MATCHES)
def test_matches_with_it_are_found_in_their_text(name, finite_by_difference):
    found = hazards(compiled(MATCHES[name]().launches(80)[-1], 80).kernel)
    assert {hazard.kind for hazard in found} == {"a difference of equal values, fused"}


@pytest.mark.parametrize("name", MATCHES)
def test_matches_as_they_are_move_it(name):
    emulate(MATCHES[name](), 80)


def test_a_match_of_covariances_moves_it():
    emulate(CovarianceMatch(10, [16], F32, "ieee", "adam"), 80)


def test_tiles_beyond_the_last_column_leave_sums_of_blocks_of_rows_too():
    """What is folded of them is masked later; but it has to be there."""
    with planned({"_covariance_plan.PROMOTED_ROWS": 0}):
        case = Covariance(20, 40, F32, "ieee")
        assert case.launches(80)[-1].arguments["tile"].PROMOTED.value > 0
        emulate(case, 80)
