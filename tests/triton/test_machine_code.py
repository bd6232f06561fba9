"""What is read off machine code: on code written by hand, and on small kernels whose answer is known."""

import subprocess

import pytest
from specs import machine_code
from specs.machine_code import Function, Instruction, functions, parse, resident_blocks


def load(scoreboard, bits=128):
    return Instruction(f"LDG.E.{bits}" if bits != 32 else "LDG.E", signals=scoreboard)


def use(*scoreboards):
    return Instruction("FADD", waits=frozenset(scoreboards))


def branch(target):
    return Instruction("BRA", target=target)


def function(*instructions):
    return Function("kernel", 90, 64, 0, 0, instructions)


def test_loads_before_the_first_use_are_in_flight_together():
    flight = function(*[load(i % 6) for i in range(8)], use(0), use(1, 2, 3), use(4, 5)).straight_flight
    assert (flight.loaded, flight.round_trips, flight.first_wait) == (128, 1, 128)


def test_a_load_that_needs_the_last_one_takes_a_round_trip_more():
    flight = function(load(0), use(0), load(0), use(0), load(0), use(0)).straight_flight
    assert (flight.loaded, flight.round_trips, flight.first_wait, flight.in_flight) == (48, 3, 16, 16)


def test_a_row_that_is_waited_for_before_a_tile_halves_what_is_in_flight():
    tile = [load(1) for _ in range(8)]
    assert function(*tile, use(1)).in_flight == 128
    assert function(load(0), use(0), *tile, use(1)).in_flight == (16 + 128) / 2


def test_what_returned_with_an_earlier_wait_costs_nothing_more():
    flight = function(load(0), load(1), use(0), use(1)).straight_flight
    assert flight.round_trips == 1


def test_a_scoreboard_is_waited_for_with_all_that_signals_it():
    """The second load of a scoreboard delays the use of the first."""
    early = function(load(0), load(1), use(0), load(2), use(1), use(2)).straight_flight
    late = function(load(0), use(0), load(1), load(0), use(0), use(1)).straight_flight
    assert early.round_trips == 2
    assert late.round_trips == 2
    assert function(load(0), load(1), load(0), use(0), use(1)).straight_flight.round_trips == 1


def test_loads_that_nobody_waits_for_return_at_the_end():
    flight = function(load(0), load(1)).straight_flight
    assert (flight.loaded, flight.round_trips, flight.first_wait) == (32, 1, 32)


def test_widths_are_those_of_the_instructions():
    assert [load(0, bits).width for bits in (32, 64, 128, 256)] == [4, 8, 16, 32]
    assert Instruction("LDG.E.U16").width == 2
    assert Instruction("LDG.E.S8.CONSTANT").width == 1
    assert Instruction("LDGSTS.E.BYPASS.LTC128B.128").width == 16


def test_a_loop_counts_for_itself():
    loop = [load(0), load(1), use(0, 1), branch(2)]
    code = function(load(5), use(5), *loop, load(4), use(4))
    assert code.loops == [(2, 6)]
    assert [(f.loaded, f.round_trips, f.first_wait) for f in code.loop_flights] == [(32, 1, 32)]
    assert (code.straight_flight.loaded, code.straight_flight.round_trips) == (32, 2)
    assert code.in_flight == 32


def test_of_several_loops_the_one_that_loads_most_counts():
    rows = [load(0, 32), use(0), branch(0)]
    tiles = [load(0), load(0), load(0), load(0), use(0), branch(3)]
    assert function(*rows, *tiles).in_flight == 64


def test_the_innermost_loop_counts():
    assert function(load(1), use(1), load(0), use(0), branch(2), branch(0)).loops == [(2, 5)]


def test_a_branch_forward_is_no_loop():
    assert function(branch(2), use(0), load(0), use(0)).loops == []


def test_a_loop_that_loads_ahead_keeps_two_tiles_in_flight():
    # The next tile is on its way before the last one is waited for: two registers take turns.
    ahead = [load(1), load(1), use(0), load(0), load(0), use(1), branch(0)]
    (flight,) = function(*ahead).loop_flights
    assert (flight.loaded, flight.in_flight) == (64, 64)
    behind = [load(0), load(0), use(0), load(1), load(1), use(1), branch(0)]
    assert function(*behind).loop_flights[0].in_flight == 32


