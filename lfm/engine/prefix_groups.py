"""Which rows of a decode step share leading blocks, so that attention reads those once for up to 16 rows.

With prefix caching the same tokens have the same blocks, so equal ids in a column mean equal tables up to there. One
depth serves the whole batch: that at which most reads of a block fall away. Legend: S rows, N blocks, Y tiles.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

TILE_ROWS = 16  # rows that one program attends together
MIN_ROWS = 8  # of a group; so a batch of S rows has at most S // MIN_ROWS tiles
# Reads of a block that must fall away in a step. On an H200, blocks of 128 tokens, a layer of 16 rows that share 32
# blocks gains nothing, 64 rows that share 8 gain 9 of 31 us, 256 rows that share 32 gain 217 of 307 us.
MIN_SAVED_BLOCKS = 400


class PrefixGroups(NamedTuple):
    """Shared leading blocks of each row [S], and the rows of each tile [S // MIN_ROWS, 16], -1 where there are none."""

    blocks_S: Ints
    tiles_YX: Ints


def group_by_prefix(tables_SN: Ints, num_whole_S: Ints) -> PrefixGroups | None:
    """Groups among rows of a single token, or None where sharing saves too little.

    `num_whole_S` is how many leading blocks of a row are whole and before its position.
    """
    depth = _best_depth(tables_SN, num_whole_S)
    if depth == 0:
        return None
    num_rows = len(tables_SN)
    blocks_S = np.zeros(num_rows, dtype=np.int64)
    tiles_YX = np.full((num_rows // MIN_ROWS, TILE_ROWS), -1, dtype=np.int64)
    num_tiles = 0
    for rows in _groups_at(tables_SN, num_whole_S, depth):
        columns = tables_SN[rows, : num_whole_S[rows].min()]
        is_shared = (columns == columns[0]).all(axis=0)
        blocks_S[rows] = len(is_shared) if is_shared.all() else is_shared.argmin()
        for begin in range(0, len(rows), TILE_ROWS):
            tile = rows[begin : begin + TILE_ROWS]
            tiles_YX[num_tiles, : len(tile)] = tile
            num_tiles += 1
    return PrefixGroups(blocks_S, tiles_YX)


def _groups_at(tables_SN: Ints, num_whole_S: Ints, depth: int) -> list[Ints]:
    """Rows of each group of MIN_ROWS or more that share `depth` blocks."""
    rows = np.flatnonzero(num_whole_S >= depth)
    rows = rows[np.argsort(tables_SN[rows, depth - 1], kind="stable")]
    ends = np.flatnonzero(np.diff(tables_SN[rows, depth - 1])) + 1
    return [group for group in np.split(rows, ends) if len(group) >= MIN_ROWS]


def _best_depth(tables_SN: Ints, num_whole_S: Ints) -> int:
    """The number of leading blocks, a power of two, that saves most reads; 0 if none saves enough."""
    best, best_saved, depth = 0, MIN_SAVED_BLOCKS - 1, 1
    while depth <= num_whole_S.max(initial=0):
        groups = _groups_at(tables_SN, num_whole_S, depth)
        saved = depth * sum(len(group) - -(-len(group) // TILE_ROWS) for group in groups)
        if saved > best_saved:
            best, best_saved = depth, saved
        if not groups:
            break
        depth *= 2
    return best
