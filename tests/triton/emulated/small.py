"""The smallest shapes that take the specialisations of the specs.

What is compiled for a spec is decided by its launch's constants. Cases are made of what can be read from that launch,
smallest first, with the planners' constants changed where they have to be; the first whose launch has the same
constants is the spec's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from specs.resources import Spec, is_record, named
from torch import Tensor

from emulated import columns, products
from emulated.cases import Case, Plan, always, planned
from moment_ops.kernels._launch import Launch
from moment_ops.kernels._tiles import StripTile
from moment_ops.ops.averages import AVERAGES


@dataclass(frozen=True)
class Small:
    """A case, what the planners have otherwise, and which of its launches is the spec's."""

    make: Callable[[], Case]
    plan: Plan
    index: int = 0


def architecture_of(spec: Spec) -> int:
    """What a spec's small launch is compiled for: sm_80, but for tiles that other architectures have.

    The emulator knows the tensor cores of sm_80 and sm_90. Tiles of sm_100 are compiled for sm_90.
    """
    return min(90, *spec.architectures) if "tile" in spec.launch().arguments else 80


def constants(launch: Launch) -> dict[str, Any]:
    """What is known when a launch is compiled, alignment aside: constants, dtypes, and which arguments are absent."""
    parameters = {p.name for p in launch.kernel.params if p.is_constexpr}
    known = {
        name: _kind(value, name in parameters or name.rpartition(".")[2].isupper())
        for name, value in named(launch).items()
        if not is_record(value)
    }
    return {**known, "kernel": launch.kernel, "warps": launch.warps, "registers": launch.registers}


def _kind(value: Any, constant: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_kind(part, constant) for part in value)
    if isinstance(value, Tensor):
        return value.dtype
    return value if constant or value is None else type(value).__name__


def small(spec: Spec) -> Small:
    """The smallest case that takes a spec's specialisation."""
    launch = spec.launch()
    name = launch.kernel.__name__
    if name not in _CANDIDATES:
        raise LookupError(f"{name} has no small shape: add one for {spec.name} to {__name__}")
    wanted = constants(launch)
    closest: dict[str, Any] = {}
    for candidate in _CANDIDATES[name](launch):
        with planned(candidate.plan):
            got = constants(candidate.make().launches(spec.architectures[0])[candidate.index])
        if got == wanted:
            return candidate
        different = {key: (got.get(key), value) for key, value in wanted.items() if got.get(key) != value}
        closest = different if not closest or len(different) < len(closest) else closest
    raise LookupError(f"no small shape of {spec.name} has its constants; the closest differs in {closest}")


def _layers(launch: Launch) -> list[tuple[int, ...]]:
    """So many that the launch has as many; with a tail of columns, and one layer of two strips."""
    arguments = named(launch)
    layers = len(arguments["layers.inputs"])
    count = layers // 2 + 1 if layers > 1 else 1
    vector, tile = arguments["layers.VECTOR"], arguments["strip.COLUMNS"]
    narrow = vector if vector > 1 else 3
    if arguments["strip.PERMUTED"]:
        return [(narrow, 2, 2)] * count
    return [(narrow,)] * (count - 1) + [(tile + narrow,)]


def _rows(launch: Launch) -> tuple[int, int]:
    """(rows, of a chunk): three tiles, of which the last is a tail; or chunks of two, and of one and the tail.

    The degrees of freedom are no power of two, by which a division would be exact.
    """
    arguments = named(launch)
    tile = arguments["strip.ROWS"]
    # A pass over features leaves no partial results, and is cut all the same.
    cut = "partials" not in arguments or arguments["partials"] is not None
    return (3 * tile + 3, 2 * tile) if cut else (2 * tile + 3, 2 * tile + 3)


def _of_columns(make: Callable[[Launch, int, list[tuple[int, ...]], str], Case]) -> Callable[[Launch], Iterator[Small]]:
    """With the tile of the launch, and its rows cut where the launch's are."""

    def candidates(launch: Launch) -> Iterator[Small]:
        arguments = named(launch)
        layout = "channels last" if arguments["strip.PERMUTED"] else "contiguous"
        tile = StripTile(arguments["strip.ROWS"], arguments["strip.COLUMNS"], launch.warps)
        rows, chunk = _rows(launch)
        plan = {"_column_plan._tile": always(tile), "_column_plan._chunk_rows": always(chunk)}
        yield Small(lambda: make(launch, rows, _layers(launch), layout), plan)

    return candidates


def _dtype(launch: Launch) -> torch.dtype:
    return launch.arguments["layers"].inputs[0].dtype


def _present(launch: Launch, *names: str) -> list[bool]:
    return [named(launch)[name] is not None for name in names]


def _moments(launch: Launch, rows: int, shapes: list[tuple[int, ...]], layout: str) -> Case:
    return columns.Moments(rows, shapes, _dtype(launch), layout, *_present(launch, "var_out"))


def _shifts(launch: Launch, rows: int, shapes: list[tuple[int, ...]], layout: str) -> Case:
    return columns.Shifts(rows, shapes, _dtype(launch), layout)


def _moments_backward(launch: Launch, rows: int, shapes: list[tuple[int, ...]], layout: str) -> Case:
    parts = _present(launch, "grad_mean", "grad_var", "layers.grads", "scale")
    if named(launch)["RECTIFIED"]:
        mean, var, grad, _ = parts
        return columns.ReluMomentsBackward(rows, shapes[-1], _dtype(launch), layout, grad, mean, var)
    return columns.MomentsBackward(rows, shapes, _dtype(launch), layout, *parts)


def _relu_moments(launch: Launch, rows: int, shapes: list[tuple[int, ...]], layout: str) -> Case:
    return columns.ReluMoments(rows, shapes[-1], _dtype(launch), layout, *_present(launch, "bias"))


