"""What the kernels of paged attention share: parts of a row's keys, where those lie, and the online softmax.

Softmax runs in base 2: scores are scaled by log2(e) / sqrt(K). Keys past a row's end hold garbage, NaN even.
Legend: G kv heads, K head dim, B block size, R rows of a block (kv_layout.py), M rows of a matrix product.
"""

import math

from lfm.kernels.triton_guard import tl, triton

LOG2_E = math.log2(math.e)
# 2^x for x between -1/2 and 1/2, the least relative error of degree 3.
C0, C1, C2, C3 = tl.constexpr(0.99992813), tl.constexpr(0.69326098), tl.constexpr(0.24261027), tl.constexpr(0.05517121)


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
def exp2_by_fma(x):
    """2^x of x <= 0 by multiplications and additions, off by 8e-5 of itself; 2^-126 below x = -126, huge for a NaN.

    x is a whole number, which becomes the exponent, and a rest of at most a half, whose power is a polynomial.
    """
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + 12582912.0  # 3 * 2^22: the nearest whole number is in the low bits
    rest = x - (shifted - 12582912.0)
    power = ((C3 * rest + C2) * rest + C1) * rest + C0
    return (power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp2_tile(x, FMA_SHARE: tl.constexpr):
    """2^x of x [M, TILE] <= 0; one of FMA_SHARE columns by `exp2_by_fma`, the others by the unit for exponentials.

    0: none. 2: every other one; 4: every other one of every second eight. So no value leaves its thread: of a product's
    sums, one has two neighbours of every eight columns.
    """
    if FMA_SHARE == 0:
        p = tl.exp2(x)
    else:
        M: tl.constexpr = x.shape[0]
        TILE: tl.constexpr = x.shape[1]
        even, odd = tl.split(x.reshape(M, TILE // 2, 2))
        if FMA_SHARE == 2:
            odd = exp2_by_fma(odd)
        else:
            first, second = tl.split(odd.reshape(M, TILE // 16, 2, 4).permute(0, 1, 3, 2))
            odd = tl.join(tl.exp2(first), exp2_by_fma(second)).permute(0, 1, 3, 2).reshape(M, TILE // 2)
        p = tl.join(tl.exp2(even), odd).reshape(M, TILE)
    return p


@triton.jit
def softmax_step(s, largest, total, scale, FMA_SHARE: tl.constexpr = 0):
    """Weights of scores s [M, TILE], what earlier sums shrink by, and the new largest scores and sums [M]."""
    new_largest = tl.maximum(largest, tl.max(s, 1) * scale)
    p = exp2_tile(s * scale - new_largest[:, None], FMA_SHARE)
    shrink = tl.exp2(largest - new_largest)
    return p, shrink, new_largest, total * shrink + tl.sum(p, 1)
