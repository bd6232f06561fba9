"""What the threads of a warp do together, the ways they go, and what is refused."""

import numpy as np
import pytest
from test_emulator import S32, U32, edges

from emulator.faults import Divergence, UnknownInstruction
from emulator.snippets import evaluate

LANES = np.arange(32)
SHUFFLES = [
    ("bfly", "3, 31", LANES ^ 3),
    ("idx", "5, 31", np.full(32, 5)),
    ("up", "2, 0", np.maximum(LANES - 2, np.where(LANES < 2, LANES, 0))),
    ("down", "4, 31", np.where(LANES + 4 < 32, LANES + 4, LANES)),
    ("down", "1, 6175", np.where(LANES % 8 < 7, LANES + 1, LANES)),
    ("idx", "1, 6175", LANES // 8 * 8 + 1),
]


@pytest.mark.parametrize(("mode", "bounds", "source"), SHUFFLES)
def test_shuffles_take_values_from_other_lanes(mode, bounds, source):
    """6175 is 0x181f: segments of eight lanes."""
    x = np.arange(100, 164, dtype=U32)
    result = evaluate(f"shfl.sync.{mode}.b32 {{y}}, {{0}}, {bounds}, -1", x, out=U32)
    np.testing.assert_array_equal(result, np.concatenate([x[source], x[32 + source]]))


def test_a_shuffle_tells_whether_its_source_was_inside():
    text = "shfl.sync.down.b32 %r9|%p1, {0}, 4, 31, -1; selp.b32 {y}, 1, 0, %p1"
    np.testing.assert_array_equal(evaluate(text, LANES.astype(U32), out=U32), LANES < 28)


@pytest.mark.parametrize(("name", "function"), [("max.s32", np.max), ("min.s32", np.min), ("add.s32", np.sum)])
def test_reductions_are_those_of_each_warp(name, function):
    x = edges(S32)[:64] // 64
    result = evaluate(f"redux.sync.{name} {{y}}, {{0}}, -1", x, out=S32)
    np.testing.assert_array_equal(result, np.repeat([function(x[:32]), function(x[32:])], 32))


def test_votes_are_those_of_each_warp():
    x = np.concatenate([np.arange(32) % 3, np.zeros(32)]).astype(U32)
    text = "setp.eq.u32 %p1, {0}, 1; vote.sync.ballot.b32 {y}, %p1, -1"
    ballot = sum(1 << i for i in range(32) if i % 3 == 1)
    np.testing.assert_array_equal(evaluate(text, x, out=U32), np.repeat([ballot, 0], 32).astype(U32))


def test_threads_of_a_warp_go_different_ways_and_meet_again():
    text = """
      mov.b32 {y}, 0;
      mov.b32 %r9, 0;
      loop: setp.ge.u32 %p1, %r9, {0};
      @%p1 bra done;
      add.u32 {y}, {y}, %r9;
      add.u32 %r9, %r9, 1;
      bra.uni loop;
      done: add.u32 {y}, {y}, 1000"""
    n = np.arange(40, dtype=U32)
    np.testing.assert_array_equal(evaluate(text, n, out=U32), n * (n - 1) // 2 + 1000)


def test_a_warp_waits_at_a_barrier_for_its_threads_on_longer_ways():
    """Also where the barrier stands before those ways in the text, as nvcc writes it."""
    text = """
      mov.b32 {y}, 0;
      bra.uni loop;
      meet: bar.sync 0;
      bra.uni done;
      loop: setp.ge.u32 %p1, {y}, {0};
      @%p1 bra meet;
      add.u32 {y}, {y}, 1;
      bra.uni loop;
      done: add.u32 {y}, {y}, 1000"""
    n = np.arange(40, dtype=U32)
    np.testing.assert_array_equal(evaluate(text, n, out=U32), n + 1000)


def test_a_barrier_that_some_threads_of_a_warp_never_reach_is_refused():
    with pytest.raises(Divergence, match="some threads of the warp"):
        evaluate("setp.eq.u32 %p1, {0}, 0; @%p1 bra done; bar.sync 0; done: mov.b32 {y}, 1", LANES.astype(U32), out=U32)


def test_arguments_are_loaded_as_vectors():
    text = "ld.param.v2.b32 {%r8, %r9}, [p0]; mov.b64 %d9, {%r8, %r9}; sub.s64 %d9, %d9, %d0; cvt.u32.u64 {y}, %d9"
    np.testing.assert_array_equal(evaluate(text + "; add.u32 {y}, {y}, {0}", LANES.astype(U32), out=U32), LANES)


def test_guarded_instructions_leave_other_threads_alone():
    text = "mov.b32 {y}, 7; setp.lt.s32 %p1, {0}, 2; @%p1 mov.b32 {y}, 8; @!%p1 add.s32 {y}, {y}, {0}"
    assert evaluate(text, np.arange(4, dtype=S32), out=S32).tolist() == [8, 8, 9, 10]


UNKNOWN = [
    "foo.b32 {y}, {0}",
    "add.cc.s32 {y}, {0}, {0}",
    "add.sat.s32 {y}, {0}, {0}",
    "add.s64 {y}, {0}, {0}",
    "add.f32 {y}, {0}, nothing",
    "fma.rn.relu.f32 {y}, {0}, {0}, {0}",
    "setp.lt.ftz.f32 %p1, {0}, {0}",
    "cvt.f32.s32 {y}, {0}",
    "shl.b32 {y}, {0}",
    "ld.volatile.global.b32 {y}, [%d0]",
    "bar.sync 1, 64",
    "@%p1 bra nowhere",
]


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_what_the_emulator_does_not_know_is_an_error_that_shows_the_instruction(instruction):
    with pytest.raises(UnknownInstruction) as error:
        evaluate(instruction, np.zeros(1, U32), out=U32)
    assert instruction.replace("{y}", "%r11").replace("{0}", "%r10") in str(error.value)
