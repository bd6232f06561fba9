"""How a list of layers is dealt out to launches and programs, from shapes, strides and alignment alone.

A launch takes layers that have the same number of rows and agree on whether 128-bit accesses are possible. How many
programs a layer has, and how its rows are cut, is up to the plans of columns, covariances and Gram matrices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import triton.language as tl
from torch import Tensor

from moment_ops.kernels._records import Layers

# Layers per launch. Kernel arguments are limited to 4 KiB on every driver; a layer takes up to 64 bytes of them.
MAX_LAYERS = 32
# The largest first program; a larger one stands for "no such layer".
_LAST = 2**27 - 1


class Layer(NamedTuple):
    """All that a plan depends on of a layer, whose rows may lie in several tensors."""

    rows: tuple[int, ...]  # of each of them
    shape: tuple[int, ...]  # of a row
    stride: tuple[int, ...]
    aligned: bool  # to 16 bytes, with all that is read or written beside it
    strides: tuple[tuple[int, ...], ...]  # between rows, of every tensor of every list: inputs, outputs, gradients

    @property
    def columns(self) -> int:
        return math.prod(self.shape)


Key = tuple[Layer, ...]


def key(lists: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]] = (), count: int | None = None) -> Key:
    """What plans are remembered by, a layer each.

    Args:
        lists: the layers (rows on dimension 0, dense columns), and lists of tensors with the same columns.
        others: whose alignment matters, too.
        count: of layers, where they have several tensors, all those of the first rows first.
    """
    count = count or len(lists[0])
    return tuple(_layer([x[i::count] for x in lists], [x[i::count] for x in others]) for i in range(count))


def _layer(lists: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> Layer:
    inputs = lists[0]
    return Layer(
        rows=tuple(len(x) for x in inputs),
        shape=tuple(inputs[0].shape[1:]),
        stride=inputs[0].stride(),
        aligned=all(x.data_ptr() % 16 == 0 for tensors in (*lists, *others) for x in tensors),
        # A single row has no stride that matters.
        strides=tuple(
            tuple(y.stride(0) if len(x) > 1 else 0 for x, y in zip(inputs, tensors, strict=True)) for tensors in lists
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """One launch: `layers` are positions in the list; the tuples of integers are padded and sixteenfold."""

    layers: tuple[int, ...]
    rows: int
    parts: int  # tensors of a layer
    programs: int
    vector: int  # columns and strides are in units of so many
    starts: tuple[int, ...]
    columns: tuple[int, ...]
    positions: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # of every list, one for every tensor of every layer
    offsets: tuple[int, ...] | None = None  # of the columns in packed vectors
    inners: tuple[int, ...] | None = None

    def tensors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The launch's tensors out of the whole list's, padded: for every layer, all of its own."""
        count = len(tensors) // self.parts
        chosen = padded([tensors[i::count] for i in self.layers], tensors[::count])
        return tuple(value for values in chosen for value in values)

    def integers(self, values: Sequence[int]) -> tuple[int, ...]:
        """The integers of the layers of the launch, out of those of the whole list, padded and encoded."""
        count = len(values) // self.parts
        return self.nested([values[i::count] for i in self.layers])

    @staticmethod
    def nested(values: Sequence[Sequence[int]], unit: int = 1) -> tuple[int, ...]:
        """Several integers per layer, padded and encoded."""
        chosen = padded([[value // unit for value in of] for of in values], [0] * len(values[0]))
        return encoded([value for of in chosen for value in of])

    def record(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor] | None = None,
        grads: Sequence[Tensor] | None = None,
    ) -> Layers:
        """The layers of the kernels, as all have them: without positions and triangles."""
        return Layers(
            inputs=self.tensors(inputs),
            grads=None if grads is None else self.tensors(grads),
            outputs=None if outputs is None else self.tensors(outputs),
            starts=self.starts,
            columns=self.columns,
            strides=self.strides[0],
            grad_strides=None if grads is None else self.strides[2],
            output_strides=None if outputs is None else self.strides[1],
            offsets=self.offsets,
            inners=self.inners,
            positions=None,
            triangles=None,
            VECTOR=tl.constexpr(self.vector),
        )


G = TypeVar("G")


def deal(
    layers: Key, itemsize: int, lengths: Callable[[int], Sequence[int]], most: int = MAX_LAYERS
) -> Iterator[tuple[int, list[int]]]:
    """(vector, positions) of the layers of each launch.

    Args:
        lengths: of a layer, what wide accesses have to divide besides columns and strides.
        most: layers of a launch.
    """
    wide = 16 // itemsize
    members: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, layer in enumerate(layers):
        strides = [stride for of_list in layer.strides for stride in of_list]
        aligned = layer.aligned and all(length % wide == 0 for length in (layer.columns, *strides, *lengths(i)))
        members.setdefault((layer.rows, wide if aligned else 1), []).append(i)
    for (_, vector), positions in members.items():
        for begin in range(0, len(positions), most):
            yield vector, positions[begin : begin + most]


def group(
    kind: Callable[..., G], layers: Key, vector: int, positions: Sequence[int], counts: Sequence[int], **own: Any
) -> G:
    """The launch of the layers at `positions`, which have so many programs each."""
    chosen = [layers[i] for i in positions]
    rows, programs = sum(chosen[0].rows), sum(counts)
    if programs > _LAST or max(layer.columns for layer in chosen) >= 2**31:
        most = f"{_LAST} programs and layers of 2**31 columns"
        raise ValueError(f"a launch over {rows} rows takes at most {most}, got {programs} programs")
    return kind(
        layers=tuple(positions),
        rows=rows,
        parts=len(chosen[0].rows),
        programs=programs,
        vector=vector,
        starts=first_programs(running(counts)),
        columns=encoded(padded([layer.columns // vector for layer in chosen], 1)),
        positions=encoded(padded(list(positions), 0)),
        strides=tuple(
            Group.nested([layer.strides[i] for layer in chosen], vector) for i in range(len(chosen[0].strides))
        ),
        **own,
    )


def in_units(values: Sequence[int], positions: Sequence[int], vector: int) -> tuple[int, ...]:
    """Numbers of columns, out of the whole list's."""
    return encoded(padded([values[i] // vector for i in positions], 0))


def first_programs(starts: Sequence[int]) -> tuple[int, ...]:
    """Of the layers of a launch, as kernels take them."""
    return encoded(padded(list(starts), _LAST))


def running(counts: Sequence[int]) -> list[int]:
    """The offset of each, if they follow one another."""
    offsets, offset = [], 0
    for count in counts:
        offsets.append(offset)
        offset += count
    return offsets


def encoded(values: Sequence[int]) -> tuple[int, ...]:
    """Sixteenfold: Triton compiles a kernel anew for integers in tuples that are 1, or that 16 divides.

    All of them then fall into one class, and layers of other sizes reuse the compiled kernel.
    """
    return tuple(16 * value for value in values)


def padded(values: list[Any], filler: Any) -> tuple[Any, ...]:
    """Filled up to a power of two, so that networks of 17 and 18 layers share a compiled kernel."""
    size = 1 << (len(values) - 1).bit_length()
    return (*values, *[filler] * (size - len(values)))
