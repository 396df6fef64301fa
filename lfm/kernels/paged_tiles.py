"""What the kernels of paged attention share: parts of a row's keys, where those lie, and the online softmax.

Softmax runs in base 2: scores are scaled by log2(e) / sqrt(K). Keys past a row's end hold garbage, NaN even.
Legend: G kv heads, K head dim, B block size, M rows of a matrix product.
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
def key_offsets(table, block, n, end, g, G: tl.constexpr, K: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr):
    """Offsets [TILE] into K and V [blocks, G, B, K] of the keys from n on; `block` is the block of key n."""
    keys = n + tl.arange(0, TILE)
    if B % TILE == 0:
        return (block * G + g) * (B * K) + (keys % B) * K
    else:
        keys = tl.minimum(keys, end - 1)
        return (tl.load(table + keys // B) * G + g) * (B * K) + (keys % B) * K


@triton.jit
def softmax_step(s, largest, total, scale):
    """Weights of scores s [M, TILE], what earlier sums shrink by, and the new largest scores and sums [M]."""
    new_largest = tl.maximum(largest, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    return p, shrink, new_largest, total * shrink + tl.sum(p, 1)
