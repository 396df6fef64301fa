"""From logits to marked ids in one launch (all rows greedy) or two: the sampler of most batches, fused.

    x      the logits, ids from the row's num_ids on masked, those seen divided by (or, if negative, multiplied with)
           the repetition penalty, ids that the row's mask lacks masked
    draw   as `lfm.kernels.draw_token` draws narrow rows with top_k <= MAX_TOP_K, and greedy rows
    mark   last id, its position, and the bit in the bitmap of seen ids, as `lfm.engine.sampler` does

Ids are those of the plain sampler, bit for bit: the same fp32 operations in the same order, CUDA's expf and log1pf,
divisions that round as IEEE says, and no fused multiply-add. NaN counts as +inf here: either fails the row.

Two launches: the largest x of every group of neighbours, by many programs; then one program per row takes the
MAX_TOP_K best groups, which hold the MAX_TOP_K best ids, and orders their members by (x, lower id). Keys of such an
order are int64: the bits of x made monotonic, then the complement of the id. Bytes: 2 V + V / 8 a row, once, and as
much as the bitmap for the mask. Legend: R rows, V vocabulary, C groups of J neighbours, W words of 32 bits of a bitmap.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lfm.kernels.random_bits import GOLDEN_GAMMA, MIX_1, MIX_2
from lfm.kernels.triton_guard import libdevice, runs_triton, tl, triton

MAX_TOP_K = 64
MAX_VOCAB = 2**17
# A group has as many ids as there are groups among the candidates, about: both sorts of a row are then the same size.
MIN_GROUP = 32
MAX_GROUPS = 2048
IDS_PER_PROGRAM = 4096
FEW_ROWS = 256  # up to here a row is drawn by twice as many warps: sooner done, and more work in all
GREEDY_IDS = 8192  # ids that the program of a greedy row reads at a time

GAMMA, MIX_A, MIX_B = tl.constexpr(GOLDEN_GAMMA), tl.constexpr(MIX_1), tl.constexpr(MIX_2)
WEIGHT_UNITS = tl.constexpr(2.0**44)
UNIFORM_STEP, HALF_STEP, HIGHEST_UNIFORM = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33), tl.constexpr(1 - 2.0**-24)


class SampledRows(NamedTuple):
    """What the device keeps of each running sequence; rows are named by `row_R`. Layouts: lfm.engine.sampling_rows."""

    floats: Tensor  # float64: temperature, top_p, min_p, repetition penalty, presence, frequency
    ints: Tensor  # int64: seed, top_k, min_position, num_ids
    seen: Tensor  # uint8 bitmap, V / 8 bytes a row
    masks: Tensor | None  # int32 bitmap of the ids that may be drawn, the same order of bits
    last_ids: Tensor  # int64
    positions: Tensor  # int64


@triton.jit
def _adjusted(logits, words, seen, masks, num_ids, penalty, V, REPETITION: tl.constexpr, MASK: tl.constexpr):
    """x [N, 32] of the ids that the words [N] of the row's bitmaps stand for, and those ids; -inf where none is drawn.

    The row's logits and bitmaps begin at the pointers.
    """
    bit = tl.arange(0, 32)[None, :]
    ids = words[:, None] * 32 + bit
    x = tl.load(logits + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    x = tl.where(ids < num_ids, x, float("-inf"))
    if REPETITION:
        is_seen = (tl.load(seen + words, mask=words * 32 < V, other=0)[:, None] >> bit) & 1
        factor = tl.where(is_seen != 0, penalty, 1.0)
        # Whatever is not positive would take the slow path of the division, for nothing.
        x = tl.where(x > 0, tl.div_rn(tl.where(x > 0, x, 1.0), factor), x * factor)
    x = tl.where(x != x, float("inf"), x)
    if MASK:
        is_allowed = (tl.load(masks + words, mask=words * 32 < V, other=0)[:, None] >> bit) & 1
        x = tl.where(is_allowed != 0, x, float("-inf"))
    return tl.where(x == 0, 0.0, x), ids  # one zero


@triton.jit
def _descending_key(x, ids):
    """int64 whose order is that of x, and among equal ones of falling ids."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _stream_at(start, index):
    """Output number `index` of the SplitMix64 stream at `start`: `random_bits.stream_at`."""
    z = start + (index + 1) * GAMMA
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * MIX_A
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * MIX_B
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _finish(row, position, token, is_drawn, seen, last_ids, positions, ids_R, r, W):
    """Mark a drawn id in its row and put it out; -1, and only the last id and position, where none was drawn."""
    tl.store(ids_R + r, tl.where(is_drawn, token, -1).to(tl.int64))
    tl.store(last_ids + row, tl.where(is_drawn, token, 0).to(tl.int64))
    tl.store(positions + row, position)
    if is_drawn:
        word = seen + row * W + (token >> 5)
        tl.store(word, tl.load(word) | (1 << (token & 31)))


