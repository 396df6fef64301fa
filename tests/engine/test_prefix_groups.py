"""Groups of rows with the same leading blocks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lfm.engine.prefix_groups import MIN_ROWS, TILE_ROWS, group_by_prefix


def tables_of(rows: list[list[int]]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int64)


def test_agents_share_their_prefix() -> None:
    rows = [[*range(1, 33), 100 + 2 * i, 101 + 2 * i] for i in range(40)]
    found = group_by_prefix(tables_of(rows), np.full(40, 33))
    assert found is not None
    assert found.blocks_S.tolist() == [32] * 40
    assert found.tiles_YX.shape == (5, 16)
    assert sorted(found.tiles_YX[found.tiles_YX >= 0].tolist()) == list(range(40))


def test_a_row_shares_only_blocks_before_its_position() -> None:
    rows = [list(range(1, 42))] * 16
    found = group_by_prefix(tables_of(rows), np.array([40] * 14 + [33, 31]))
    assert found is not None
    assert found.blocks_S.tolist() == [33] * 15 + [0]


def test_few_rows_and_short_prefixes_are_left_alone() -> None:
    long = [[*range(1, 65), 100 + i] for i in range(MIN_ROWS - 1)]
    assert group_by_prefix(tables_of(long), np.full(len(long), 64)) is None
    short = [[1, 2, 100 + i] for i in range(64)]
    assert group_by_prefix(tables_of(short), np.full(64, 2)) is None
    apart = [list(range(100 * i, 100 * i + 40)) for i in range(1, 64)]
    assert group_by_prefix(tables_of(apart), np.full(63, 39)) is None


def test_the_deeper_of_nested_prefixes_wins_if_it_saves_more() -> None:
    """64 rows share 2 blocks, and 16 of each four groups 20 more."""
    rows = [[1, 2, *range(100 * (i % 4 + 1), 100 * (i % 4 + 1) + 20), 1000 + i] for i in range(64)]
    found = group_by_prefix(tables_of(rows), np.full(64, 22))
    assert found is not None
    assert found.blocks_S.tolist() == [22] * 64
    assert all(len({row % 4 for row in tile if row >= 0}) <= 1 for tile in found.tiles_YX.tolist())


@given(st.data())
def test_what_a_tile_shares_is_shared(data: st.DataObject) -> None:
    num_prefixes = data.draw(st.integers(1, 3))
    depth = data.draw(st.integers(1, 70))
    rows, whole = [], []
    next_block = 1 + num_prefixes * depth
    for _ in range(data.draw(st.integers(1, 60))):
        prefix = data.draw(st.integers(0, num_prefixes - 1))
        shared = data.draw(st.integers(0, depth))
        own = data.draw(st.integers(1, 3))
        rows.append([1 + prefix * depth + j for j in range(shared)] + [next_block + j for j in range(own)])
        next_block += own
        whole.append(data.draw(st.integers(0, len(rows[-1]) - 1)))
    found = group_by_prefix(tables_of(rows), np.array(whole))
    if found is None:
        return
    used = found.tiles_YX[found.tiles_YX >= 0].tolist()
    assert len(used) == len(set(used))
    assert found.tiles_YX.shape == (len(rows) // MIN_ROWS, TILE_ROWS)
    assert set(np.flatnonzero(found.blocks_S)) == set(used)
    for tile in found.tiles_YX.tolist():
        members = [row for row in tile if row >= 0]
        assert (not members) == (tile[0] < 0)
        for row in members:
            blocks = int(found.blocks_S[row])
            assert blocks == found.blocks_S[members[0]]
            assert blocks <= whole[row]
            assert rows[row][:blocks] == rows[members[0]][:blocks]
