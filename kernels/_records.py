"""What kernels and their device functions are given, grouped by what it is.

Tuples have an entry for each layer of a launch; their integers come sixteenfold (`encoded` in _plan.py says why). None
stands for what is absent. Names in capitals are constants, `tl.constexpr`.

Other integers, and bits of float64, are parameters of their own: in a tuple Triton would compile a kernel for those
that are 1, and for those that 16 divides. Kernels gather them.
"""

from typing import Any, NamedTuple


class Layers(NamedTuple):
    """Layers of a launch, (rows, columns) each."""

    inputs: Any
    grads: Any
    outputs: Any
    starts: Any  # first programs
    columns: Any
    strides: Any
    grad_strides: Any
    output_strides: Any
    offsets: Any  # of the columns in packed vectors
    inners: Any  # columns that a channels-last layer has innermost
    positions: Any  # in the whole list
    triangles: Any  # offsets in packed matrices
    VECTOR: Any  # columns, strides and offsets are that many times as large


class GroupedLayers(NamedTuple):
    """Layers of a launch whose rows lie in several tensors, its groups: tensors and strides, one for each of them."""

    inputs: Any  # (n, D)
    outputs: Any
    shifts: Any  # (D)
    factors: Any  # of the rows, for all layers of the whole list in one tensor
    strides: Any
    output_strides: Any
    wanted: Any  # whether an output is
    starts: Any
    columns: Any
    firsts: Any  # rows of the groups, alike for all layers
    positions: Any
    VECTOR: Any


class Strip(NamedTuple):
    """The columns of a program, of which it has so many rows in registers at a time."""

    PERMUTED: Any  # whether the columns of some layer are channels last
    ROWS: Any
    COLUMNS: Any
    FOLD_CHUNKS: Any  # chunks of rows that are folded at a time


class Tile(NamedTuple):
    """The products of a program, of which it sums STEPS times DEPTH at a time."""

    MODE: Any  # of _products.py
    BF16: Any
    ROWS: Any
    COLUMNS: Any
    DEPTH: Any
    STEPS: Any
    STAGES: Any
    PROMOTED: Any  # entries whose products are summed before they are added to a sum in memory; or 0


class Rows(NamedTuple):
    """All rows, and how they are cut into chunks."""

    rows: Any
    chunk_rows: Any
    chunks: Any
    correction: Any


class Partials(NamedTuple):
    """What programs leave for the one that comes last."""

    partials: Any
    tickets: Any  # int32 zeros


class Shifts(NamedTuple):
    """What is subtracted from features times their scale, and the rest of their mean, (F) each; or None."""

    shift: Any
    rest: Any
    scale: Any  # powers of two