@triton.jit
def _greedy_kernel(
    logits_RV, row_R, position_R, ok_R, floats, ints, seen, masks, last_ids, positions, ids_R,
    V, W, IDS: tl.constexpr, REPETITION: tl.constexpr, MASK: tl.constexpr, HAS_OK: tl.constexpr,
):  # fmt: skip
    """Program r: the lowest id with the largest x of row r."""
    r = tl.program_id(0).to(tl.int64)
    row = tl.load(row_R + r)
    penalty = tl.load(floats + row * 6 + 3).to(tl.float32)
    num_ids = tl.load(ints + row * 4 + 3)
    best = tl.full([IDS // 32, 32], float("-inf"), tl.float32)
    best_ids = tl.zeros([IDS // 32, 32], tl.int32)
    for first in range(0, V, IDS):
        words = first // 32 + tl.arange(0, IDS // 32)
        x, ids = _adjusted(
            logits_RV + r * V, words, seen + row * W, masks + row * W, num_ids, penalty, V, REPETITION, MASK
        )
        best_ids = tl.where(x > best, ids, best_ids)
        best = tl.maximum(best, x)
    largest = tl.max(tl.max(best, 1), 0)
    token = tl.min(tl.min(tl.where(best == largest, best_ids, V), 1), 0)
    is_drawn = (largest < float("inf")) & (largest > float("-inf"))
    if HAS_OK:
        is_drawn = is_drawn & (tl.load(ok_R + r) != 0)
    _finish(row, tl.load(position_R + r), token, is_drawn, seen, last_ids, positions, ids_R, r, W)


@triton.jit
def _group_maxima_kernel(
    logits_RV, row_R, floats, ints, seen, masks, maxima_RC,
    V, W, C: tl.constexpr, J: tl.constexpr, GROUPS: tl.constexpr, REPETITION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Program (i, r): the largest x of GROUPS groups of J ids of row r."""
    r = tl.program_id(1).to(tl.int64)
    row = tl.load(row_R + r)
    penalty = tl.load(floats + row * 6 + 3).to(tl.float32)
    num_ids = tl.load(ints + row * 4 + 3)
    words = tl.program_id(0) * (GROUPS * J // 32) + tl.arange(0, GROUPS * J // 32)
    x, _ = _adjusted(logits_RV + r * V, words, seen + row * W, masks + row * W, num_ids, penalty, V, REPETITION, MASK)
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    tl.store(maxima_RC + r * C + groups, tl.max(tl.reshape(x, [GROUPS, J]), 1), mask=groups < C)


@triton.jit
def _draw_kernel(
    logits_RV, row_R, position_R, ok_R, floats, ints, seen, masks, last_ids, positions, ids_R, maxima_RC,
    V, W, C: tl.constexpr, J: tl.constexpr, TOP: tl.constexpr, REPETITION: tl.constexpr, MASK: tl.constexpr,
    HAS_OK: tl.constexpr,
):  # fmt: skip
    """Program r: draw from the TOP best ids of row r, found in its TOP best groups."""
    r = tl.program_id(0).to(tl.int64)
    row = tl.load(row_R + r)
    position = tl.load(position_R + r)
    temperature = tl.load(floats + row * 6).to(tl.float32)
    top_p = tl.load(floats + row * 6 + 1)
    min_p = tl.load(floats + row * 6 + 2).to(tl.float32)
    penalty = tl.load(floats + row * 6 + 3).to(tl.float32)
    seed = tl.load(ints + row * 4)
    top_k = tl.load(ints + row * 4 + 1)
    num_ids = tl.load(ints + row * 4 + 3)

    all_groups = tl.arange(0, C)
    best = tl.topk(_descending_key(tl.load(maxima_RC + r * C + all_groups), all_groups), TOP)
    groups = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    words = tl.reshape(groups[:, None] * (J // 32) + tl.arange(0, J // 32)[None, :], [TOP * J // 32])
    x, members = _adjusted(
        logits_RV + r * V, words, seen + row * W, masks + row * W, num_ids, penalty, V, REPETITION, MASK
    )
    best = tl.topk(tl.reshape(_descending_key(x, members), [TOP * J]), TOP)
    ids = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    ordered = (best >> 32).to(tl.int32)
    x = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    rank = tl.arange(0, TOP)
    largest = tl.max(x, 0)
    is_random = temperature > 0
    z = tl.div_rn(x - largest, tl.where(is_random, temperature, 1.0))
    weights = libdevice.exp(z)
    keep = rank < top_k
    units = tl.where(keep, (weights * WEIGHT_UNITS).to(tl.int64), 0)
    wanted = tl.where(top_p >= 1, float("inf"), tl.sum(units, 0).to(tl.float64) * top_p)
    keep = keep & ((tl.cumsum(units, 0) - units).to(tl.float64) < wanted) & (weights >= min_p)
    start = _stream_at(_stream_at(seed, 0), position)
    bits = (_stream_at(start, ids.to(tl.int64)) >> 32) & 0xFFFFFFFF
    uniform = tl.minimum(bits.to(tl.float32) * UNIFORM_STEP + HALF_STEP, HIGHEST_UNIFORM)
    score = tl.where(keep, tl.div_rn(weights, -libdevice.log1p(-uniform)), -1.0)
    winner = tl.min(tl.where(score == tl.max(score, 0), rank, TOP), 0)
    winner = tl.where(is_random, winner, 0)
    token = tl.sum(tl.where(rank == winner, ids, 0), 0)
    is_drawn = (largest < float("inf")) & (largest > float("-inf"))
    if HAS_OK:
        is_drawn = is_drawn & (tl.load(ok_R + r) != 0)
    _finish(row, position, token, is_drawn, seen, last_ids, positions, ids_R, r, W)


def samples_fused(logits_RV: Tensor) -> bool:
    """Whether `sample_rows` takes these logits, as far as they decide it."""
    vocab = logits_RV.shape[1]
    return runs_triton(logits_RV) and logits_RV.is_contiguous() and vocab % 32 == 0 and vocab <= MAX_VOCAB


def sample_rows(
    logits_RV: Tensor,
    rows: SampledRows,
    *,
    row_R: Tensor,
    position_R: Tensor,
    ok_R: Tensor | None,
    repetition: bool,
    narrow_k: int,
    mask: bool = False,
) -> Tensor:
    """Ids [R] int64, marked in `rows`; -1 for rows that are not ok or whose logits hold NaN, +inf or only -inf.

    `narrow_k` bounds every top_k (0: all rows are greedy); no row draws from more ids than that.
    Raises ValueError if it exceeds MAX_TOP_K.
    """
    if narrow_k > MAX_TOP_K:
        raise ValueError(f"narrow_k={narrow_k} exceeds the {MAX_TOP_K} candidates of the fused sampler.")
    num_rows, vocab = logits_RV.shape
    ids_R = torch.empty_like(row_R)
    if num_rows == 0:
        return ids_R
    seen = rows.seen.view(torch.int32)
    words = seen.shape[1]
    mask = mask and rows.masks is not None
    tables = (rows.floats, rows.ints, seen, rows.masks if mask else seen)
    common = (logits_RV, row_R, position_R, row_R if ok_R is None else ok_R, *tables, rows.last_ids, rows.positions)
    if narrow_k == 0:
        _greedy_kernel[(num_rows,)](
            *common, ids_R, vocab, words, IDS=GREEDY_IDS, REPETITION=repetition, MASK=mask,
            HAS_OK=ok_R is not None, num_warps=32, enable_fp_fusion=False,
        )  # fmt: skip
        return ids_R
    group = max(MIN_GROUP, triton.next_power_of_2(triton.cdiv(vocab, MAX_GROUPS)))
    num_groups = max(MAX_TOP_K, triton.next_power_of_2(triton.cdiv(vocab, group)))
    maxima_RC = torch.empty(num_rows, num_groups, dtype=torch.float32, device=logits_RV.device)
    _group_maxima_kernel[(triton.cdiv(num_groups * group, IDS_PER_PROGRAM), num_rows)](
        logits_RV, row_R, *tables, maxima_RC, vocab, words,
        C=num_groups, J=group, GROUPS=IDS_PER_PROGRAM // group, REPETITION=repetition, MASK=mask, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    _draw_kernel[(num_rows,)](
        *common, ids_R, maxima_RC, vocab, words, C=num_groups, J=group, TOP=MAX_TOP_K, REPETITION=repetition, MASK=mask,
        HAS_OK=ok_R is not None, num_warps=16 if num_rows <= FEW_ROWS else 8, enable_fp_fusion=False,
    )  # fmt: skip
    return ids_R
