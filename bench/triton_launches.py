"""What calls of Triton's kernels cost the host, without a GPU: launches of a step, and the look-up of a call."""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from moment_ops.kernels import _launch, match, moments, relu_moments
from moment_ops.ops.records import Match

ADAM = [1e-3, 0.5, 0.999, 1e-8, 0.0]


class _Compiled:
    """In place of a compiled kernel: what is left is the look-up."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: None


def _look_up(fill: Callable[..., None], *arguments: object) -> Callable[[], None]:
    """A call like one that has been worked out."""
    with patch.object(_launch, "start", lambda launches, device: [_Compiled() for _ in launches]):
        fill(*arguments)
    return lambda: fill(*arguments)


def _vectors(count: int, like: Tensor) -> list[Tensor]:
    return [torch.zeros_like(like) for _ in range(count)]


def look_ups(features: list[Tensor]) -> dict[str, Callable[[], None]]:
    """Calls of the column kernels over layers, by name; tensors on the CPU will do."""
    mean, var, target, target_var = _vectors(4, torch.zeros(sum(x[0].numel() for x in features)))
    state = [*_vectors(6, mean), torch.zeros((), dtype=torch.int64)]
    loss, count, out = torch.zeros(()), torch.ones(len(features), dtype=torch.int64), [x.clone() for x in features]
    x, y, tap_mean, tap_var, grad_mean = features[0], out[0], *_vectors(3, features[0][0].flatten())
    matching = Match(target, target_var, average_kind="adam", options=ADAM, state=state, update=True)
    return {
        "moments": _look_up(moments.moments, features, 0, 1, mean, var),
        "moments_backward": _look_up(moments.moments_backward, [], mean, var, features, target, count, 0, 1, None, out),
        "match_, ADAM": _look_up(match.match_, None, None, features, 1, matching, loss, mean, *_vectors(2, mean)),
        "relu_moments": _look_up(relu_moments.relu_moments, x, None, 1, y, tap_mean, tap_var),
        "relu_moments_backward": _look_up(
            relu_moments.relu_moments_backward, y, grad_mean, tap_var, x, tap_mean, 1, torch.empty_like(x)
        ),
    }


def launches(call: Callable[[], None]) -> int:
    """How many kernels a call launches."""
    counted = 0

    def count(planned: list[_launch.Launch], device: torch.device) -> list[None]:
        nonlocal counted
        counted += len(planned)
        return [None for _ in planned]

    with patch.object(_launch, "start", count), patch.object(_launch, "_calls", {}):
        call()
    return counted
