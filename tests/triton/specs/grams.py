"""The specs of the Gram matrices' kernels."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moment_ops.kernels import gram
from moment_ops.kernels._architectures import Architecture
from moment_ops.kernels._launch import Launch
from specs.covariances import matrix_products, vectors
from specs.resources import ARCHITECTURES, Budget, Spec, named

# Two samples of a network's features; maps of the style loss, one sample a layer.
NETWORK = ((128, 128), (65536,) * 12 + (32768,) * 10 + (2048,) * 10)
STYLE = ((256,), (64 * 64,) * 32)


def _tensors(counts: tuple[int, ...], widths: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(rows, shift), group after group."""
    rows = [torch.empty(n, width, dtype=dtype, device="meta") for n in counts for width in widths]
    return rows, [torch.empty(x.shape[1], device="meta") for x in rows]


def _gram(
    architecture: Architecture, shape: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, which: int
) -> Launch:
    rows, shift = _tensors(*shape, dtype)
    num_layers, total = len(shape[1]), sum(shape[0])
    out = torch.empty(num_layers, total, total, dtype=torch.float64, device="meta")
    return gram.gram_launches(rows, shift, num_layers, out, architecture)[which]


def _backward(architecture: Architecture, shape: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> Launch:
    rows, shift = _tensors(*shape, dtype)
    num_layers, total = len(shape[1]), sum(shape[0])
    factors = torch.empty(num_layers, total, -(-total // 4) * 4, device="meta")
    return gram.backward_launches(factors, rows, shift, [True] * len(rows), rows, architecture)[0]


def _shared(launch: Launch, features: int, sides: int) -> int:
    """All stages of the features, and float32 operands of both sides: two terms of each for tensor cores."""
    arguments = named(launch)
    terms = (2 if arguments["tile.MODE"] == "tf32x3" else 1) * 4 * arguments["tile.DEPTH"] * sides
    return arguments["tile.STAGES"] * features + terms + 1024


def _products_budget(launch: Launch, architecture: int) -> Budget:
    """255 registers: a thread has 32 sums, as many of a step, and 192 operands without tensor cores.

    Features are loaded `stages` times, in the prologue and in the loop, in 128 bits, as are the sums over blocks.
    """
    arguments = named(launch)
    tile, itemsize = arguments["tile.COLUMNS"], arguments["layers.inputs"][0].element_size()
    depth = arguments["tile.DEPTH"] * arguments["tile.STEPS"]
    features = vectors(launch, depth * tile, itemsize)
    sums = vectors(launch, tile * tile, 8)
    return Budget(
        registers=255,
        shared=_shared(launch, 2 * depth * tile * itemsize, 2 * tile),
        wide_loads=2 * arguments["tile.STAGES"] * features + sums,
        wide_stores=sums,
        narrow_stores=0,
        matrix_products=matrix_products(launch, architecture, tile, tile),
    )


def _fold_budget(launch: Launch, architecture: int) -> Budget:
    """A few chunks on their way: 64 registers of values, and 64 of addresses and sums.

    A matrix has any number of rows, so that its rows are written in single entries, in both triangles.
    """
    arguments = named(launch)
    entries = arguments["PART"] ** 2
    return Budget(
        registers=128,
        shared=8 * entries,
        wide_loads=arguments["CHUNKS"] * vectors(launch, entries, 8),
        narrow_loads=0,
        narrow_stores=2 * entries // (32 * launch.warps),
    )


def _backward_budget(launch: Launch, architecture: int) -> Budget:
    """255 registers, as above; factors and features are loaded `stages` times in 128 bits, and gradients written so."""
    arguments = named(launch)
    rows, columns, depth = (arguments[f"tile.{name}"] for name in ("ROWS", "COLUMNS", "DEPTH"))
    itemsize = arguments["layers.inputs"][0].element_size()
    loads = vectors(launch, depth * rows, 4) + vectors(launch, depth * columns, itemsize)
    return Budget(
        registers=255,
        shared=_shared(launch, depth * (4 * rows + itemsize * columns), rows + columns),
        wide_loads=arguments["tile.STAGES"] * loads,
        wide_stores=vectors(launch, rows * columns, itemsize),
        narrow_stores=0,
        matrix_products=matrix_products(launch, architecture, rows, columns),
    )


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

_CASES = (
    (ARCHITECTURES, "gram fp32", _gram, (NETWORK, F32, 0), _products_budget),
    (ARCHITECTURES, "gram bf16", _gram, (NETWORK, BF16, 0), _products_budget),
    ((90,), "gram fp32, style", _gram, (STYLE, F32, 0), _products_budget),
    (ARCHITECTURES, "gram, sums", _gram, (NETWORK, F32, 1), _fold_budget),
    (ARCHITECTURES, "gram_backward fp32", _backward, (NETWORK, F32), _backward_budget),
    (ARCHITECTURES, "gram_backward bf16", _backward, (NETWORK, BF16), _backward_budget),
    ((90,), "gram_backward fp32, style", _backward, (STYLE, F32), _backward_budget),
    ((90,), "gram_backward fp16, style", _backward, (STYLE, F16), _backward_budget),
)

GRAM_SPECS = tuple(
    Spec(
        name,
        functools.partial(build, architecture, *arguments),
        functools.partial(budget, architecture=architecture),
        (architecture,),
    )
    for architectures, name, build, arguments, budget in _CASES
    for architecture in architectures
)


def launches(architecture: Architecture) -> dict[str, Callable[[], Launch]]:
    """What the specs launch, by name, on any architecture."""
    return {name: functools.partial(build, architecture, *arguments) for _, name, build, arguments, _ in _CASES}
