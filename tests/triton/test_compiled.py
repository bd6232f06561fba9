"""What the kernels compile to, without a GPU: budgets of kernels/specs.py, and 64-bit offsets."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from moment_ops.kernels import specs

RECORD = Path(__file__).parent / "resources.json"
CASES = [(spec, architecture) for spec in specs.SPECS for architecture in spec.architectures]


def spec(name):
    return next(spec for spec in specs.SPECS if spec.name == name)


@pytest.mark.parametrize(
    ("spec", "architecture"), CASES, ids=[f"{spec.name}, sm_{architecture}" for spec, architecture in CASES]
)
def test_a_kernel_stays_within_its_budget(spec, architecture):
    launch = spec.launch()
    got = specs.resources(specs.compile_launch(launch, architecture))
    budget = spec.budget(launch)
    violations = budget.violations(got)
    name = f"{spec.name}, sm_{architecture}"
    old = specs.recorded(RECORD).get(name)
    assert not violations, (
        f"{', '.join(violations)} outside of {budget}\n{specs.table([(name, old, got)])}\n"
        f"If the change is meant, argue the budget in kernels/specs.py and record the resources:"
        f" python -m moment_ops.kernels.specs {RECORD.name} --record"
    )


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("moments bf16", {"wide_loads", "narrow_loads", "wide_stores", "narrow_stores"}),
        ("moments_backward fp32", {"wide_loads", "narrow_loads", "wide_stores", "narrow_stores"}),
    ],
)
def test_losing_wide_accesses_breaks_the_budget(name, lost):
    launch = spec(name).launch()
    got = specs.resources(specs.compile_launch(specs.without_alignment(launch), 90))
    assert lost <= set(spec(name).budget(launch).violations(got))


def test_too_few_registers_break_the_budget():
    launch = spec("moments bf16").launch()
    starved = specs.replace(launch, registers=32)
    violations = spec("moments bf16").budget(launch).violations(specs.resources(specs.compile_launch(starved, 90)))
    assert {"stack", "spills"} <= set(violations)


@pytest.mark.parametrize("name", ["moments bf16, tall", "moments_backward bf16", "match_ of features, ADAM fp32"])
def test_amd_gpus_get_kernels_without_spills(name):
    code = specs.compile_launch(spec(name).launch(), "gfx942").asm["amdgcn"]
    assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", code) == ["0"]
    assert "global_load_dwordx4" in code


def test_a_table_shows_what_changed():
    old = specs.Resources(64, 0, 0, 0, 25, 0, 2, 0)
    table = specs.table([("moments", old, specs.replace(old, wide_loads=0, narrow_loads=100))])
    assert "25 -> 0" in table
    assert "0 -> 100" in table


def test_every_budget_has_its_record():
    assert set(specs.recorded(RECORD)) == {f"{spec.name}, sm_{architecture}" for spec, architecture in CASES}


@pytest.mark.parametrize("name", ["moments bf16, tall", "moments_backward fp32", "match_ of features, ADAM fp32"])
def test_offsets_of_rows_and_packed_columns_are_64_bits_wide(name):
    """A layer's columns fit into 32 bits, its rows times columns need not."""
    ttir = specs.compile_launch(spec(name).launch(), 90).asm["ttir"]
    tiles = re.findall(r"tt\.addptr %\w+, %(?!cst)\w+ : .*, tensor<\d+x\d+x(i\d+)>", ttir)
    strides = re.findall(r"arith\.muli .* : tensor<\d+x1x(i\d+)>", ttir)
    packed = re.findall(r"tt\.addptr %\w+, %packed\w* : .*, tensor<\d+x(i\d+)>", ttir)
    for widths in (tiles, strides, packed):
        assert widths
        assert set(widths) == {"i64"}
