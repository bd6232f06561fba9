"""What the emulator refuses: memory out of bounds or not written, threads that part, accesses that nothing orders."""

import pytest
import torch

from emulator.execution import Schedule
from emulator.faults import Divergence, Fault, MemoryFault, Race, UndefinedRegister
from emulator.snippets import run

AT = "mad.wide.u32 %d9, %r0, 4, %d0;"  # a[thread]
SHARED = "mov.b32 %r8, data; shl.b32 %r7, %r0, 2; add.s32 %r9, %r7, %r8;"  # shared memory of the thread
BLOCK = "mov.u32 %r6, %ctaid.x;"


def zeros(count, dtype=torch.int32):
    return torch.zeros(count, dtype=dtype)


def test_an_access_behind_a_tensor_names_it():
    with pytest.raises(MemoryFault, match=r"0 bytes behind a, out of bounds: `ld.global.b32 %r1, \[%d9\]`"):
        run(f"{AT} ld.global.b32 %r1, [%d9];", [zeros(31)])


def test_an_access_before_a_tensor_names_it():
    with pytest.raises(MemoryFault, match="4 bytes before b, out of bounds"):
        run("ld.global.b32 %r1, [%d1 + -4];", [zeros(32), zeros(32)])


def test_an_access_far_from_everything_is_out_of_bounds():
    with pytest.raises(MemoryFault, match="out of bounds"):
        run("mov.b64 %d9, 16; ld.global.b32 %r1, [%d9];", [zeros(32)])


def test_gaps_between_the_rows_of_a_tensor_are_out_of_bounds():
    rows = zeros(64).view(8, 8)[:, :4]
    run("ld.global.b32 %r1, [%d0 + 32];", [rows])
    with pytest.raises(MemoryFault, match=r"at a \+ 16, out of bounds"):
        run("ld.global.b32 %r1, [%d0 + 16];", [rows])


def test_only_threads_whose_guard_holds_access_memory():
    run(f"{AT} setp.lt.u32 %p1, %r0, 8; @%p1 ld.global.b32 %r1, [%d9];", [zeros(8)])


def test_an_access_that_is_not_aligned_is_refused():
    with pytest.raises(MemoryFault, match=r"at a \+ 4 is no multiple of 8 bytes"):
        run("ld.global.v2.b32 {%r1, %r2}, [%d0 + 4];", [zeros(8)])


def test_memory_that_nobody_has_written_may_be_written_but_not_read():
    a = zeros(32)
    run(f"{AT} st.global.b32 [%d9], %r0; ld.global.b32 %r1, [%d9];", [a], fresh=[a])
    assert torch.equal(a, torch.arange(32, dtype=torch.int32))
    with pytest.raises(MemoryFault, match=r"at a \+ 2, that nobody has written"):
        run("st.global.b16 [%d0], 0; ld.global.b32 %r1, [%d0];", [a], fresh=[a])


@pytest.mark.parametrize(("shared", "offset", "message"), [(128, 0, "nobody has written"), (128, 128, "out of bounds")])
def test_shared_memory_is_checked_too(shared, offset, message):
    with pytest.raises(MemoryFault, match=message):
        run(f"{SHARED} ld.shared.b32 %r1, [%r9 + {offset}];", [zeros(1)], shared=shared)


def test_blocks_do_not_see_the_shared_memory_of_blocks_before_them():
    body = f"{SHARED} {BLOCK} setp.ne.u32 %p1, %r6, 0; @%p1 ld.shared.b32 %r1, [%r9]; st.shared.b32 [%r9], %r0;"
    with pytest.raises(MemoryFault, match="nobody has written"):
        run(body, [zeros(1)], programs=2, shared=128, schedule=Schedule(together=1))


def test_two_threads_of_a_warp_must_not_write_different_values_to_one_address():
    run("st.global.b32 [%d0], 5;", [zeros(1)])
    with pytest.raises(MemoryFault, match="of one warp write different values"):
        run("st.global.b32 [%d0], %r0;", [zeros(1)])


