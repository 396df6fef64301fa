"""The experts of a step of more than a few tokens: pairs grouped by expert on the device, two grouped products, a sum.

    order = stable argsort of chosen;  act[i] = w[p] * silu(gate[e] x[t]) * (up[e] x[t]),  p = order[i] = (t, a)
    y[p] = down[e] act[i];  out[t] = h[t] + sum_a y[t, a], in the order of choices: neighbours change nothing

Up to some hundred tokens these are streams of weights: bytes are every chosen expert's weights once (an expert with
more pairs than a tile has rows gives later tiles their weights from L2: its tiles are neighbours in the grid). The
number of rows of an expert is known on the device only, so a tile's height is chosen by T, and skew only adds tiles.
Rounding: act (with its router weight in it) and y to the activation dtype; sums in fp32. Weights in fp8: half the
bytes; they become the activation dtype in registers, exactly, and their rows' scales multiply the sums.
Ids outside 0..E-1 mean "no expert": they get no tile and add nothing.

Legend: T tokens, D hidden, E experts, A experts per token, F expert width, P = T * A pairs, M tiles of BM pairs.
A tile is (expert, start, end): rows of `order`, all of one expert. Expert e's tiles begin at number start[e] // BM + e:
each expert finds its own without knowing the others', at the price of at most one unused number (expert -1) for each.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfm.kernels.fp8 import FP8
from lfm.kernels.moe_small import largest_divisor
from lfm.kernels.triton_guard import TensorDescriptor, has_dependent_launch, tl, triton
from lfm.kernels.tuned import grouped_tiles
from lfm.kernels.weights import ExpertScales


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def sort_pairs_kernel(
    chosen_P, order_P, tile_M3, num_pairs, num_tiles, E,
    BM: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program e: order [P] of the pairs that chose expert e, rising, and e's tiles [M]."""
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
        row += tl.sum(is_mine.to(tl.int32))


@triton.jit
def up_grouped_kernel(
    x_TD, weights_P, order_P, tile_M3, gate_up, scale_E2F, act_PF,
    A: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, BULK: tl.constexpr, HAS_SCALE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of BM, tile of BF): act [P, F] in sorted order from x [T, D].

    `gate_up` is the tensor [E, 2, F, D] or, with BULK, a descriptor of its blocks [1, 2, BF, BK]. BF rows of gate and
    the BF of up with them are one operand of the matrix unit: its rows with SWAP, which fp8 needs, since only rows can
    come from registers, where they become the dtype of x.
    """
    tile = tile_M3 + tl.program_id(0) * 3
    first_F = tl.program_id(1) * BF
    k_K = tl.arange(0, BK)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(tile)
    if expert >= 0:
        row_M = tl.load(tile + 1) + tl.arange(0, BM)
        is_row_M1 = (row_M < tl.load(tile + 2))[:, None]
        pair_M1 = tl.load(order_P + row_M[:, None], mask=is_row_M1, other=0)
        weight_M1 = tl.load(weights_P + pair_M1, mask=is_row_M1, other=0.0)
        x = x_TD + (pair_M1 // A).to(tl.int64) * D + k_K[None, :]
        both = tl.zeros((2 * BF, BM) if SWAP else (BM, 2 * BF), tl.float32)
        row_2F = tl.arange(0, 2 * BF)
        row_2F = first_F + row_2F % BF + row_2F // BF * F
        if not BULK:
            weight = gate_up + expert.to(tl.int64) * (2 * F * D) + row_2F[:, None] * D + k_K[None, :]
        for k in tl.range(0, D, BK):
            x_MK = tl.load(x + k, mask=is_row_M1, other=0.0)
            if BULK:
                w_2FK = gate_up.load([expert, 0, first_F, k]).reshape(2 * BF, BK)
            else:
                w_2FK = tl.load(weight + k)
            if SWAP:
                both = tl.dot(w_2FK.to(x_MK.dtype), x_MK.T, both)
            else:
                both = tl.dot(x_MK, w_2FK.to(x_MK.dtype).T, both)
        if SWAP:
            both = both.T
        if HAS_SCALE:
            both *= tl.load(scale_E2F + expert * (2 * F) + row_2F)[None, :]
        gate_MF, up_MF = tl.split(both.reshape(BM, 2, BF).permute(0, 2, 1))
        act_MF = gate_MF / (1 + tl.exp(-gate_MF)) * up_MF * weight_M1
        act = act_PF + row_M[:, None].to(tl.int64) * F + first_F + tl.arange(0, BF)[None, :]
        tl.store(act, act_MF.to(act_PF.dtype.element_ty), mask=is_row_M1)


@triton.jit
def down_grouped_kernel(
    order_P, tile_M3, act_PF, down, scale_ED, y_PD,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, BULK: tl.constexpr, HAS_SCALE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of BM, tile of BD): y [P, D] in the order of pairs from act [P, F] in sorted order.

    `down` is the tensor [E, D, F] or, with BULK, a descriptor of its blocks [1, BD, BK]. The tiles are read before the
    wait: `up` starts this launch only after its own wait for the sort.
    """
    tile = tile_M3 + tl.program_id(0) * 3
    first_D = tl.program_id(1) * BD
    d = first_D + tl.arange(0, BD)
    k_K = tl.arange(0, BK)
    expert = tl.load(tile, cache_modifier=".cg")
    row_M1 = (tl.load(tile + 1, cache_modifier=".cg") + tl.arange(0, BM))[:, None]
    is_row_M1 = row_M1 < tl.load(tile + 2, cache_modifier=".cg")
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if expert >= 0:
        pair_M1 = tl.load(order_P + row_M1, mask=is_row_M1, other=0)
        act = act_PF + row_M1.to(tl.int64) * F + k_K[None, :]
        if not BULK:
            weight = down + expert.to(tl.int64) * (D * F) + d[:, None] * F + k_K[None, :]
        y = tl.zeros((BD, BM) if SWAP else (BM, BD), tl.float32)
        for k in tl.range(0, F, BK):
            act_MK = tl.load(act + k, mask=is_row_M1, other=0.0)
            if BULK:
                down_DK = down.load([expert, first_D, k]).reshape(BD, BK)
            else:
                down_DK = tl.load(weight + k)
            if SWAP:
                y = tl.dot(down_DK.to(act_MK.dtype), act_MK.T, y)
            else:
                y = tl.dot(act_MK, down_DK.to(act_MK.dtype).T, y)
        y_MD = y.T if SWAP else y
        if HAS_SCALE:
            y_MD *= tl.load(scale_ED + expert * D + d)[None, :]
        to = y_PD + pair_M1.to(tl.int64) * D + d[None, :]
        tl.store(to, y_MD.to(y_PD.dtype.element_ty), mask=is_row_M1)


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


