"""What all cases have in common: how they are run, memory layouts, and what planners have otherwise."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from emulator.execution import Schedule
from emulator.launcher import Allocations, Compiled, compiled, run
from emulator.machine import Result
from torch import Tensor

from moment_ops.kernels import _column_plan, _covariance_plan, _gram_plan
from moment_ops.kernels._launch import Launch

# What a planner has otherwise: values by name, `module.name`.
Plan = Mapping[str, Any]


class Case:
    """Launches on tensors of their own, and what they must have written."""

    def launches(self, architecture: int) -> list[Launch]:
        """Allocate outputs, and make the launches."""
        raise NotImplementedError

    def check(self) -> None:
        """Compare outputs and state with float64."""
        raise NotImplementedError

    def results(self) -> list[Tensor]:
        """All that was written."""
        raise NotImplementedError


def emulate(
    case: Case,
    architecture: int,
    schedule: Schedule | None = None,
    codes: dict[int, Compiled] | None = None,
    tiles: int | None = None,
) -> list[Result]:
    """Run a case, compiled for an architecture, with the tiles of that one or another, and check it.

    codes: of some of the launches, what is run instead.
    """
    with Allocations() as fresh:
        launches = case.launches(tiles or architecture)
    given = codes or {}
    chosen = [given.get(i) or compiled(launch, architecture) for i, launch in enumerate(launches)]
    results = run(launches, chosen, fresh, schedule)
    case.check()
    return results


@contextmanager
def planned(plan: Plan) -> Iterator[None]:
    """The planners with other constants and rules, so that small shapes are dealt out as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in plan.items():
            patch.setattr(f"moment_ops.kernels.{name}", value)
        _forget()
        yield
    _forget()


def always(value: Any) -> Callable[..., Any]:
    """A rule of a planner that says this whatever it is asked."""
    return lambda *_: value


def _forget() -> None:
    _column_plan._groups.cache_clear()
    _covariance_plan._groups.cache_clear()
    _gram_plan._batches.cache_clear()


def _sliced(x: Tensor) -> Tensor:
    """Every second row of twice as many."""
    return torch.stack([x, torch.full_like(x, float("nan"))], 1).flatten(0, 1)[::2]


def _of_wider_rows(x: Tensor) -> Tensor:
    """Columns in the middle of longer rows: aligned where the columns are, 16 bytes further in."""
    margin = torch.full((len(x), 16 // x.element_size()), float("nan"), dtype=x.dtype)
    flat = torch.cat([margin, x.flatten(1), margin], 1)[:, margin.shape[1] : -margin.shape[1]]
    return flat.unflatten(1, x.shape[1:]) if x.dim() > 2 else flat


def _unaligned(x: Tensor) -> Tensor:
    """One element into its storage."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": _channels_last,
    "every second row": _sliced,
    "rows of wider ones": _of_wider_rows,
    "unaligned": _unaligned,
}


def empty_like(x: Tensor) -> Tensor:
    """An output with the strides of its input, and gaps where it has some."""
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())
