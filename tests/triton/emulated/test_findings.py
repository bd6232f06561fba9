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

from emulator.launcher import compiled, run

from emulated import contracted

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