class SortedPairs(NamedTuple):
    """Pairs by expert: their order [P] and the tiles [M, 3]."""

    order_P: Tensor
    tile_M3: Tensor


def sort_pairs(chosen_TA: Tensor, num_experts: int, tile_pairs: int) -> SortedPairs:
    """Group the pairs by expert, stably, in one launch."""
    num_pairs = chosen_TA.numel()
    num_tiles = num_pairs // tile_pairs + num_experts
    is_small = num_pairs <= 1024
    is_dependent = has_dependent_launch(chosen_TA.device)
    order_P = torch.empty(num_pairs, dtype=torch.int32, device=chosen_TA.device)
    tile_M3 = torch.empty(num_tiles, 3, dtype=torch.int32, device=chosen_TA.device)
    sort_pairs_kernel[(num_experts,)](
        chosen_TA, order_P, tile_M3, num_pairs, num_tiles, num_experts,
        BM=tile_pairs, CHUNK=1024 if is_small else 4096, DEPENDENT=is_dependent,
        num_warps=4 if is_small else 8, launch_pdl=is_dependent,
    )  # fmt: skip
    return SortedPairs(order_P, tile_M3)


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


def has_copy_engine(device: torch.device) -> bool:
    """Whether blocks can be copied by descriptor: the same chips as dependent launch."""
    return has_dependent_launch(device)


def blocks_of(weight: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """A descriptor of a contiguous weight, seen in another shape, for the copy engine."""
    return TensorDescriptor.from_tensor(weight.view(shape), list(block))


def experts_grouped(
    h_TD: Tensor,
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales | None = None,
) -> Tensor:
    """As `experts_ref`, for contiguous tensors with D and F multiples of 64."""
    num_experts, hidden, width = down_EDF.shape
    num_tokens, num_chosen = chosen_TA.shape
    is_bulk, is_dependent = has_copy_engine(x_TD.device), has_dependent_launch(x_TD.device)
    tiles = grouped_tiles(x_TD.device, "fp8" if gate_up_E2FD.dtype == FP8 else "bf16", num_tokens)
    gate_up_scale, down_scale = scales or (weights_TA, weights_TA)
    pairs = sort_pairs(chosen_TA, num_experts, tiles.pairs)
    act_PF = x_TD.new_empty(num_tokens * num_chosen, width)
    y_PD = x_TD.new_empty(num_tokens * num_chosen, hidden)
    options = {"BM": tiles.pairs, "BULK": is_bulk, "HAS_SCALE": scales is not None, "DEPENDENT": is_dependent}
    tile = tiles.up
    features, inputs = largest_divisor(width, tile.features), largest_divisor(hidden, tile.inputs)
    gate_up: Any = gate_up_E2FD
    if is_bulk:
        gate_up = blocks_of(gate_up_E2FD, (num_experts, 2, width, hidden), (1, 2, features, inputs))
    up_grouped_kernel[(len(pairs.tile_M3), width // features)](
        x_TD, weights_TA, pairs.order_P, pairs.tile_M3, gate_up, gate_up_scale, act_PF,
        A=num_chosen, D=hidden, F=width, BF=features, BK=inputs, SWAP=tile.is_swapped, **options,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=is_dependent,
    )  # fmt: skip
    tile = tiles.down
    features, inputs = largest_divisor(hidden, tile.features), largest_divisor(width, tile.inputs)
    down = blocks_of(down_EDF, down_EDF.shape, (1, features, inputs)) if is_bulk else down_EDF
    down_grouped_kernel[(len(pairs.tile_M3), hidden // features)](
        pairs.order_P, pairs.tile_M3, act_PF, down, down_scale, y_PD,
        D=hidden, F=width, BD=features, BK=inputs, SWAP=tile.is_swapped, **options,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=is_dependent,
    )  # fmt: skip
    return sum_pairs(h_TD, chosen_TA, y_PD, num_experts)