@pytest.mark.parametrize("use", ["st.global.b32 [%d0], %r1;", "setp.eq.s32 %p1, %r1, 0; @%p1 bra end; end:",
                                 "cvt.u64.u32 %d9, %r1; ld.global.b32 %r2, [%d9];"])  # fmt: skip
def test_a_register_that_was_not_written_must_not_be_looked_at(use):
    body = f"setp.eq.s32 %p2, %r0, 3; @%p2 bra over; mov.b32 %r1, 0; over: {use}"
    with pytest.raises(UndefinedRegister, match="of thread 3 of block 0 in"):
        run(body, [zeros(1)])


@pytest.mark.parametrize(("unpacked", "fault"), [("{_, %r2}", False), ("{%r2, _}", True)])
def test_the_half_of_a_pair_that_was_not_written_must_not_be_looked_at(unpacked, fault):
    """Compilers pack what nobody has written, and take the other half out again."""
    body = f"mov.b32 %r3, 5; mov.b64 %d9, {{%r4, %r3}}; mov.b64 {unpacked}, %d9; st.global.b32 [%d0], %r2;"
    a = zeros(1)
    if fault:
        with pytest.raises(UndefinedRegister):
            run(body, [a])
    else:
        run(body, [a])
        assert a.tolist() == [5]


def test_a_register_that_was_not_written_may_be_computed_with_where_nobody_looks():
    body = f"""
      {AT} setp.lt.s32 %p2, %r0, 16;
      @%p2 mov.b32 %r1, 7;
      add.s32 %r2, %r1, %r0;
      shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
      selp.b32 %r4, %r3, 0, %p2;
      st.global.b32 [%d9], %r4;"""
    a = zeros(32)
    run(body, [a])
    assert a[:16].tolist() == [7 + (i ^ 1) for i in range(16)]
    with pytest.raises(UndefinedRegister):
        run(body.replace("%r3, %r2, 1", "%r3, %r2, 16"), [a])


def test_threads_that_are_missing_at_a_barrier_are_missed():
    with pytest.raises(Divergence, match="only some threads of the warp"):
        run("setp.lt.s32 %p1, %r0, 16; @%p1 bra end; bar.sync 0; end:", [zeros(1)])
    with pytest.raises(Divergence, match="32 threads of block 0 wait for those that left"):
        run("setp.lt.s32 %p1, %r0, 32; @%p1 bra end; bar.sync 0; end:", [zeros(1)], warps=2)


def test_barriers_at_different_places_are_one_barrier():
    a = zeros(64)
    body = f"{AT} setp.lt.s32 %p1, %r0, 32; @%p1 bra other; bar.sync 0; bra.uni end; other: bar.sync 0; end: "
    run(body + "st.global.b32 [%d9], 1;", [a], warps=2)
    assert a.sum() == 64


def test_instructions_of_a_whole_warp_want_the_whole_warp():
    with pytest.raises(Divergence, match="only some threads"):
        run("setp.lt.s32 %p1, %r0, 16; @%p1 bra end; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; end:", [zeros(1)])


def test_a_kernel_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr("emulator.machine._MOST_STEPS", 100)
    with pytest.raises(Fault, match="does not end"):
        run("again: bra.uni again;", [zeros(1)])


# Every warp stores in shared memory, and reads what the next one has stored.
EXCHANGE = f"""
  {SHARED} add.s32 %r5, %r7, 128; and.b32 %r5, %r5, 255; add.s32 %r5, %r5, %r8;
  {{read}}
  st.shared.b32 [%r9], %r0;
  {{barrier}}
  {{again}}
  ld.shared.b32 %r1, [%r5];
  {AT} st.global.b32 [%d9], %r1;"""


def exchange(barrier="bar.sync 0;", again="", read="", warps="together"):
    a = zeros(64)
    body = EXCHANGE.format(barrier=barrier, again=again, read=read)
    run(body, [a], warps=2, shared=256, schedule=Schedule(warps=warps))
    return a.tolist()


