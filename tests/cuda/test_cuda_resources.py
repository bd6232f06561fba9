"""What the compiled GPU kernels ask for: read from the machine code inside the extension, no GPU needed."""

import re
import subprocess
from typing import NamedTuple

import pytest
from specs import machine_code

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float", "double", "Half", "BFloat16")
WARPS = 4

# Little's law: bytes in flight on a processor are bandwidth times latency, over the number of processors. With 0.65
# microseconds from a load to its use these are 12 KiB on an A100 (2.0 TB/s, 108), 16 on an H100 (3.35 TB/s, 132), 23 on
# an H200 (4.8 TB/s) and 34 on a B200 (8 TB/s, 148).
IN_FLIGHT = 40 * 1024
# A register file of 65,536 holds four blocks of 128 threads with 128 registers each, and five with 96.
FOUR_BLOCKS, FIVE_BLOCKS = 128, 96
# Two doubles for each of 128 * 8 columns of a narrow block, and a block's losses. Four blocks fit in 80 KB.
REDUCTION_SHARED = 20 * 1024


class Budget(NamedTuple):
    """in_flight: bytes per thread, in its loops, those with most first, or, where it has none, at the first wait;
    round_trips: to memory, outside of loops."""

    registers: int  # at most
    shared: int  # at most
    loads: int  # of 16 bytes, at least
    stores: int  # of 16 bytes, at least
    in_flight: tuple[int, ...]  # at least
    round_trips: int | None = None  # at most


# A tile of eight rows, once in the loop and once in the tail. A tap stores what it loads.
REDUCTION = Budget(FOUR_BLOCKS, REDUCTION_SHARED, 16, 0, (8 * 16,))
TAP = REDUCTION._replace(stores=16)
# Tiles of four rows, the first together with the coefficients, all others in the loop, with a gradient to add and
# without. Both exist for 16 bytes and for less: four versions with one round trip each, or two where loads share one of
# the six scoreboards.
BACKWARD = Budget(FIVE_BLOCKS, 0, 24, 16, (8 * 16, 4 * 16), 6)


def match_budget(vectors: int) -> Budget:
    """Of `vectors` packed vectors, among them moments and weights, 16 bytes of each, in coalesced accesses of less."""
    return Budget(FIVE_BLOCKS, 4 * 1024, 0, 0, (vectors * 16,))


BUDGETS = {
    "moments_kernelI": REDUCTION,
    "match_features_kernelI": REDUCTION,
    "relu_moments_kernelI": TAP,
    "moments_backward_kernelI": BACKWARD,
    "relu_moments_backward_kernelI": BACKWARD,
    # Without an average, with a moving one, and with that of ADAM.
    "match_moments_kernelINS_9NoAverageE": match_budget(2 * 3),
    "match_moments_kernelINS_13MovingAverageE": match_budget(2 * 4),
    "match_moments_kernelINS_11AdamAverageE": match_budget(2 * 6),
}


@pytest.fixture(scope="module")
def kernels(library):
    """{architecture: {mangled kernel: its machine code}}."""
    try:
        return machine_code.library_functions(library)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def budget_of(name: str) -> tuple[str, Budget]:
    """(prefix of the mangled name, budget)."""
    return next((kernel, budget) for kernel, budget in BUDGETS.items() if re.search(rf"\d{kernel}", name))


def test_every_kernel_is_there_for_every_architecture(kernels):
    for architecture in ARCHITECTURES:
        found = [budget_of(name)[0] for name in kernels[architecture]]
        assert {kernel: found.count(kernel) for kernel in BUDGETS} == {
            "moments_kernelI": len(DTYPES),
            "match_features_kernelI": 3 * len(DTYPES),
            "relu_moments_kernelI": len(DTYPES),
            "moments_backward_kernelI": len(DTYPES),
            "relu_moments_backward_kernelI": len(DTYPES),
            "match_moments_kernelINS_9NoAverageE": 2,
            "match_moments_kernelINS_13MovingAverageE": 2,
            "match_moments_kernelINS_11AdamAverageE": 2,
        }, architecture


def flights(function: machine_code.Function) -> list[int]:
    """Bytes in flight per thread, as in a budget."""
    loops = sorted((round(loop.in_flight) for loop in function.loop_flights), reverse=True)
    return loops or [function.straight_flight.first_wait]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_stay_within_their_budgets(kernels, architecture):
    rows = []
    for name, function in sorted(kernels[architecture].items()):
        _, budget = budget_of(name)
        most = [
            ("registers", function.registers, budget.registers),
            ("shared", function.shared, budget.shared),
            ("stack", function.stack, 0),
            ("spills", function.spills, 0),
        ]
        if budget.round_trips is not None:
            most.append(("round trips", round(function.straight_flight.round_trips), budget.round_trips))
        least = [
            ("16-byte loads", function.loads(wide=True), budget.loads),
            ("16-byte stores", function.stores(wide=True), budget.stores),
        ]
        threads = 32 * WARPS * function.resident_blocks(WARPS)
        found = flights(function) + [0] * len(budget.in_flight)
        for wanted, got in zip(budget.in_flight, found, strict=False):
            least += [("in flight", got, wanted), ("in flight of a processor", threads * got, IN_FLIGHT)]
        rows += [f"{what:25} {got:6} > {limit:6}  {name}" for what, got, limit in most if got > limit]
        rows += [f"{what:25} {got:6} < {limit:6}  {name}" for what, got, limit in least if got < limit]
    assert not rows, "\n" + "\n".join(rows)


def test_the_library_needs_nothing_of_a_cuda_build(library):
    """One file for CPU and CUDA builds of torch: no CUDA library is needed, the only CUDA symbol is weak."""
    needed = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    assert "libtorch.so" in needed
    assert not re.search(r"NEEDED.*(cuda|cudart|c10_cuda)", needed)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True)
    undefined = [line.split() for line in symbols.stdout.splitlines()]
    assert ["w", "aoti_torch_get_current_cuda_stream"] in undefined
    assert not [name for _, name in undefined if re.match(r"_ZNK?(2at|3c10)", name)]
