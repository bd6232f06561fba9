"""What the kernels compile to for AMD's GPUs, by Triton's own compiler: CDNA 2, 3 and 4, without a GPU or a driver."""

import functools
import os
import re
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from specs import covariances, grams, resources
from specs.catalogue import SPECS, launches
from specs.resources import named

from moment_ops.kernels import covariance
from moment_ops.kernels._architectures import gradient_mode, gram_mode, product_mode
from moment_ops.kernels._launch import Launch

ARCHITECTURES = ("gfx90a", "gfx942", "gfx950")
PRECISIONS = ("ieee", "bf16x3", "tf32", "bf16")
WAVE = 64
SHARED = 64 * 1024
# What multiplies operands of a mode, and how many entries of the summed dimension at once; 32 x 32 sums.
MATRIX_INSTRUCTIONS = {
    "gfx90a": {"float32": ("v_mfma_f32_32x32x2f32", 2), "bfloat16": ("v_mfma_f32_32x32x8bf16_1k", 8)},
    "gfx942": {
        "float32": ("v_mfma_f32_32x32x2_f32", 2),
        "tf32": ("v_mfma_f32_32x32x4_xf32", 4),
        "bfloat16": ("v_mfma_f32_32x32x8_bf16", 8),
    },
    "gfx950": {"float32": ("v_mfma_f32_32x32x2_f32", 2), "bfloat16": ("v_mfma_f32_32x32x16_bf16", 16)},
}
OPERANDS = {"ieee": "float32", "tf32": "tf32", "bf16": "bfloat16", "bf16x3": "bfloat16", "bf16x4": "bfloat16"}
PRODUCTS = {"ieee": 1, "tf32": 1, "bf16": 1, "bf16x3": 3, "bf16x4": 4}


CASES = [(name, architecture) for architecture in ARCHITECTURES for name in launches(architecture)]


@dataclass(frozen=True)
class Code:
    """What is read from the machine code of a kernel."""

    spills: int  # accesses of memory
    scalar_spills: int  # scalars in lanes of vector registers
    shared: int
    wide_loads: int
    wide_stores: int
    matrix_products: Counter


def compiled(launch, architecture):
    kernel = resources.compile_launch(launch, architecture)
    code = kernel.asm["amdgcn"]

    def metadata(name):
        (value,) = re.findall(rf"\.{name}:\s+(\d+)", code)
        return int(value)

    return Code(
        spills=len(re.findall(r"; .*Folded (?:Spill|Reload)", code)),
        scalar_spills=metadata("sgpr_spill_count"),
        shared=kernel.metadata.shared,
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        wide_stores=len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", code)),
        matrix_products=Counter(re.findall(r"\bv_s?mfma\w*", code)),
    )


@functools.cache
def code_of(name, architecture):
    return compiled(launches(architecture)[name](), architecture)


def vectors(launch, entries, itemsize):
    """128-bit accesses of a lane to so many entries; none where they are narrower."""
    return entries * itemsize // (16 * WAVE * launch.warps)


def wide_loads(launch):
    """128-bit loads of features, and of the matrix that they are multiplied by, at least once."""
    a = named(launch)
    if a.get("layers.VECTOR", 4) == 1:
        return 0
    if "PART" in a:
        return vectors(launch, a["PART"] ** 2, 8)
    if "layers" not in a:
        return vectors(launch, a["COLUMNS"], a["mean"].element_size())
    itemsize = a["layers.inputs"][0].element_size()
    if "strip" in a:
        return vectors(launch, a["strip.ROWS"] * a["strip.COLUMNS"], itemsize)
    rows, columns, depth, steps = (a[f"tile.{name}"] for name in ("ROWS", "COLUMNS", "DEPTH", "STEPS"))
    if launch.kernel.__name__.endswith("backward_kernel"):
        return vectors(launch, rows * depth, itemsize) + vectors(launch, depth * columns, itemsize)
    return 2 * vectors(launch, columns * depth * steps, itemsize)


