"""What the kernels compile to, without a GPU: budgets of specs/, and 64-bit offsets."""

import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from specs import covariances, resources
from specs.catalogue import SPECS

RECORD = Path(__file__).parent / "resources.json"
CASES = [(spec, architecture) for spec in SPECS for architecture in spec.architectures]


def spec(name, architecture=90):
    return next(spec for spec in SPECS if spec.name == name and architecture in spec.architectures)


@pytest.mark.parametrize(
    ("spec", "architecture"), CASES, ids=[f"{spec.name}, sm_{architecture}" for spec, architecture in CASES]
)
def test_a_kernel_stays_within_its_budget(spec, architecture):
    launch = spec.launch()
    got = resources.resources(resources.compile_launch(launch, architecture))
    budget = spec.budget(launch)
    violations = budget.violations(got)
    name = f"{spec.name}, sm_{architecture}"
    old = resources.recorded(RECORD).get(name)
    assert not violations, (
        f"{', '.join(violations)} outside of {budget}\n{resources.table([(name, old, got)])}\n"
        f"If the change is meant, argue the budget in tests/triton/specs and record the resources:"
        f" PYTHONPATH=tests/triton python -m specs {RECORD} --record"
    )


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("moments bf16", {"wide_loads", "narrow_loads", "wide_stores", "narrow_stores"}),
        ("moments_backward fp32", {"wide_loads", "narrow_loads", "wide_stores", "narrow_stores"}),
        ("relu_moments bf16", {"wide_loads", "narrow_loads", "wide_stores"}),
        ("covariance bf16x3 fp32", {"wide_loads", "wide_stores", "narrow_stores"}),
        ("covariance_match_backward bf16x3 fp32", {"wide_loads", "wide_stores", "narrow_stores"}),
    ],
)
def test_losing_wide_accesses_breaks_the_budget(name, lost):
    launch = spec(name).launch()
    got = resources.resources(resources.compile_launch(resources.without_alignment(launch), 90))
    assert lost <= set(spec(name).budget(launch).violations(got))


def test_too_few_registers_break_the_budget():
    launch = spec("moments bf16").launch()
    starved = resources.replace(launch, registers=32)
    got = resources.resources(resources.compile_launch(starved, 90))
    violations = spec("moments bf16").budget(launch).violations(got)
    assert {"stack", "spills"} <= set(violations)


@pytest.mark.parametrize(
    "name", ["moments bf16", "relu_moments fp32", "moments_backward bf16", "match_ of features, ADAM fp32"]
)
def test_fewer_rows_in_flight_break_the_budget(name):
    launch = spec(name).launch()
    rows = resources.named(launch)["strip.ROWS"]
    assert rows >= 4
    hasty = resources.with_constants(launch, strip={"ROWS": rows // 4})
    got = resources.resources(resources.compile_launch(hasty, 90))
    assert "processor_in_flight" in spec(name).budget(launch).violations(got)


@pytest.mark.parametrize("name", ["moments fp32", "moments bf16", "moments fp64", "moments bf16, tokens"])
def test_no_row_is_loaded_twice(name):
    """A thread has eight rows of a tile, which is loaded first, in the loop and last; the pivot has no load.

    What is read again, hardly ever, are four numbers at a time, in a loop that is unrolled by 4, 2 and 1.
    """
    got = resources.resources(resources.compile_launch(spec(name).launch(), 90))
    again = 7 * (4 * spec(name).launch().arguments["layers"].inputs[0].element_size() // 16)
    assert (got.wide_loads, got.in_flight) == (3 * 8 + again, 8 * 16)


COVARIANCES = {
    "covariance": lambda a: covariances._covariance(a, (1024, 2048), torch.float32, "bf16x3"),
    "covariance, matched": lambda a: covariances._match(a, (1024, 512), torch.bfloat16, "ieee", "adam", True),
    "covariance, backward": lambda a: covariances._backward(a, (1024, 2048), torch.float32, "tf32", False),
}


@pytest.mark.parametrize("name", COVARIANCES)
@pytest.mark.parametrize("architecture", [86, 120])
def test_covariances_on_small_gpus_fit_into_their_shared_memory(name, architecture):
    got = resources.resources(resources.compile_launch(COVARIANCES[name](architecture), architecture))
    assert got.spills == 0
    assert got.matrix_products > 0
    assert got.shared <= 99 * 1024


# A library reaches about four fifths of the peak, with twice as many products: it does not know of the symmetry.
ENOUGH = 0.8 / 2


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    "name",
    ["covariance ieee bf16", "covariance bf16x3 fp32", "covariance ieee fp32", "covariance_match_ ADAM ieee bf16"],
)
def test_covariances_leave_room_to_be_faster_than_the_product_of_a_library(name, architecture):
    compiled = resources.compile_launch(spec(name, 80).launch(), architecture)
    least, most = resources.machine_code(compiled).product_share
    assert 0 < least <= most <= 1
    assert most >= ENOUGH


def test_a_table_shows_what_changed():
    old = resources.Resources(64, 0, 0, 0, 25, 0, 2, 0)
    table = resources.table([("moments", old, resources.replace(old, wide_loads=0, narrow_loads=100))])
    assert "25 -> 0" in table
    assert "0 -> 100" in table


def test_every_budget_has_its_record():
    assert set(resources.recorded(RECORD)) == {f"{spec.name}, sm_{architecture}" for spec, architecture in CASES}


@pytest.mark.parametrize(
    "name", ["moments bf16, tall", "moments_backward fp32", "match_ of features, ADAM fp32", "relu_moments bf16, tall"]
)
def test_offsets_of_rows_and_packed_columns_are_64_bits_wide(name):
    """A layer's columns fit into 32 bits, its rows times columns need not."""
    ttir = resources.compile_launch(spec(name).launch(), 90).asm["ttir"]
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    offsets = re.findall(r"tt\.addptr %\w+, (%\w+) : .*, tensor<(?:\d+x){2,3}(i\d+)>", ttir)
    tiles = [width for name, width in offsets if name not in constants]
    strides = re.findall(r"arith\.muli .* : tensor<\d+(?:x1){1,2}x(i\d+)>", ttir)
    packed = re.findall(r"tt\.addptr %\w+, %packed\w* : .*, tensor<\d+x(i\d+)>", ttir)
    for widths in (tiles, strides, packed):
        assert widths
        assert set(widths) == {"i64"}


@pytest.mark.parametrize("name", ["covariance_match_ ADAM ieee bf16", "covariance_match_backward ieee bf16"])
def test_strides_of_covariances_are_64_bits_wide(name):
    """Rows times columns, and entries of a triangle, need not fit into 32 bits."""
    ttir = resources.compile_launch(spec(name).launch(), 90).asm["ttir"]
    strides = re.findall(r"arith\.muli .* : tensor<\d+x1x(i\d+)>", ttir)
    assert strides
    assert set(strides) == {"i64"}
