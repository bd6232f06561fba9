"""A barrier, an order or a guard less is noticed: with partials and tickets, where tiles are exchanged, in tails."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from emulated.columns import Moments, MomentsBackward
from emulated.mutations import Subject, idle_barriers, idle_guards, unused_accesses
from emulated.products import Gram


@pytest.fixture(scope="module")
def moments():
    """Two strips of three chunks; what is beside the columns is out of bounds."""
    return Subject(lambda: Moments(530, [(40,)], torch.float32, "every second row"), {}, 0)


@pytest.fixture(scope="module")
def fold():
    """Sums of Gram matrices: a tile goes through shared memory to be transposed."""
    return Subject(lambda: Gram([66], [8], torch.float32), {}, 1)


@pytest.mark.parametrize("name", ["moments", "fold"])
def test_the_barriers_that_can_be_spared_are_those_that_have_nothing_to_order(name, request):
    subject = request.getfixturevalue(name)
    outcomes = {mutation.line: subject.outcome(mutation) for mutation in subject.mutations("barrier")}
    spared = {line for line, outcome in outcomes.items() if outcome == "unnoticed"}
    assert spared == idle_barriers(subject)
    assert len(spared) < len(outcomes)


@pytest.mark.parametrize("kind", ["acquire", "release", "order"])
def test_a_ticket_needs_its_whole_order(moments, kind):
    outcomes = [moments.outcome(mutation) for mutation in moments.mutations(kind)]
    assert outcomes == ["noticed"]


def moments_read_again():
    """Every second column is read again, as sums of its squares do not fit."""
    case = Moments(20, [(516,)], torch.float32, "every second row")
    case.features[0][:, ::2] *= 5e18
    return case


TAILS = {
    "moments": moments_read_again,
    "moments_backward": lambda: MomentsBackward(20, [(40,), (8,)], torch.bfloat16, "every second row", added=True),
}


@pytest.mark.parametrize("name", TAILS)
def test_tails_need_all_of_their_guards_but_for_what_nobody_looks_at(name):
    subject = Subject(TAILS[name], {"_column_plan.IN_FLIGHT": 0}, 0)
    outcomes = {mutation.line: subject.outcome(mutation) for mutation in subject.mutations("guard")}
    rest = {line for line, outcome in outcomes.items() if outcome != "noticed"} - idle_guards(subject)
    assert unused_accesses(subject, rest) == rest
    assert sum(outcome == "noticed" for outcome in outcomes.values()) >= 10