def test_asynchronous_copies_are_waited_for_in_groups():
    copy, commit = Instruction("LDGSTS.E.BYPASS.128"), Instruction("LDGDEPBAR", signals=0)

    def wait(left):
        return Instruction("DEPBAR.LE", operands=f"SB0, {left:#x}")

    def stages(count):
        return function(copy, copy, commit, wait(count), branch(0)).loop_flights[0].in_flight

    assert [stages(count) for count in (0, 1, 2)] == [32, 64, 96]


def test_what_programs_exchange_is_no_feature():
    exchanged = Instruction("LDG.E.64.STRONG.GPU", signals=0)
    code = function(exchanged, use(0), branch(0), load(1), load(1, 32), Instruction("STG.E.128.STRONG.SM"))
    assert code.loops == []
    assert (code.loads(wide=True), code.loads(wide=False), code.stores(wide=True)) == (1, 1, 1)


SNIPPET = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                            /* 0x00000a00ff017b82 */
                                                                                     /* 0x000e220000000800 */
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R44, desc[UR12][R28.64] ;               /* 0x0000000c1c2c8981 */
                                                                                     /* 0x000ea8000c1e1d00 */
        /*0020*/                   FADD R57, R44.reuse, R57 ;                        /* 0x000000392c397221 */
                                                                                     /* 0x006fe20000000000 */
        /*0030*/              @!P2 BRA `(.L_x_1) ;                                   /* 0xfffffffc00d8a947 */
                                                                                     /* 0x000fea000383ffff */
"""


def test_disassembly_is_parsed_with_its_scoreboards_and_branches():
    constant, guarded, added, back = parse(SNIPPET)
    assert (constant.opcode, constant.signals, constant.waits) == ("LDC", 0, frozenset())
    assert (guarded.opcode, guarded.signals, guarded.width) == ("LDG.E.128", 2, 16)
    assert (added.name, added.signals, added.waits) == ("FADD", None, frozenset({1, 2}))
    assert (back.name, back.target) == ("BRA", 1)


PTX = """
.version 8.0
.target sm_{architecture}
.address_size 64
.visible .entry kernel(.param .u64 in, .param .u64 out, .param .u32 count)
{{
  .reg .pred %p; .reg .b64 %d<9>; .reg .b32 %r<9>; .reg .f32 %f<40>; .reg .f64 %g<9>;
  ld.param.u64 %d1, [in]; ld.param.u64 %d2, [out]; ld.param.u32 %r1, [count];
  {body}
  st.global.f32 [%d2], %f0;
  ret;
}}
"""
SUM = """
  {{ .reg .f32 %a, %b, %c, %d;
  ld.global.v4.f32 {{%a, %b, %c, %d}}, [%d1 + {offset}];
  add.f32 %a, %a, %b; add.f32 %c, %c, %d; add.f32 %a, %a, %c; add.f32 %f0, %f0, %a; }}
"""
# body, (bytes, round trips, first wait) of its loop or of straight code.
KERNELS = {
    "four rows": ("mov.f32 %f0, 0f00000000;" + "".join(SUM.format(offset=64 * i) for i in range(4)), (64, 1, 64)),
    "a chain of pointers": (
        "ld.global.u64 %d3, [%d1]; ld.global.u64 %d4, [%d3]; ld.global.u64 %d5, [%d4];"
        "cvt.rn.f32.u64 %f0, %d5;",
        (24, 3, 8),
    ),
    "pairs of registers": (
        "ld.global.v2.f64 {%g1, %g2}, [%d1]; ld.global.f64 %g3, [%d1 + 64];"
        "fma.rn.f64 %g4, %g1, %g2, %g3; cvt.rn.f32.f64 %f0, %g4;",
        (24, 1, 24),
    ),
    "a load under a predicate": (
        "setp.gt.u32 %p, %r1, 7; mov.f32 %f0, 0f00000000; @%p ld.global.f32 %f0, [%d1];"
        "ld.global.f32 %f1, [%d1 + 64]; add.f32 %f0, %f0, %f1;",
        (8, 1, 8),
    ),
    "a loop over chained pointers": (
        "AGAIN: ld.global.u64 %d1, [%d1]; sub.u32 %r1, %r1, 1; setp.ne.u32 %p, %r1, 0;"
        '.pragma "nounroll"; @%p bra AGAIN; cvt.rn.f32.u64 %f0, %d1;',
        (8, 1, 8),
    ),
}  # fmt: skip


def compiled(folder, body, architecture):
    (folder / "kernel.ptx").write_text(PTX.format(body=body, architecture=architecture))
    ptxas = machine_code.tool("ptxas")
    subprocess.run([ptxas, f"--gpu-name=sm_{architecture}", "kernel.ptx", "-o", "kernel.cubin"], cwd=folder, check=True)
    return functions(folder / "kernel.cubin")["kernel"]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_small_kernels_have_in_flight_what_they_are_written_to_have(tmp_path, name, architecture):
    pytest.importorskip("triton")
    body, expected = KERNELS[name]
    kernel = compiled(tmp_path, body, architecture)
    assert kernel.architecture == architecture
    flight = kernel.loop_flights[0] if kernel.loops else kernel.straight_flight
    assert (flight.loaded, flight.round_trips, flight.first_wait) == expected
    assert (kernel.stack, kernel.spills, kernel.stores(wide=False)) == (0, 0, 1)


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "blocks"),
    [
        # 128 registers take 4,096 for a warp: four warps for each of four partitions.
        (90, 128, 0, 4, 4),
        (90, 129, 0, 4, 3),
        (80, 96, 0, 4, 5),
        (80, 97, 0, 4, 4),
        # As many threads as a processor may have, or as many blocks.
        (90, 32, 0, 32, 2),
        (86, 32, 0, 32, 1),
        (90, 16, 0, 1, 32),
        (86, 16, 0, 1, 16),
        # 255 registers are 256: two warps for each partition.
        (90, 255, 0, 8, 1),
        # 48 KiB, and one of the system: of 164 or of 228.
        (80, 32, 48 * 1024, 4, 3),
        (90, 32, 48 * 1024, 4, 4),
        (100, 32, 113 * 1024, 4, 2),
        (100, 32, 114 * 1024, 4, 1),
    ],
)
def test_a_processor_has_room_for_so_many_blocks(architecture, registers, shared, warps, blocks):
    assert resident_blocks(architecture, registers, shared, warps) == blocks


def loop_of(*body, architecture=90):
    return Function("kernel", architecture, 64, 0, 0, (load(0), *body, branch(0)))


def test_products_without_tensor_cores_share_the_issue_slots():
    """A quarter of what is issued is not a product; 8 cycles a warp for its shared memory are fewer than that."""
    body = [Instruction("FFMA")] * 24 + [Instruction("LDS.64")] + [Instruction("FADD")] * 5
    assert loop_of(*body).product_share == (0.75, 0.75)
    crowded = [Instruction("FFMA")] * 16 + [Instruction("LDS.128")] * 2 + [Instruction("FADD")] * 12
    assert loop_of(*crowded).product_share == (0.5, 0.5)
    least, most = loop_of(*[Instruction("FFMA")] * 24, *[Instruction("LDS.128")] * 6).product_share
    assert (least, most) == (24 / 96, 0.75)


def test_products_of_tensor_cores_overlap_with_what_else_is_issued_or_wait_for_it():
    """A warp group's 64 x 128 x 16 products are 64 cycles of each partition of an H100; 32 others are issued."""
    product = Instruction("HGMMA.64x128x16.F32.BF16")
    least, most = loop_of(product, *[Instruction("FADD")] * 30).product_share
    assert (least, most) == (64 / 96, 1.0)


def test_products_of_a_warp_take_eight_cycles_of_an_a100():
    others = [Instruction("FADD")] * 6
    for opcode in ("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32"):
        assert loop_of(Instruction(opcode), *others, architecture=80).product_share == (0.5, 8 / 9)


def test_nothing_is_said_about_loops_without_products():
    assert loop_of(Instruction("FADD")).product_share == (0.0, 0.0)
