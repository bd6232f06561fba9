"""Every barrier, order and guard less is noticed, or explained."""

import pytest
import torch

from emulated.columns import MatchFeatures, Moments, MomentsBackward
from emulated.full.test_columns import WIDE
from emulated.full.test_products import LARGE_TILES, PROMOTED, chunks_of
from emulated.mutations import Subject, idle_barriers, idle_fences, idle_guards, unused_accesses
from emulated.products import Covariance, CovarianceMatch, CovarianceMatchBackward, Gram

F32, BF16 = torch.float32, torch.bfloat16
SLICED = "every second row"
SUBJECTS = {
    "moments": lambda: Subject(lambda: Moments(530, [(40,)], F32, SLICED), {}, 0),
    "moments, wide": lambda: Subject(lambda: Moments(20, [(516,)], F32, SLICED), WIDE, 0),
    "moments of 16 bits": lambda: Subject(lambda: Moments(530, [(40,)], BF16, SLICED), {}, 0),
    "moments_backward": lambda: Subject(lambda: MomentsBackward(20, [(40,), (8,)], BF16, SLICED, added=True), {}, 0),
    "match": lambda: Subject(lambda: MatchFeatures(530, [(12,), (8,)], F32, "adam", SLICED), {}, 0),
    "gram, sums": lambda: Subject(lambda: Gram([66], [8], F32), {}, 1),
    "gram": lambda: Subject(lambda: Gram([20, 6], [200], F32), {"_gram_plan.PROMOTED_COLUMNS": 64}, 0),
    "covariance": lambda: Subject(lambda: Covariance(120, 136, F32, "ieee", SLICED), {}, 1),
    "covariance in chunks": lambda: Subject(
        lambda: Covariance(135, 136, BF16, "ieee", SLICED), LARGE_TILES | chunks_of(65), 1
    ),
    "covariance in blocks": lambda: Subject(
        lambda: Covariance(140, 40, BF16, "ieee", SLICED), LARGE_TILES | PROMOTED | chunks_of(140), 1
    ),
    "covariance, sm_90": lambda: Subject(lambda: Covariance(120, 136, F32, "bf16x3"), LARGE_TILES, 1, 90),
    "covariance_match": lambda: Subject(lambda: CovarianceMatch(70, (136,), BF16, "ieee", "adam", SLICED), {}, 1),
    "covariance_match_backward, sm_90": lambda: Subject(
        lambda: CovarianceMatchBackward(70, (136,), F32, "bf16x3", SLICED), LARGE_TILES, 0, 90
    ),
}
# Their guards keep loads within tensors, whose values go through shared memory: what is not used of them is not known.
GUARDED = ("moments", "moments, wide", "moments of 16 bits", "moments_backward", "match", "gram, sums")


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_barriers_that_can_be_spared_are_those_that_have_nothing_to_order(name):
    subject = SUBJECTS[name]()
    outcomes = {mutation.line: subject.outcome(mutation) for mutation in subject.mutations("barrier")}
    spared = {line for line, outcome in outcomes.items() if outcome == "unnoticed"}
    assert spared == idle_barriers(subject)


@pytest.mark.parametrize("name", ["moments", "moments of 16 bits", "match", "covariance in chunks", "covariance_match"])
@pytest.mark.parametrize("kind", ["acquire", "release", "order"])
def test_tickets_need_their_whole_order(name, kind):
    subject = SUBJECTS[name]()
    outcomes = [subject.outcome(mutation) for mutation in subject.mutations(kind)]
    assert outcomes
    assert set(outcomes) == {"noticed"}


@pytest.mark.parametrize("name", ["covariance", "covariance in chunks", "covariance, sm_90", "gram"])
def test_copies_have_to_be_waited_for(name):
    subject = SUBJECTS[name]()
    outcomes = [subject.outcome(mutation) for mutation in subject.mutations("wait")]
    assert outcomes
    assert set(outcomes) == {"noticed"}


@pytest.mark.parametrize("name", [name for name in SUBJECTS if "sm_90" in name])
def test_the_proxy_fences_that_can_be_spared_are_those_behind_others(name):
    subject = SUBJECTS[name]()
    outcomes = {mutation.line: subject.outcome(mutation) for mutation in subject.mutations("proxy fence")}
    spared = {line for line, outcome in outcomes.items() if outcome == "unnoticed"}
    assert spared == idle_fences(subject)
    assert len(spared) < len(outcomes)


@pytest.mark.parametrize("name", GUARDED)
def test_the_guards_that_can_be_spared_change_nothing_that_anybody_looks_at(name):
    subject = SUBJECTS[name]()
    outcomes = {mutation.line: subject.outcome(mutation) for mutation in subject.mutations("guard")}
    spared = {line for line, outcome in outcomes.items() if outcome != "noticed"}
    rest = spared - idle_guards(subject)
    assert unused_accesses(subject, rest) == rest
    assert len(spared) < len(outcomes)