def matrix_products(launch, architecture):
    """(instruction, how many) of a lane for one step of the summed dimension."""
    a = named(launch)
    name, entries = MATRIX_INSTRUCTIONS[architecture][OPERANDS[a["tile.MODE"]]]
    tiles = a["tile.ROWS"] * a["tile.COLUMNS"] // (32 * 32 * launch.warps)
    return name, PRODUCTS[a["tile.MODE"]] * tiles * a["tile.DEPTH"] * a["tile.STEPS"] // entries


@pytest.mark.parametrize(("name", "architecture"), CASES, ids=[", ".join(case) for case in CASES])
def test_a_kernel_needs_no_memory_for_registers_and_loads_wide(name, architecture):
    launch, code = launches(architecture)[name](), code_of(name, architecture)
    assert code.spills == 0
    # Columns' kernels take the arguments of more layers than a wave's hundred scalar registers hold.
    assert code.scalar_spills <= 16 or "tile" not in launch.arguments
    assert code.shared <= SHARED
    assert code.wide_loads >= wide_loads(launch)
    if "tile" in launch.arguments:
        instruction, count = matrix_products(launch, architecture)
        assert set(code.matrix_products) == {instruction}
        assert code.matrix_products[instruction] >= count
    else:
        assert not code.matrix_products


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_more_layers_than_a_launch_takes_would_spill(architecture):
    launch = grams.launches("gfx942")["gram_backward fp32"]()
    assert len(launch.arguments["layers"].inputs) == 8
    many = grams.launches(90)["gram_backward fp32"]()
    assert len(many.arguments["layers"].inputs) == 32
    tile = launch.arguments["tile"]
    crowded = resources.replace(many, arguments={**many.arguments, "tile": tile}, warps=launch.warps)
    assert compiled(crowded, architecture).scalar_spills > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_too_few_warps_for_a_tile_spill(architecture):
    launch = launches(architecture)["covariance tf32 fp32"]()
    assert compiled(resources.replace(launch, warps=1), architecture).spills > 0


def test_losing_alignment_loses_wide_loads():
    launch = covariances.launches("gfx942")["covariance bf16x3 fp32"]()
    narrow = compiled(resources.without_alignment(launch), "gfx942")
    assert narrow.wide_loads < wide_loads(launch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_precision_has_matrix_instructions(architecture, precision, dtype):
    modes = {product_mode(precision, dtype, centered, architecture) for centered in (True, False)}
    modes |= {gradient_mode(precision, dtype, architecture), gram_mode(dtype, architecture)}
    assert {OPERANDS[mode] for mode in modes} <= set(MATRIX_INSTRUCTIONS[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_architecture_takes_a_mode_that_is_less_exact(architecture):
    exactness = ("bf16", "tf32", "bf16x3", "bf16x4", "ieee")
    for precision in PRECISIONS:
        for mode in (product_mode(precision, torch.float32, True, architecture),
                     gradient_mode(precision, torch.float32, architecture)):  # fmt: skip
            assert exactness.index(mode) >= exactness.index(precision)


def test_rows_of_several_tensors_are_reached_by_pointers_of_64_bits():
    """Not by buffer instructions: their offsets have 32 bits, which is enough within a tensor below 2 GiB alone."""
    for name in ("gram fp32", "gram_backward bf16"):
        launch = grams.launches("gfx942")[name]()
        assert len(launch.arguments["layers"].firsts) == 2
        ttgir = resources.compile_launch(launch, "gfx942").asm["ttgir"]
        assert re.search(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr", ttgir)


def test_the_name_of_the_architecture_is_that_of_the_device(monkeypatch):
    class Properties:
        gcnArchName = "gfx942:sramecc+:xnack-"

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert covariance.architecture_of(torch.device("cuda")) == "gfx942"


def test_register_limits_are_for_nvidia_alone():
    launch = SPECS[0].launch()
    assert isinstance(launch, Launch)
    assert "maxnreg" in launch.options(hip=False)
    assert "maxnreg" not in launch.options(hip=True)
