"""The specs of the kernels over columns."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moment_ops.kernels import _tiles, match, moments, relu_moments
from moment_ops.kernels._launch import Launch
from moment_ops.ops.averages import AVERAGES
from moment_ops.ops.records import Match
from specs.resources import ARCHITECTURES, Budget, Spec, named

# A network of 32 layers, as GFMN's; a tall matrix of many strips; tokens of a few features.
NETWORK = ((64, 65536),) * 12 + ((64, 512, 8, 8),) * 10 + ((64, 2048),) * 10
TALL = ((200_000, 65536),) * 2
TOKENS = ((100_000, 64),)
# An activation of a convolution, and one of a batch that takes several blocks of rows per program.
ACTIVATION = (64, 64, 32, 32)
LARGE_BATCH = (8192, 64, 56, 56)
ODD = ((64, 999), (64, 10_001))


def _empty(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, channels_last: bool = False) -> list[Tensor]:
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    if channels_last:
        tensors = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in tensors]
    return tensors


def _vector(features: Sequence[Tensor]) -> Tensor:
    """A packed vector of the layers."""
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    return torch.empty(sum(x[0].numel() for x in features), dtype=dtype, device="meta")


def _moments(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, channels_last: bool = False) -> Launch:
    features = _empty(shapes, dtype, channels_last)
    return moments.moments_launches(features, 1, _vector(features), _vector(features))[0]


def _backward(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, added: bool = False) -> Launch:
    features = _empty(shapes, dtype)
    grad_mean, grad_var, mean = (_vector(features) for _ in range(3))
    count = torch.empty(len(features), dtype=torch.int64, device="meta")
    grad = _empty(shapes, dtype) if added else []
    out, scale = _empty(shapes, dtype), mean.new_empty(())
    return moments.backward_launches(grad, grad_mean, grad_var, features, mean, count, 1, scale, out)[0]


def _tap(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Launch:
    (x,) = features = _empty([shape], dtype, channels_last)
    bias = torch.empty(shape[1], dtype=dtype, device="meta")
    return relu_moments.relu_moments_launches(x, bias, 1, torch.empty_like(x), _vector(features), _vector(features))[0]


def _tap_backward(shape: tuple[int, ...], dtype: torch.dtype) -> Launch:
    (y,) = features = _empty([shape], dtype)
    grad_mean, grad_var, mean = (_vector(features) for _ in range(3))
    grad, out = torch.empty_like(y), torch.empty_like(y)
    return relu_moments.relu_moments_backward_launches(grad, grad_mean, grad_var, y, mean, 1, out)[0]


def _options(average_kind: str) -> list[float]:
    return [0.5] * len(AVERAGES[average_kind].options)


def _matching(packed: Tensor, average_kind: str) -> tuple[Match, Tensor, Tensor]:
    """A match with variances and an average, without weights, and its gradients."""
    kind = AVERAGES[average_kind]
    state = [torch.empty_like(packed) for _ in range(2 * len(kind.vectors))]
    if kind.has_started:
        state.append(torch.empty_like(packed, dtype=torch.bool))
    if state:
        state.append(torch.empty((), dtype=torch.int64, device="meta"))
    target_mean, target_var, grad_mean, grad_var = (torch.empty_like(packed) for _ in range(4))
    matching = Match(
        target_mean,
        target_var,
        average_kind=average_kind,
        options=_options(average_kind),
        state=state,
        update=bool(state),
    )
    return matching, grad_mean, grad_var


def _match_features(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, average_kind: str) -> Launch:
    features = _empty(shapes, dtype)
    packed = _vector(features)
    matching, *grads = _matching(packed, average_kind)
    return match.match_features_launches(features, 1, matching, packed.new_empty(()), packed, *grads)[0]


def _match(dtype: torch.dtype, average_kind: str) -> Launch:
    packed = torch.empty(851_968, dtype=dtype, device="meta")
    matching, *grads = _matching(packed, average_kind)
    return match.match_launches(packed, torch.empty_like(packed), matching, packed.new_empty(()), *grads)[0]


# Little's law: bytes in flight on a processor are bandwidth times latency, over the number of processors. With 0.65
# microseconds from a load to its use these are 12 KiB on an A100 (2.0 TB/s, 108), 16 on an H100 (3.35 TB/s, 132), 23 on
# an H200 (4.8 TB/s) and 34 on a B200 (8 TB/s, 148).
_IN_FLIGHT = 40 * 1024
# Where half of what moves is stored, half of that would do.
_IN_FLIGHT_WITH_STORES = 32 * 1024


# Narrow loads, of a tap's biases besides, where features are read again whose moments had no room: a loop that the
# assembler unrolls, by 4, 2 and 1.
READ_AGAIN = 8


def _thread_rows(launch: Launch, itemsize: int) -> int:
    """128-bit accesses that a thread makes for a tile."""
    arguments = named(launch)
    return arguments["strip.ROWS"] * arguments["strip.COLUMNS"] * itemsize // (16 * 32 * launch.warps)


def _column_shared(launch: Launch, size: int) -> int:
    """A number for every lane: vectors of a narrow strip are spread over the lanes, which are folded at the end."""
    return size * _tiles.STRIP_BYTES // launch.arguments["layers"].inputs[0].element_size()


def reduces(wide: bool = True) -> Callable[[Launch], Budget]:
    """Budget of a kernel that reduces over rows.

    128 registers leave room for 512 threads. With a tile of eight rows each keeps 128 bytes in flight, 64 KiB together;
    with the four rows of a tap of 16 bits 32 KiB. Features are loaded in three places, the first tile, the loop and the
    tail, always in 128 bits, and a tap stores as often. What is narrower are the vectors of narrow strips, scalars, a
    tap's biases, one for each lane of a thread's, and what is read again.
    """

    def budget(launch: Launch) -> Budget:
        arguments = named(launch)
        itemsize = arguments["layers.inputs"][0].element_size()
        columns_per_thread = arguments["strip.COLUMNS"] // (32 * launch.warps)
        accesses = 3 * _thread_rows(launch, itemsize)
        # Of means and variances.
        vectors_are_wide = columns_per_thread * max(4, itemsize) >= 16 and not arguments["strip.PERMUTED"]
        tap = arguments["layers.outputs"] is not None
        biases = 16 // itemsize
        # The step read for the bias and for its increment, the share of the loss, loss and step written.
        scalars = 3 if "loss" in arguments else 0
        return Budget(
            registers=_tiles.REDUCTION_REGISTERS,
            # What is read again is summed in float64.
            shared=_column_shared(launch, 8),
            wide_loads=accesses if wide else 0,
            narrow_loads=READ_AGAIN + scalars + (biases if tap else 0) if wide and (vectors_are_wide or tap) else None,
            wide_stores=(2 if wide and vectors_are_wide else 0) + (accesses if wide and tap else 0),
            narrow_stores=scalars if wide and vectors_are_wide and "average" not in arguments else None,
            processor_in_flight=_IN_FLIGHT_WITH_STORES if tap and itemsize == 2 else _IN_FLIGHT,
        )

    return budget


def applies(launch: Launch) -> Budget:
    """Budget of a kernel that passes over features: reads, and writes as often; rows of a strip share coefficients.

    Four rows of 128-bit loads, and as many of added gradients: 640 threads have 40 KiB in flight, 384 of these 48 KiB.
    A tile is loaded in the loop for the next iteration, and one before it, together with the coefficients. Narrow are
    the layer's count and the scale.
    """
    arguments = named(launch)
    accesses = _thread_rows(launch, arguments["layers.inputs"][0].element_size())
    streams = 2 if arguments["layers.grads"] is not None else 1
    return Budget(
        registers=_tiles.PASS_REGISTERS if streams == 1 else _tiles.ADDED_PASS_REGISTERS,
        shared=_column_shared(launch, 4),
        wide_loads=2 * streams * accesses + 3,
        narrow_loads=2,
        wide_stores=accesses,
        narrow_stores=0,
        processor_in_flight=_IN_FLIGHT,
        # One more where the layer's count is late.
        round_trips=2,
    )


def matches(launch: Launch) -> Budget:
    """Budget of the elementwise match: every vector in 128 bits, 5 read and 4 written per quantity with ADAM.

    Round trips: the moments, with the vectors of the mean; those of the variance; the losses of all programs; the step.
    """
    moving = launch.arguments["average"].started is not None
    state = 1 if moving else 3
    return Budget(
        registers=64,
        # The sum of the loss over warps.
        shared=8 * 32,
        wide_loads=2 * (2 + state),
        narrow_loads=None if moving else 3,
        wide_stores=2 * (1 + state),
        narrow_stores=None if moving else 3,
        processor_in_flight=_IN_FLIGHT_WITH_STORES,
        # One more for the columns that have started, and one for the step where the bias is corrected: compilers move
        # its load into the branch.
        round_trips=6 if moving else 4,
    )


F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

# What a training step of GFMN launches is compiled for all architectures, the rest for one.
COLUMN_SPECS = tuple(
    Spec(name, functools.partial(build, *arguments), budget, architectures)
    for architectures, name, build, arguments, budget in (
        (ARCHITECTURES, "moments fp32", _moments, (NETWORK, F32), reduces()),
        (ARCHITECTURES, "moments bf16", _moments, (NETWORK, BF16), reduces()),
        ((90,), "moments fp64", _moments, (NETWORK, F64), reduces()),
        ((90,), "moments bf16, channels last", _moments, (NETWORK, BF16, True), reduces()),
        ((90,), "moments fp32, tall", _moments, (TALL, F32), reduces()),
        (ARCHITECTURES, "moments bf16, tall", _moments, (TALL, BF16), reduces()),
        ((90,), "moments bf16, tokens", _moments, (TOKENS, BF16), reduces()),
        ((90,), "moments fp32, unaligned", _moments, (ODD, F32), reduces(wide=False)),
        (ARCHITECTURES, "relu_moments fp32", _tap, (ACTIVATION, F32), reduces()),
        (ARCHITECTURES, "relu_moments bf16", _tap, (ACTIVATION, BF16), reduces()),
        ((90,), "relu_moments bf16, channels last", _tap, (ACTIVATION, BF16, True), reduces()),
        (ARCHITECTURES, "relu_moments bf16, tall", _tap, (LARGE_BATCH, BF16), reduces()),
        ((90,), "relu_moments fp32, tall", _tap, (LARGE_BATCH, F32), reduces()),
        ((90,), "relu_moments fp16, few columns", _tap, ((64, 512, 2, 2), F16), reduces()),
        ((90,), "relu_moments fp32, unaligned", _tap, ((64, 9, 333), F32), reduces(wide=False)),
        (ARCHITECTURES, "relu_moments_backward fp32", _tap_backward, (ACTIVATION, F32), applies),
        (ARCHITECTURES, "relu_moments_backward bf16", _tap_backward, (ACTIVATION, BF16), applies),
        (ARCHITECTURES, "moments_backward fp32", _backward, (NETWORK, F32), applies),
        (ARCHITECTURES, "moments_backward bf16", _backward, (NETWORK, BF16), applies),
        ((90,), "moments_backward fp32, grad added", _backward, (NETWORK, F32, True), applies),
        ((90,), "moments_backward bf16, grad added", _backward, (NETWORK, BF16, True), applies),
        ((90,), "moments_backward fp16, tokens", _backward, (TOKENS, F16), applies),
        ((90,), "match_ ADAM fp32", _match, (F32, "adam"), matches),
        ((90,), "match_ moving fp64", _match, (F64, "moving"), matches),
        (ARCHITECTURES, "match_ of features, ADAM fp32", _match_features, (NETWORK, F32, "adam"), reduces()),
        (ARCHITECTURES, "match_ of features, ADAM bf16", _match_features, (NETWORK, BF16, "adam"), reduces()),
        ((90,), "match_ of features, ADAM bf16, tall", _match_features, (TALL, BF16, "adam"), reduces()),
        ((90,), "match_ of features, moving fp32", _match_features, (NETWORK, F32, "moving"), reduces()),
        ((90,), "match_ of features, none fp16", _match_features, (NETWORK, F16, "none"), reduces()),
    )
)
