"""What the kernels of paged attention share: parts of a row's keys, where those lie, and the online softmax.

Softmax runs in base 2: scores are scaled by log2(e) / sqrt(K). Keys past a row's end hold garbage, NaN even.
Legend: G kv heads, K head dim, B block size, R rows of a block (kv_layout.py), M rows of a matrix product.
"""

import math

from lfm.kernels.triton_guard import tl, triton

LOG2_E = math.log2(math.e)


@triton.jit
def row_parts(num_keys, parts, min_tiles, TILE: tl.constexpr):
    """Keys per part, and parts in use, of a row with `num_keys` keys; a part has `min_tiles` tiles or more."""
    tiles = tl.cdiv(num_keys, TILE)
    per_part = tl.maximum(tl.cdiv(tiles, parts), min_tiles)
    return per_part * TILE, tl.cdiv(tiles, per_part)


@triton.jit
def key_offsets(
    table, block, n, end, g, G: tl.constexpr, K: tl.constexpr, B: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Offsets [TILE] into K and V [blocks, G, R, K] of the keys from n on, and, in fp8 (R > B), into the bytes of their
    scales; `block` is the block of key n."""
    keys = n + tl.arange(0, TILE)
    if B % TILE == 0:
        first = (block * G + g) * (R * K)
        return first + (keys % B) * K, first + B * K + keys % B
    else:
        keys = tl.minimum(keys, end - 1)
        first = (tl.load(table + keys // B) * G + g) * (R * K)
        return first + (keys % B) * K, first + B * K + keys % B


@triton.jit
def softmax_step(s, largest, total, scale):
    """Weights of scores s [M, TILE], what earlier sums shrink by, and the new largest scores and sums [M]."""
    new_largest = tl.maximum(largest, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    return p, shrink, new_largest, total * shrink + tl.sum(p, 1)
