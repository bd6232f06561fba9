"""How the tests of the full suite run a case: in several orders, to the same bits."""

from collections.abc import Callable

import torch
from emulator.execution import Schedule
from helpers import assert_same_bits

from emulated.cases import Case, Plan, emulate, planned

# Blocks in lockstep; alone, the last first, and so their warps; a few together, in any order, one warp after another.
SCHEDULES = (
    Schedule("forward"),
    Schedule("reversed", together=1, warps="reversed"),
    Schedule("random", together=3, warps="forward", seed=1),
)
NOTHING: Plan = {}
# Approximations that err as far as they may.
INEXACT = Schedule("random", inexact=True)


def check(make: Callable[[], Case], architecture: int, plan: Plan = NOTHING) -> None:
    """A case is right in every order, and to the last bit the same."""
    results = []
    with planned(plan):
        for schedule in SCHEDULES:
            torch.manual_seed(0)
            case = make()
            emulate(case, architecture, schedule)
            results.append(case.results())
    for other in results[1:]:
        assert_same_bits(other, results[0])


def check_inexact(make: Callable[[], Case], architecture: int, plan: Plan = NOTHING) -> None:
    """It stays within its bounds where approximate instructions are as wrong as they may be."""
    with planned(plan):
        emulate(make(), architecture, INEXACT)