@pytest.mark.parametrize("warps", ["together", "forward", "reversed"])
def test_a_barrier_orders_stores_before_loads(warps):
    assert exchange(warps=warps) == [(i + 32) % 64 for i in range(64)]


def test_without_a_barrier_stores_and_loads_race():
    with pytest.raises(
        Race, match=r"write and read that nothing orders, 64 times.*warp 0 .* warp 1 of block 0 at shared"
    ):
        exchange(barrier="")


def test_warps_that_run_apart_do_not_see_what_later_ones_store():
    with pytest.raises(MemoryFault, match="nobody has written"):
        exchange(barrier="", warps="forward")


def test_a_store_behind_the_loads_of_others_races_with_them():
    again = "ld.shared.b32 %r2, [%r5]; st.shared.b32 [%r9], %r2;"
    with pytest.raises(Race, match="read and write that nothing orders"):
        exchange(again=again)
    exchange(again=again.replace("; st", "; bar.sync 0; st") + "bar.sync 0;")


def test_stores_of_different_values_race_and_those_of_one_value_do_not():
    same = f"{SHARED} st.shared.b32 [%r8], 5; bar.sync 0; ld.shared.b32 %r1, [%r8];"
    run(same, [zeros(1)], warps=4, shared=16)
    with pytest.raises(Race, match="write and write that nothing orders"):
        run(same.replace("5;", "%r6;").replace("mov.b32 %r8", "shr.u32 %r6, %r0, 5; mov.b32 %r8", 1),
            [zeros(1)], warps=4, shared=16)  # fmt: skip


def test_stores_of_one_value_race_with_reads_before_any_of_them():
    """The last of the warps has not read the old value when another one stores the new."""
    body = f"""
      {SHARED} setp.lt.u32 %p1, %r0, 32; shr.u32 %r6, %r0, 6;
      @%p1 st.shared.b32 [%r8], 0;
      bar.sync 0;
      ld.shared.b32 %r1, [%r8];
      {{barrier}}
      setp.ge.u32 %p2, %r0, 64;
      @%p2 st.shared.b32 [%r8], 9;
      mad.wide.u32 %d9, %r0, 4, %d0;
      st.global.b32 [%d9], %r1;"""
    run(body.format(barrier="bar.sync 0;"), [zeros(128)], warps=4, shared=16)
    with pytest.raises(Race, match="read and write"):
        run(body.format(barrier=""), [zeros(128)], warps=4, shared=16)


def test_blocks_race_in_global_memory():
    writes = f"{BLOCK} setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%d0], %r6;"
    with pytest.raises(Race, match=r"write and write .* of block 0 and warp 0 of block 1 at a"):
        run(writes, [zeros(1)], programs=2)
    reads = "setp.eq.u32 %p2, %r6, 1; @%p2 ld.global.b32 %r1, [%d0]; @%p2 st.global.b32 [%d1], %r1;"
    writes = writes.replace("%r0, 0;", "%r6, 0;")
    for order in ("forward", "reversed"):
        with pytest.raises(Race, match="read"):
            run(writes + reads, [zeros(1), zeros(1)], programs=2, schedule=Schedule(order))


# The last block to take a ticket reads what all have stored.
TICKET = f"""
  {BLOCK} mad.wide.u32 %d9, %r6, 4, %d0; setp.eq.u32 %p1, %r0, 0;
  @%p1 st.global.b32 [%d9], %r6;
  {{before}}
  @%p1 atom.global.gpu.{{semantics}}.add.u32 %r1, [%d1], 1;
  {{behind}}
  setp.eq.and.u32 %p2, %r1, 3, %p1;
  @%p2 ld.global.v4.b32 {{{{%r10, %r11, %r12, %r13}}}}, [%d0];
  @%p2 st.global.v4.b32 [%d2], {{{{%r10, %r11, %r12, %r13}}}};"""


