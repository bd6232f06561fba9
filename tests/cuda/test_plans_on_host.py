"""How launches of one layer are cut: enough bytes in flight, no split that does not pay."""

import pytest
from helpers import DTYPES

MULTIPROCESSORS = 132  # of an H100 or H200
KILOBYTES_IN_FLIGHT = 40  # on each of them
BLOCK_ROWS, THREAD_ROWS, VECTOR_BYTES = 512, 32, 16
WARP = 32
TILE_ROWS = {"reduction": 8, "elementwise": 4}


def ceil_div(a, b):
    return -(-a // b)


class Cut:
    """A plan, and what follows from it. Rows of 16-byte vectors."""

    def __init__(self, module, rows, columns, element_size, cut="reduction"):
        plan = module.plan(rows, columns, element_size, True, cut == "elementwise")
        self.blocks, self.lanes, self.groups, self.chunks = (plan[k] for k in ("blocks", "lanes", "groups", "chunks"))
        tile = TILE_ROWS[cut]
        block_rows = min(rows, BLOCK_ROWS)
        self.thread_rows = ceil_div(ceil_div(block_rows, tile), self.groups) * tile
        self.tensor = rows * columns * element_size
        # Every group of every chunk has a tile of the whole row on its way.
        groups = ceil_div(block_rows, self.thread_rows)
        self.in_flight = min(self.tensor, self.chunks * groups * tile * columns * element_size)
        self.tiles = ceil_div(self.thread_rows, tile)

    @property
    def kilobytes(self):
        """In flight per multiprocessor."""
        return round(self.in_flight / MULTIPROCESSORS / 1024, 1)


# (rows, columns, bytes of an element): (blocks, lanes, chunks, kilobytes in flight per multiprocessor). What cannot
# reach 40 kilobytes is in flight as a whole, or in two parts where there are more rows than groups can take at once.
PLANS = {
    (16, 2048, 2): (4, 64, 1, 0.5),
    (16, 65536, 4): (256, 64, 1, 31.0),
    (64, 256, 2): (2, 16, 1, 0.2),
    (64, 2048, 2): (16, 16, 1, 1.9),
    (64, 2048, 4): (32, 16, 1, 3.9),
    (64, 8192, 4): (128, 16, 1, 15.5),
    (64, 32768, 2): (256, 16, 1, 31.0),
    (64, 32768, 4): (512, 16, 1, 62.1),
    (64, 65536, 2): (512, 16, 1, 62.1),
    (64, 65536, 4): (512, 32, 1, 62.1),
    (256, 256, 4): (16, 4, 1, 1.9),
    (256, 2048, 2): (64, 4, 1, 7.8),
    (256, 8192, 4): (512, 4, 1, 62.1),
    (256, 65536, 4): (512, 32, 1, 62.1),
    (1024, 256, 2): (16, 4, 2, 1.9),
    (1024, 2048, 4): (256, 4, 2, 31.0),
    (1024, 65536, 2): (512, 32, 2, 62.1),
}


@pytest.mark.parametrize(("shape", "expected"), PLANS.items(), ids=str)
def test_plans_of_a_reduction(module, shape, expected):
    cut = Cut(module, *shape)
    assert (cut.blocks, cut.lanes, cut.chunks, cut.kilobytes) == expected


@pytest.mark.parametrize("rows", [1, 7, 8, 16, 64, 100, 256, 512, 1024, 100_000])
@pytest.mark.parametrize("columns", [8, 64, 256, 2048, 8192, 32768, 65536, 1 << 20])
@pytest.mark.parametrize("element_size", sorted({dtype.itemsize for dtype in DTYPES}))
@pytest.mark.parametrize("cut", TILE_ROWS)
def test_enough_is_in_flight_or_nothing_is_left_to_split(module, rows, columns, element_size, cut):
    plan = Cut(module, rows, columns, element_size, cut)
    pieces_are_short = plan.lanes * VECTOR_BYTES <= 64
    # Where groups do not divide the tiles, up to half of them have none.
    assert plan.kilobytes >= KILOBYTES_IN_FLIGHT / 2 or plan.tiles == 1 or pieces_are_short
    assert plan.thread_rows <= THREAD_ROWS or plan.lanes <= WARP
    # Chunks cost a ticket, and are for numerics alone.
    assert plan.chunks == ceil_div(rows, BLOCK_ROWS)


@pytest.mark.parametrize(("rows", "groups"), [(16, 1), (32, 1), (64, 2), (128, 4), (512, 4)])
def test_a_large_layer_is_split_for_the_length_of_walks_alone(module, rows, groups):
    assert Cut(module, rows, 1 << 22, 4).groups == groups


@pytest.mark.parametrize("vectors", [1, 5, 16, 127])
def test_fewer_than_half_of_the_lanes_have_no_columns_while_tiles_are_left(module, vectors):
    plan = Cut(module, 100_000, 4 * vectors, 4)
    assert plan.lanes < 2 * vectors or plan.tiles == 1


def test_short_rows_are_not_split(module):
    assert module.plan(8, 64, 4, True, False)["groups"] == 1
