"""The experts of a step of more than a few tokens: pairs grouped by expert on the device, two grouped products, a sum.

    order = stable argsort of chosen;  act[i] = w[p] * silu(gate[e] x[t]) * (up[e] x[t]),  p = order[i] = (t, a)
    y[p] = down[e] act[i];  out[t] = h[t] + sum_a y[t, a], in the order of choices: neighbours change nothing

Up to some hundred tokens these are streams of weights: bytes are every chosen expert's weights once (an expert with
more pairs than a tile has rows gives later tiles their weights from L2: its tiles are neighbours in the grid). The
number of rows of an expert is known on the device only, so a tile's height is chosen by T, and skew only adds tiles.
Rounding: act (with its router weight in it) and y to the activation dtype; sums in fp32.
Ids outside 0..E-1 mean "no expert": they get no tile and add nothing.

Legend: T tokens, D hidden, E experts, A experts per token, F expert width, P = T * A pairs, M tiles of BM pairs.
A tile is (expert, start, end): rows of `order`, all of one expert. Expert e's tiles begin at number start[e] // BM + e:
each expert finds its own without knowing the others', at the price of at most one unused number (expert -1) for each.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lfm.kernels.moe_small import largest_divisor
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton


class Tile(NamedTuple):
    """Features per program, inputs per step; whether weights take the rows of the matrix unit; warps and stages."""

    features: int
    inputs: int
    is_swapped: bool
    warps: int
    stages: int


class Tiles(NamedTuple):
    """For up to `tokens`: pairs per tile, and the tiles of the two products."""

    tokens: int
    pairs: int
    up: Tile
    down: Tile


# Two programs share a multiprocessor of 228 KB. Measured on an H200 for 64 experts of 2048 x 1536, uniform and Zipf-skewed routing.
HOPPER_TILES = (
    Tiles(20, 16, Tile(32, 128, False, 4, 4), Tile(64, 128, True, 4, 5)),
    Tiles(192, 16, Tile(64, 128, True, 4, 3), Tile(64, 128, True, 4, 5)),
    Tiles(384, 32, Tile(64, 64, True, 4, 5), Tile(128, 64, True, 4, 5)),
    Tiles(1 << 62, 64, Tile(64, 64, False, 4, 4), Tile(128, 64, True, 4, 4)),
)
# Fits 96 KB of shared memory (capability 8.0 and later); not measured.
OTHER_TILES = (
    Tiles(192, 16, Tile(32, 64, False, 4, 4), Tile(64, 64, False, 4, 4)),
    Tiles(1 << 62, 64, Tile(64, 32, False, 4, 4), Tile(128, 32, False, 4, 4)),
)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def sort_pairs_kernel(
    chosen_P, order_P, place_P, start_E1, tile_M3, num_pairs, num_tiles, E,
    BM: tl.constexpr, CHUNK: tl.constexpr, HAS_PLACES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program e: order [P] of the pairs that chose expert e, rising; their places in it; e's start and tiles."""
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    below = tl.zeros((CHUNK,), tl.int32)
    equal = tl.zeros((CHUNK,), tl.int32)
    for first in tl.range(0, num_pairs, CHUNK):
        chosen = tl.load(chosen_P + first + lane, mask=first + lane < num_pairs, other=E).to(tl.int32)
        below += ((chosen < expert) & (chosen >= 0)).to(tl.int32)
        equal += (chosen == expert).to(tl.int32)
    start = tl.sum(below)
    end = start + tl.sum(equal)
    tl.store(start_E1 + expert, start)
    if expert == E - 1:
        tl.store(start_E1 + E, end)
    first_tile = start // BM + expert
    next_tile = tl.where(expert == E - 1, num_tiles, end // BM + expert + 1)
    tile_lane = tl.arange(0, 64)
    for tile in tl.range(first_tile, next_tile, 64):
        row = start + (tile + tile_lane - first_tile) * BM
        is_mine = tile + tile_lane < next_tile
        out = tile_M3 + (tile + tile_lane) * 3
        tl.store(out, tl.where(row < end, expert, -1), mask=is_mine)
        tl.store(out + 1, row, mask=is_mine)
        tl.store(out + 2, tl.minimum(row + BM, end), mask=is_mine)
    row = start
    for first in tl.range(0, num_pairs, CHUNK):
        chosen = tl.load(chosen_P + first + lane, mask=first + lane < num_pairs, other=E).to(tl.int32)
        is_mine = chosen == expert
        place = row + tl.cumsum(is_mine.to(tl.int32)) - 1
        tl.store(order_P + place, first + lane, mask=is_mine)
        if HAS_PLACES:
            tl.store(place_P + first + lane, place, mask=is_mine)
        row += tl.sum(is_mine.to(tl.int32))


@triton.jit
def up_grouped_kernel(
    x_TD, weights_P, order_P, tile_M3, gate_up_E2FD, act_PF,
    A: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of BM, tile of BF): act [P, F] in sorted order from x [T, D]."""
    tile = tile_M3 + tl.program_id(0) * 3
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    k_K = tl.arange(0, BK)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(tile).to(tl.int64)
    if expert >= 0:
        row_M = tl.load(tile + 1) + tl.arange(0, BM)
        is_row_M = row_M < tl.load(tile + 2)
        pair_M = tl.load(order_P + row_M, mask=is_row_M, other=0)
        weight_M = tl.load(weights_P + pair_M, mask=is_row_M, other=0.0)
        x = x_TD + (pair_M // A).to(tl.int64)[:, None] * D + k_K[None, :]
        gate = gate_up_E2FD + expert * (2 * F * D) + f[:, None] * D + k_K[None, :]
        gate_sum = tl.zeros((BF, BM) if SWAP else (BM, BF), tl.float32)
        up_sum = tl.zeros((BF, BM) if SWAP else (BM, BF), tl.float32)
        for k in tl.range(0, D, BK):
            x_MK = tl.load(x + k, mask=is_row_M[:, None], other=0.0)
            gate_FK = tl.load(gate + k)
            up_FK = tl.load(gate + F * D + k)
            if SWAP:
                gate_sum = tl.dot(gate_FK, x_MK.T, gate_sum)
                up_sum = tl.dot(up_FK, x_MK.T, up_sum)
            else:
                gate_sum = tl.dot(x_MK, gate_FK.T, gate_sum)
                up_sum = tl.dot(x_MK, up_FK.T, up_sum)
        act = gate_sum / (1 + tl.exp(-gate_sum)) * up_sum
        if SWAP:
            act = act.T
        act_MF = (act * weight_M[:, None]).to(act_PF.dtype.element_ty)
        tl.store(act_PF + row_M.to(tl.int64)[:, None] * F + f[None, :], act_MF, mask=is_row_M[:, None])


@triton.jit
def down_grouped_kernel(
    order_P, tile_M3, act_PF, down_EDF, y_PD,
    D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of BM, tile of BD): y [P, D] in the order of pairs from act [P, F] in sorted order.

    The tiles are read before the wait: `up` starts this launch only after its own wait for the sort.
    """
    tile = tile_M3 + tl.program_id(0) * 3
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    k_K = tl.arange(0, BK)
    expert = tl.load(tile, cache_modifier=".cg").to(tl.int64)
    row_M = tl.load(tile + 1, cache_modifier=".cg") + tl.arange(0, BM)
    is_row_M = row_M < tl.load(tile + 2, cache_modifier=".cg")
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if expert >= 0:
        pair_M = tl.load(order_P + row_M, mask=is_row_M, other=0)
        act = act_PF + row_M.to(tl.int64)[:, None] * F + k_K[None, :]
        weight = down_EDF + expert * (D * F) + d[:, None] * F + k_K[None, :]
        y_sum = tl.zeros((BD, BM) if SWAP else (BM, BD), tl.float32)
        for k in tl.range(0, F, BK):
            act_MK = tl.load(act + k, mask=is_row_M[:, None], other=0.0)
            down_DK = tl.load(weight + k)
            if SWAP:
                y_sum = tl.dot(down_DK, act_MK.T, y_sum)
            else:
                y_sum = tl.dot(act_MK, down_DK.T, y_sum)
        if SWAP:
            y_sum = y_sum.T
        y = y_PD + pair_M.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(y, y_sum.to(y_PD.dtype.element_ty), mask=is_row_M[:, None])


@triton.jit
def sum_pairs_kernel(
    h_TD, chosen_TA, y_PD, out_TD, E, A: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Program (token, tile of BD): out[t] = h[t] + sum_a y[t, a]. `h` and `chosen` are older than `down`'s launch."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    out_D = tl.load(h_TD + token * D + d).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for a in tl.static_range(A):
        expert = tl.load(chosen_TA + token * A + a)
        is_expert = (expert >= 0) & (expert < E)
        out_D += tl.load(y_PD + (token * A + a) * D + d, mask=is_expert, other=0.0).to(tl.float32)
    tl.store(out_TD + token * D + d, out_D.to(out_TD.dtype.element_ty))


@cache
def _tables(device: torch.device) -> tuple[Tiles, ...]:
    """By the shared memory of a multiprocessor: 228 KB on Hopper and on large Blackwell chips, 100 to 164 elsewhere."""
    is_large = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return HOPPER_TILES if is_large else OTHER_TILES


class SortedPairs(NamedTuple):
    """Pairs by expert: order and its inverse [P] (a pair without an expert has no place), starts, tiles."""

    order_P: Tensor
    place_P: Tensor
    start_E1: Tensor
    tile_M3: Tensor


def sort_pairs(chosen_TA: Tensor, num_experts: int, tile_pairs: int, *, has_places: bool = False) -> SortedPairs:
    """Group the pairs by expert, stably, in one launch."""
    num_pairs = chosen_TA.numel()
    num_tiles = num_pairs // tile_pairs + num_experts
    is_small = num_pairs <= 1024
    is_dependent = has_dependent_launch(chosen_TA.device)
    order_P, start_E1, tile_M3 = (
        torch.empty(size, dtype=torch.int32, device=chosen_TA.device)
        for size in (num_pairs, num_experts + 1, (num_tiles, 3))
    )
    place_P = torch.empty_like(order_P) if has_places else order_P
    sort_pairs_kernel[(num_experts,)](
        chosen_TA, order_P, place_P, start_E1, tile_M3, num_pairs, num_tiles, num_experts,
        BM=tile_pairs, CHUNK=1024 if is_small else 4096, HAS_PLACES=has_places, DEPENDENT=is_dependent,
        num_warps=4 if is_small else 8, launch_pdl=is_dependent,
    )  # fmt: skip
    return SortedPairs(order_P, place_P, start_E1, tile_M3)


def sum_pairs(h_TD: Tensor, chosen_TA: Tensor, y_PD: Tensor, num_experts: int) -> Tensor:
    """The residual plus each token's pairs [T, D]."""
    (num_tokens, hidden), num_chosen = h_TD.shape, chosen_TA.shape[1]
    is_dependent = has_dependent_launch(h_TD.device)
    out_TD = torch.empty_like(h_TD)
    block = largest_divisor(hidden, 2048)
    sum_pairs_kernel[(num_tokens, hidden // block)](
        h_TD, chosen_TA, y_PD, out_TD, num_experts,
        A=num_chosen, D=hidden, BD=block, DEPENDENT=is_dependent, num_warps=4, launch_pdl=is_dependent,
    )  # fmt: skip
    return out_TD


def experts_grouped(
    h_TD: Tensor, x_TD: Tensor, chosen_TA: Tensor, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """As `experts_ref`, for contiguous tensors with D and F multiples of 64."""
    num_experts, hidden, width = down_EDF.shape
    num_tokens, num_chosen = chosen_TA.shape
    is_dependent = has_dependent_launch(x_TD.device)
    tiles = next(tiles for tiles in _tables(x_TD.device) if num_tokens <= tiles.tokens)
    pairs = sort_pairs(chosen_TA, num_experts, tiles.pairs)
    act_PF = x_TD.new_empty(num_tokens * num_chosen, width)
    y_PD = x_TD.new_empty(num_tokens * num_chosen, hidden)
    tile = tiles.up
    features = largest_divisor(width, tile.features)
    up_grouped_kernel[(len(pairs.tile_M3), width // features)](
        x_TD, weights_TA, pairs.order_P, pairs.tile_M3, gate_up_E2FD, act_PF,
        A=num_chosen, D=hidden, F=width, BM=tiles.pairs, BF=features, BK=largest_divisor(hidden, tile.inputs),
        SWAP=tile.is_swapped, DEPENDENT=is_dependent,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=is_dependent,
    )  # fmt: skip
    tile = tiles.down
    features = largest_divisor(hidden, tile.features)
    down_grouped_kernel[(len(pairs.tile_M3), hidden // features)](
        pairs.order_P, pairs.tile_M3, act_PF, down_EDF, y_PD,
        D=hidden, F=width, BM=tiles.pairs, BD=features, BK=largest_divisor(width, tile.inputs),
        SWAP=tile.is_swapped, DEPENDENT=is_dependent,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=is_dependent,
    )  # fmt: skip
    return sum_pairs(h_TD, chosen_TA, y_PD, num_experts)