def ticket(semantics, before="", behind="", **schedule):
    a, out = zeros(4), zeros(4)
    body = TICKET.format(semantics=semantics, before=before, behind=behind)
    body = body.replace("setp.eq.and.u32 %p2, %r1, 3, %p1;", "mov.pred %p2, 0; @%p1 setp.eq.u32 %p2, %r1, 3;")
    run(body, [a, zeros(1), out], programs=4, fresh=[a, out], schedule=Schedule(**schedule))
    return out.tolist()


@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
@pytest.mark.parametrize("together", [1, 2, 4])
def test_an_atomic_that_releases_and_acquires_orders_blocks(order, together):
    assert ticket("acq_rel", order=order, together=together) == [0, 1, 2, 3]


def test_fences_around_a_relaxed_atomic_order_blocks():
    fence = "fence.acq_rel.gpu;"
    assert ticket("relaxed", before=fence, behind=fence) == [0, 1, 2, 3]
    assert ticket("relaxed", before="membar.gl;", behind="membar.gl;") == [0, 1, 2, 3]
    assert ticket("release", behind=fence) == [0, 1, 2, 3]


@pytest.mark.parametrize(("semantics", "before", "behind"), [
    ("relaxed", "", ""), ("acquire", "", ""), ("release", "", ""),
    ("relaxed", "fence.acq_rel.gpu;", ""), ("relaxed", "", "fence.acq_rel.gpu;"),
])  # fmt: skip
def test_half_of_an_order_is_none(semantics, before, behind):
    with pytest.raises(Race, match="write and read that nothing orders"):
        ticket(semantics, before, behind)


def test_an_atomic_of_a_block_does_not_order_other_blocks():
    body = TICKET.replace("gpu", "cta")
    a, out = zeros(4), zeros(4)
    text = body.format(semantics="acq_rel", before="", behind="")
    text = text.replace("setp.eq.and.u32 %p2, %r1, 3, %p1;", "mov.pred %p2, 0; @%p1 setp.eq.u32 %p2, %r1, 3;")
    with pytest.raises(Race):
        run(text, [a, zeros(1), out], programs=4, fresh=[a, out])


def test_atomics_do_not_race_with_one_another_but_with_loads():
    run("red.global.gpu.relaxed.add.u32 [%d0], 1;", [a := zeros(1)], programs=3)
    assert a.item() == 96
    with pytest.raises(Race, match="atomic"):
        run("atom.global.add.u32 %r1, [%d0], 1; ld.global.b32 %r2, [%d0]; st.global.b32 [%d1], 0;"
            "setp.eq.u32 %p1, %r2, 9; @%p1 st.global.b32 [%d1], 1;", [zeros(1), zeros(1)], programs=2)  # fmt: skip


def test_a_load_behind_an_atomic_of_its_own_races_with_those_of_others():
    body = (
        f"{BLOCK} mov.b32 %r1, 0; setp.eq.u32 %p1, %r6, 1; red.global.add.u32 [%d0], 1; @%p1 ld.global.b32 %r1, [%d0];"
    )
    with pytest.raises(Race, match="atomic and read"):
        run(body + "@%p1 st.global.b32 [%d1], 7; setp.eq.u32 %p2, %r1, 2; @%p2 bra end; end:",
            [zeros(1), zeros(1)], programs=2, schedule=Schedule(together=1))  # fmt: skip


OPERATIONS = {"min.s32": -5, "max.s32": 31, "and.b32": 0, "or.b32": 31, "xor.b32": 0, "exch.b32": None}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_atomics_are_done_one_after_another(operation):
    a = torch.tensor([-5 if "min" in operation else 0], dtype=torch.int32)
    run(f"atom.global.{operation} %r1, [%d0], %r0;", [a])
    expected = OPERATIONS[operation]
    assert a.item() == expected if expected is not None else 0 <= a.item() < 32


def test_compare_and_swap_swaps_once():
    a = zeros(1)
    run("add.s32 %r2, %r0, 1; atom.global.cas.b32 %r1, [%d0], 0, %r2;", [a])
    assert 1 <= a.item() <= 32


