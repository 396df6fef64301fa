"""What the kernels of paged attention share: tiles of K and V, the online softmax, and parts of a row's keys.

Softmax runs in base 2: scores are scaled by log2(e) / sqrt(K). Keys past a row's end hold garbage, NaN even.
Legend: G kv heads, K head dim, B block size, M rows of a matrix product.
"""

import math

from lfm.kernels.triton_guard import tl, triton

LOG2_E = math.log2(math.e)


@triton.jit
def row_parts(num_keys, parts, TILE: tl.constexpr):
    """Keys per part, and parts in use, of a row with `num_keys` keys."""
    tiles = tl.cdiv(num_keys, TILE)
    per_part = tl.maximum(tl.cdiv(tiles, parts), 1)
    return per_part * TILE, tl.cdiv(tiles, per_part)


@triton.jit
def load_kv(
    k_NGBK, v_NGBK, table, block, n, end, g,
    G: tl.constexpr, K: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, COPIES: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """k [K, TILE] and v [TILE, K] of the keys from n on; `block` is the block of key n.

    COPIES: the cache comes as descriptors of [blocks G B, K], read by the copy engine. IS_LAST: v is 0 from `end` on;
    what k is there, the mask of the scores hides.
    """
    keys, dims = n + tl.arange(0, TILE), tl.arange(0, K)
    if COPIES:
        first = (block.to(tl.int32) * G + g) * B + n % B
        k = k_NGBK.load([first, 0]).T
        v = v_NGBK.load([first, 0])
        if IS_LAST:
            v = tl.where((keys < end)[:, None], v, 0.0)
    else:
        if B % TILE == 0:
            offsets = (block * G + g) * (B * K) + (keys % B) * K
        else:
            keys_read = tl.minimum(keys, end - 1)
            offsets = (tl.load(table + keys_read // B) * G + g) * (B * K) + (keys_read % B) * K
        k = tl.load(k_NGBK + offsets[None, :] + dims[:, None])
        if IS_LAST:
            v = tl.load(v_NGBK + offsets[:, None] + dims[None, :], mask=(keys < end)[:, None], other=0.0)
        else:
            v = tl.load(v_NGBK + offsets[:, None] + dims[None, :])
    return k, v


@triton.jit
def softmax_step(q, k, v, is_key, acc, largest, total, scale, IS_MASKED: tl.constexpr):
    """Take keys k [K, TILE] and values v [TILE, K] into acc [M, K], the largest scores and their sums [M]."""
    s = tl.dot(q, k)
    if IS_MASKED:
        s = tl.where(is_key, s, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(s, 1) * scale)
    shrink = tl.exp2(largest - new_largest)
    p = tl.exp2(s * scale - new_largest[:, None])
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_largest, total * shrink + tl.sum(p, 1)
