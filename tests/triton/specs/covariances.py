"""The specs of the covariances' kernels: tiles differ between architectures, and so do their launches."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moment_ops.kernels import covariance, covariance_backward, covariance_match
from moment_ops.kernels._architectures import Architecture
from moment_ops.kernels._launch import Launch
from moment_ops.ops import triangle
from moment_ops.ops.averages import AVERAGES
from moment_ops.ops.records import CovarianceMatch
from specs.resources import ARCHITECTURES, Budget, Spec, named

# The pooled features of a classifier; layers wide enough for one program a tile; a data set.
CLASSIFIER = (1024, 2048)
WIDE = (1024, 4096)
DATA_SET = (100_000, 8192)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _covariance(architecture: Architecture, shape: tuple[int, int], dtype: torch.dtype, precision: str) -> Launch:
    x, width = _empty(*shape, dtype=dtype), shape[1]
    return covariance.covariance_launches(
        x, 1, True, precision, _empty(width, width), _empty(width), architecture
    )[-1]  # fmt: skip


def _shifts(architecture: Architecture, shape: tuple[int, int], dtype: torch.dtype) -> Launch:
    return covariance.shifts_launches(
        [_empty(*shape, dtype=dtype)], _empty(shape[1]), covariance.shifts_of(_empty(shape[1]))
    )[0]


def _match(
    architecture: Architecture,
    shape: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    average_kind: str,
    packed: bool,
) -> Launch:
    rows, width = shape
    features = [_empty(rows, width, dtype=dtype) for _ in range(2)]
    size = triangle.total_size([width, width])
    kind = AVERAGES[average_kind]
    state = [_empty(size) for _ in kind.vectors]
    if kind.has_started:
        state.append(_empty(size, dtype=torch.bool))
    if state:
        state.append(_empty(dtype=torch.int64))
    target = _empty(size // 2) if packed else _empty(width, width)
    options = [0.5] * len(kind.options)
    match = CovarianceMatch([target] * 2, [1.0, 1.0], average_kind, options, state, bool(state), True, precision)
    grad = _empty(size)
    return covariance_match.covariance_match_launches(
        features, 1, match, _empty(), _empty(2 * width), grad, architecture
    )[-1]


def _backward(
    architecture: Architecture, shape: tuple[int, int], dtype: torch.dtype, precision: str, packed: bool
) -> Launch:
    width = shape[1]
    x, out = (_empty(*shape, dtype=dtype) for _ in range(2))
    grad = _empty(triangle.size(width)) if packed else _empty(width, width)
    mean = _empty(width)
    return covariance_backward.backward_launches(
        grad, mean, [x], mean, None, 1, True, precision, [out], architecture
    )[0]  # fmt: skip


_PRODUCTS = {"ieee": 0, "tf32": 1, "bf16": 1, "tf32x3": 3, "bf16x3": 3, "bf16x4": 4}


def matrix_products(launch: Launch, architecture: int, rows: int, columns: int) -> int:
    """Instructions of tensor cores for one step: 16 x 8 sums of a warp (sm_80), 64 rows of a warp group (sm_90)."""
    mode, depth = (named(launch)[f"tile.{name}"] for name in ("MODE", "DEPTH"))
    steps = depth // (8 if mode.startswith("tf32") else 16) * _PRODUCTS[mode]
    if architecture < 90:
        return steps * rows * columns // (16 * 8 * launch.warps)
    return steps * max(1, rows // (16 * launch.warps))


def vectors(launch: Launch, entries: int, itemsize: int) -> int:
    """128-bit accesses of a thread to so many entries."""
    return max(1, entries * itemsize // (16 * 32 * launch.warps))


def _products_budget(launch: Launch, architecture: int, operands: tuple[tuple[int, int], ...]) -> tuple[int, int, int]:
    """(shared, wide loads, matrix products) of what fills the registers: the loop over the summed dimension.

    operands: (columns, itemsize) of both. They are loaded `stages` times, in the prologue and in the loop, in 128 bits;
    so many of them are in shared memory, with their terms for the tensor cores besides. A tile of sums goes through
    the same memory, in an order that makes its accesses wide.
    """
    arguments = named(launch)
    depth = arguments["tile.DEPTH"] * arguments["tile.STEPS"]
    loads = sum(vectors(launch, depth * size, itemsize) for size, itemsize in operands)
    features = sum(depth * size * itemsize for size, itemsize in operands)
    term = 4 if arguments["tile.MODE"].startswith("tf32") else 2
    terms = (2 if "x" in arguments["tile.MODE"] else 1) * term * depth * sum(size for size, _ in operands)
    rows, columns = (size for size, _ in operands)
    shared = max(arguments["tile.STAGES"] * features + terms, 4 * rows * columns) + 1024
    return shared, arguments["tile.STAGES"] * loads, matrix_products(launch, architecture, rows, columns)


def _triangle_budget(architecture: int) -> Callable[[Launch], Budget]:
    """Budget of a kernel over tiles of a triangle: 255 registers, a thread has 64 sums and 64 of a step."""

    def budget(launch: Launch) -> Budget:
        arguments = named(launch)
        tile = arguments["tile.COLUMNS"]
        itemsize = arguments["layers.inputs"][0].element_size()
        shared, loads, products = _products_budget(launch, architecture, ((tile, itemsize), (tile, itemsize)))
        whole = vectors(launch, tile * tile, 4)
        cut = arguments["partials"] is not None
        # A matrix has each tile twice; a match has the derivative and the average with what ADAM needs.
        written = 2 if "cov" in arguments else 1 + len(arguments["vectors.averages"])
        moving = arguments.get("average.started") is not None
        return Budget(
            registers=255,
            shared=shared,
            wide_loads=loads,
            # A quarter of a tile at a time is folded, after all of it has been stored.
            wide_stores=(written * whole // 4 + whole) if cut else written * whole,
            # The share of the loss, the loss and the step.
            narrow_stores=None if moving else 0 if "cov" in arguments else 3,
            matrix_products=products,
        )

    return budget


def _gradient_budget(architecture: int) -> Callable[[Launch], Budget]:
    """Budget of the backward: features and a matrix in float32, from both sides of its diagonal."""

    def budget(launch: Launch) -> Budget:
        arguments = named(launch)
        rows, columns = arguments["tile.ROWS"], arguments["tile.COLUMNS"]
        itemsize = arguments["layers.inputs"][0].element_size()
        matrix = 4 if arguments["PACKED"] else 8
        shared, loads, products = _products_budget(launch, architecture, ((rows, itemsize), (columns, matrix)))
        sides = 2 if arguments["PACKED"] else 1
        return Budget(
            registers=255,
            shared=shared,
            wide_loads=sides * loads,
            wide_stores=vectors(launch, rows * columns, itemsize),
            # An eighth of the tile at a time is summed again where it had no room.
            narrow_stores=rows * columns // 8 // (32 * launch.warps),
            matrix_products=sides * products,
        )

    return budget


def _shifts_budget(architecture: int) -> Callable[[Launch], Budget]:
    """Budget of the means: features in 128 bits in three places, the first tile, the loop and the tail."""

    def budget(launch: Launch) -> Budget:
        arguments = named(launch)
        itemsize = arguments["layers.inputs"][0].element_size()
        columns = arguments["strip.COLUMNS"]
        return Budget(
            registers=launch.registers or 0,
            shared=8 * columns * (launch.warps if columns < 128 else 1),
            wide_loads=3 * vectors(launch, arguments["strip.ROWS"] * columns, itemsize),
        )

    return budget


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

_CASES: tuple[tuple[tuple[int, ...], str, Callable[..., Launch], tuple[Any, ...], Callable[..., Any]], ...] = (
    (ARCHITECTURES, "covariance shifts bf16", _shifts, (CLASSIFIER, BF16), _shifts_budget),
    ((90,), "covariance shifts fp32", _shifts, (DATA_SET, F32), _shifts_budget),
    (ARCHITECTURES, "covariance ieee bf16", _covariance, (CLASSIFIER, BF16, "ieee"), _triangle_budget),
    (ARCHITECTURES, "covariance ieee fp16", _covariance, (CLASSIFIER, F16, "ieee"), _triangle_budget),
    (ARCHITECTURES, "covariance bf16x3 fp32", _covariance, (CLASSIFIER, F32, "bf16x3"), _triangle_budget),
    (ARCHITECTURES, "covariance ieee fp32", _covariance, (CLASSIFIER, F32, "ieee"), _triangle_budget),
    ((90,), "covariance tf32 fp32", _covariance, (CLASSIFIER, F32, "tf32"), _triangle_budget),
    ((90,), "covariance bf16 bf16", _covariance, (WIDE, BF16, "bf16"), _triangle_budget),
    ((80, 90), "covariance bf16x3 fp32, data set", _covariance, (DATA_SET, F32, "bf16x3"), _triangle_budget),
    (ARCHITECTURES, "covariance_match_ ADAM ieee bf16", _match, (WIDE, BF16, "ieee", "adam", True),
     _triangle_budget),
    (ARCHITECTURES, "covariance_match_ ADAM bf16x3 fp32", _match, (WIDE, F32, "bf16x3", "adam", True),
     _triangle_budget),
    ((90,), "covariance_match_ ADAM ieee fp32", _match, (WIDE, F32, "ieee", "adam", True), _triangle_budget),
    ((90,), "covariance_match_ none bf16", _match, (WIDE, BF16, "bf16", "none", False), _triangle_budget),
    ((90,), "covariance_match_ moving bf16, chunks", _match, ((1024, 512), BF16, "bf16", "moving", True),
     _triangle_budget),
    (ARCHITECTURES, "covariance_match_backward bf16x3 fp32", _backward, (WIDE, F32, "bf16x3", True),
     _gradient_budget),
    (ARCHITECTURES, "covariance_match_backward ieee bf16", _backward, (WIDE, BF16, "ieee", True),
     _gradient_budget),
    ((90,), "covariance_match_backward ieee fp32", _backward, (WIDE, F32, "ieee", True), _gradient_budget),
    ((90,), "covariance_match_backward bf16, few rows", _backward, ((64, 2048), BF16, "bf16", True),
     _gradient_budget),
    ((90,), "covariance_backward tf32 fp32", _backward, (WIDE, F32, "tf32", False), _gradient_budget),
)  # fmt: skip

COVARIANCE_SPECS = tuple(
    Spec(name, functools.partial(build, architecture, *arguments), budget(architecture), (architecture,))
    for architectures, name, build, arguments, budget in _CASES
    for architecture in architectures
)


def launches(architecture: Architecture) -> dict[str, Callable[[], Launch]]:
    """What the specs launch, by name, on any architecture."""
    return {name: functools.partial(build, architecture, *arguments) for _, name, build, arguments, _ in _CASES}