_AVERAGES = {kind.number: name for name, kind in AVERAGES.items()}


def _average(launch: Launch) -> str:
    return _AVERAGES[named(launch)["average.KIND"]]


def _match_features(launch: Launch, rows: int, shapes: list[tuple[int, ...]], layout: str) -> Case:
    arguments = named(launch)
    update = arguments["average.UPDATE"]
    weighted, var = _present(launch, "vectors.mean.weight", "vectors.var.target")
    average_kind = _average(launch)
    return columns.MatchFeatures(
        rows, shapes, _dtype(launch), average_kind, layout, update or average_kind == "none", weighted, var
    )


def _match(launch: Launch) -> Iterator[Small]:
    arguments = named(launch)
    weighted, var = _present(launch, "vectors.mean.weight", "vectors.var.target")
    average_kind, update = _average(launch), arguments["average.UPDATE"]
    # Two programs, the second with a tail of a multiple of 16.
    count = arguments["COLUMNS"] + 16
    dtype = arguments["mean"].dtype
    yield Small(lambda: columns.Match(count, dtype, average_kind, update or average_kind == "none", weighted, var), {})


_PRECISIONS = ("ieee", "bf16x3", "tf32", "bf16")
# Two blocks of a triangle, and a tail; four bytes less are not aligned.
_WIDTH = 136


def _with_tiles(size: int, plan: Plan) -> dict[str, Any]:
    """Large tiles are those that fill a GPU, of one processor; small ones leave some of many idle."""
    return {**plan, "_tiles.processors": always(1 if size >= 128 else 10**6)}


def _of_triangles(make: Callable[[Launch, int, str], Case]) -> Callable[[Launch], Iterator[Small]]:
    """Whole, or in chunks of rows; and as if they were so many that blocks of them are promoted."""

    def candidates(launch: Launch) -> Iterator[Small]:
        arguments = named(launch)
        rows, chunk = (40, 40) if arguments["partials"] is None else (70, 64)
        plan = _with_tiles(arguments["tile.COLUMNS"], {"_covariance_plan._chunk_rows": always(chunk)})
        if arguments["tile.PROMOTED"]:
            plan["_covariance_plan.PROMOTED_ROWS"] = 0
        for precision in _PRECISIONS:
            yield Small(lambda precision=precision: make(launch, rows, precision), plan, -1)

    return candidates


def _width(launch: Launch) -> int:
    return _WIDTH if named(launch)["layers.VECTOR"] > 1 else _WIDTH - 1


def _covariance(launch: Launch, rows: int, precision: str) -> Case:
    (centered,) = _present(launch, "shifts")
    return products.Covariance(rows, _width(launch), _dtype(launch), precision, centered=centered)


def _covariance_match(launch: Launch, rows: int, precision: str) -> Case:
    arguments = named(launch)
    widths = [_width(launch), *[8] * (len(arguments["layers.inputs"]) // 2)]
    average_kind = _average(launch)
    return products.CovarianceMatch(
        rows, widths, _dtype(launch), precision, average_kind,
        update=arguments["average.UPDATE"] or average_kind == "none", keep=arguments["vectors.grad"] is not None,
    )  # fmt: skip


def _covariance_backward(launch: Launch) -> Iterator[Small]:
    arguments = named(launch)
    dtype = _dtype(launch)
    mean, scaled = _present(launch, "grad_mean", "scale")
    width = _width(launch)
    for precision in _PRECISIONS:

        def make(precision: str = precision) -> Case:
            if not arguments["PACKED"]:
                return products.CovarianceBackward(
                    70, width, dtype, precision, "contiguous", arguments["mean"] is not None, mean
                )
            widths = [width, *[8] * (len(arguments["layers.inputs"]) // 2)]
            return products.CovarianceMatchBackward(70, widths, dtype, precision, "contiguous", mean, scaled)

        yield Small(make, _with_tiles(arguments["tile.ROWS"], {}))


def _gram_shape(launch: Launch) -> tuple[list[int], list[int]]:
    """(rows of the groups, widths): more than a tile of rows, and a tail of columns."""
    arguments = named(launch)
    groups, layers = len(arguments["layers.firsts"]), len(arguments["layers.starts"])
    vector = arguments["layers.VECTOR"]
    width = 40 if vector > 1 else 37
    return [66, *[3] * (groups - 1)], [width, *[vector if vector > 1 else 3] * (layers // 2)]


def _gram(launch: Launch) -> Iterator[Small]:
    yield Small(lambda: products.Gram(*_gram_shape(launch), _dtype(launch)), {})


def _gram_fold(launch: Launch) -> Iterator[Small]:
    layers = len(launch.arguments["sums"].starts)
    for dtype in (torch.float32, torch.bfloat16):
        yield Small(lambda dtype=dtype: products.Gram([66], [8] * (layers // 2 + 1), dtype), {}, 1)


def _gram_backward(launch: Launch) -> Iterator[Small]:
    yield Small(lambda: products.GramBackward(*_gram_shape(launch), _dtype(launch)), {})


_CANDIDATES: dict[str, Callable[[Launch], Iterator[Small]]] = {
    "moments_kernel": _of_columns(_moments),
    "shifts_kernel": _of_columns(_shifts),
    "moments_backward_kernel": _of_columns(_moments_backward),
    "relu_moments_kernel": _of_columns(_relu_moments),
    "match_kernel": _match,
    "match_features_kernel": _of_columns(_match_features),
    "covariance_kernel": _of_triangles(_covariance),
    "covariance_match_kernel": _of_triangles(_covariance_match),
    "covariance_backward_kernel": _covariance_backward,
    "gram_kernel": _gram,
    "gram_fold_kernel": _gram_fold,
    "gram_backward_kernel": _gram_backward,
}