def test_a_read_in_a_race_is_none_where_nobody_uses_it():
    """All warps load, the first of them stores: what the others have loaded is not used."""
    body = """
      ld.global.b32 %r1, [%d0];
      add.s32 %r2, %r1, 1;
      setp.{who}.u32 %p1, %r0, 0;
      @%p1 st.global.b32 [%d0], %r2;"""
    a = zeros(1)
    result = run(body.format(who="eq"), [a], warps=2)
    assert a.item() == 1
    assert [str(race.kinds) for race in result.unused] == ["read and write that nothing orders"]
    used = body.format(who="eq") + "add.s32 %r3, %r0, 1; mad.wide.u32 %d9, %r0, 4, %d1; st.global.b32 [%d9], %r1;"
    with pytest.raises(Race, match="it is used: %r1 of thread 32 of block 0"):
        run(used, [zeros(1), zeros(64)], warps=2)


# Data come to shared memory asynchronously.
COPY = f"""
  {SHARED} mad.wide.u32 %d9, %r0, 4, %d0; mad.wide.u32 %d10, %r0, 4, %d1;
  cp.async.ca.shared.global [%r9], [%d9], 4, {{size}};
  cp.async.commit_group;
  {{wait}}
  xor.b32 %r7, %r7, {{other}}; add.s32 %r9, %r7, %r8;
  ld.shared.b32 %r1, [%r9];
  st.global.b32 [%d10], %r1;"""


def copied(wait="cp.async.wait_group 0;", other=0, size=4, warps=1):
    a, out = torch.arange(1, 65, dtype=torch.int32), zeros(64)
    run(COPY.format(wait=wait, other=other, size=size), [a, out], warps=warps, shared=256)
    return out


def test_a_copy_is_there_when_it_was_waited_for():
    assert copied()[:32].tolist() == list(range(1, 33))
    assert copied("cp.async.wait_all;")[:32].tolist() == list(range(1, 33))


def test_a_copy_of_nothing_is_zero():
    assert (copied(size=0) == 0).all()


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_a_copy_that_was_not_waited_for_is_not_there(wait):
    with pytest.raises(MemoryFault, match="nobody has written"):
        copied(wait)


def test_what_was_there_before_a_copy_is_gone_when_it_begins():
    with pytest.raises(MemoryFault, match="nobody has written"):
        run(COPY.format(wait="", other=0, size=4).replace("cp.async.ca", "st.shared.b32 [%r9], 5; cp.async.ca"),
            [zeros(32), zeros(32)], shared=128)  # fmt: skip


def test_a_copy_that_is_not_committed_is_not_waited_for():
    body = COPY.format(wait="cp.async.wait_group 0;", other=0, size=4).replace("cp.async.commit_group;", "")
    with pytest.raises(MemoryFault, match="nobody has written"):
        run(body, [zeros(32), zeros(32)], shared=128)


def test_a_copy_that_nobody_waits_for_is_an_error():
    body = f"{SHARED} {AT} cp.async.ca.shared.global [%r9], [%d9], 4; cp.async.commit_group;"
    with pytest.raises(Fault, match="nobody waits for"):
        run(body, [zeros(32)], shared=128)


def test_a_barrier_orders_the_copies_of_others():
    wait = "cp.async.wait_group 0; bar.sync 0;"
    assert copied(wait, other=128, warps=2).tolist() == [*range(33, 65), *range(1, 33)]
    with pytest.raises(Race, match="write and read"):
        copied("cp.async.wait_group 0;", other=128, warps=2)


def test_a_barrier_before_the_wait_orders_nothing():
    with pytest.raises((Race, MemoryFault)):
        copied("bar.sync 0; cp.async.wait_group 0;", other=128, warps=2)


def test_a_log_that_is_looked_at_in_parts_finds_the_same_races(monkeypatch):
    monkeypatch.setattr("emulator.races._MOST_ENTRIES", 50)
    exchange()
    with pytest.raises(Race):
        exchange(barrier="")
    assert ticket("acq_rel", together=1) == [0, 1, 2, 3]
    with pytest.raises(Race):
        ticket("relaxed", together=1)
