"""The experts of a step of more than a thousand tokens: x sorted by expert in memory, then two grouped products by TMA.

    order = stable argsort of chosen;  xs[i] = x[order[i] // A]
    act[i] = w[p] * silu(gate[e] xs[i]) * (up[e] xs[i]),  p = order[i];  y[p] = down[e] act[i]
    out[t] = h[t] + sum_a y[t, a], in the order of choices: neighbours change nothing

Bound by the matrix units from some 2,000 tokens on, so that rows that fill up a tile cost time: an expert with n pairs
takes ceil(n / 128) tiles. Beside the products: xs is written and read once, y too, and h once (8,192 tokens of the 24B:
44 + 48 us of some 1,250). Rounding: act (with its router weight in it) and y to the activation dtype; sums in fp32.
Ids outside 0..E-1 mean "no expert": they get no tile and add nothing.

Legend: T tokens, D hidden, E experts, EP E rounded up to a power of two, A experts per token, F expert width,
P = T * A pairs, C chunks of CHUNK pairs, M tiles of BM pairs: (expert, start, end), rows of `order`, all of one expert.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfm.kernels import moe_persistent
from lfm.kernels.moe_grouped import blocks_of, has_copy_engine, sum_pairs
from lfm.kernels.moe_small import largest_divisor
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton

MIN_TOKENS = 897  # a layer of the 24B: 768 tokens 333 us and 316 by moe_grouped, 1,024 350 and 366, 1,400 364 and 437
TILE_PAIRS = 128
CHUNK_PAIRS = 256


@triton.jit(do_not_specialize=["num_pairs"])
def count_pairs_kernel(
    chosen_P, count_CE, num_pairs, E, EP: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Program (chunk): how many of its pairs chose each expert, count [C, EP]."""
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    e = tl.arange(0, EP)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chosen = tl.load(chosen_P + pair, mask=pair < num_pairs, other=E).to(tl.int32)
    is_mine = (chosen[:, None] == e[None, :]) & (e < E)[None, :]
    tl.store(count_CE + tl.program_id(0) * EP + e, tl.sum(is_mine.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def place_pairs_kernel(
    chosen_P, count_CE, order_P, place_P, tile_M3, num_tiles_1, num_pairs, num_chunks, E,
    EP: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, IS_LATE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program c: order [P] and its inverse for the pairs of chunk c, and the tiles of expert c, tiles by expert.

    IS_LATE: `chosen` comes from the launch in front, as `count` does, and is not older.
    """
    program = tl.program_id(0)
    pair = program * CHUNK + tl.arange(0, CHUNK)
    e = tl.arange(0, EP)
    if not IS_LATE:
        chosen = tl.load(chosen_P + pair, mask=pair < num_pairs, other=E).to(tl.int32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if IS_LATE:
        chosen = tl.load(chosen_P + pair, mask=pair < num_pairs, other=E).to(tl.int32)
    total = tl.zeros((EP,), tl.int32)
    before = tl.zeros((EP,), tl.int32)
    for first in tl.range(0, num_chunks, 64):
        chunk = first + tl.arange(0, 64)[:, None]
        count = tl.load(count_CE + chunk * EP + e[None, :], mask=chunk < num_chunks, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where(chunk < program, count, 0), 0)
    start = tl.cumsum(total) - total
    is_mine = ((chosen[:, None] == e[None, :]) & (e < E)[None, :]).to(tl.int32)
    place = tl.sum(is_mine * ((start + before)[None, :] + tl.cumsum(is_mine, 0) - 1), 1)
    is_pair = (chosen >= 0) & (chosen < E)
    tl.store(order_P + place, pair, mask=is_pair)
    tl.store(place_P + pair, place, mask=is_pair)
    if program < E:
        num_tiles = (total + BM - 1) // BM
        if program == 0:
            tl.store(num_tiles_1, tl.sum(num_tiles))
        first_tile = tl.sum(tl.where(e < program, num_tiles, 0))
        row = tl.sum(tl.where(e < program, total, 0))
        end = row + tl.sum(tl.where(e == program, total, 0))
        lane = tl.arange(0, 64)
        for first in tl.range(0, (end - row + BM - 1) // BM, 64):
            out = tile_M3 + (first_tile + first + lane) * 3
            start_of = row + (first + lane) * BM
            tl.store(out, program + tl.zeros((64,), tl.int32), mask=start_of < end)
            tl.store(out + 1, start_of, mask=start_of < end)
            tl.store(out + 2, tl.minimum(start_of + BM, end), mask=start_of < end)


@triton.jit
def spread_kernel(
    x_TD, chosen_TA, place_P, x_PD, E, A: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Program (token, tile of BD): its x to its places in sorted order. `x` and `chosen` are older than the sort."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    x = tl.load(x_TD + token * D + d)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for a in tl.static_range(A):
        expert = tl.load(chosen_TA + token * A + a)
        if (expert >= 0) & (expert < E):
            tl.store(x_PD + tl.load(place_P + token * A + a).to(tl.int64) * D + d, x)


@triton.jit
def tile_and_block(program, num_tiles, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """The tile and the block of features of a program: GROUP neighbouring tiles share the weights in L2."""
    first = program // (GROUP * BLOCKS) * GROUP
    size = tl.maximum(tl.minimum(num_tiles - first, GROUP), 1)
    inside = program % (GROUP * BLOCKS)
    return first + inside % size, inside // size


@triton.jit
def rows_of(order_P, tile_M3, tile, BM: tl.constexpr):
    """Of a tile of sorted pairs, as columns: their places, which of them are the tile's, and the pairs."""
    row_M1 = tl.load(tile_M3 + tile * 3 + 1) + tl.arange(0, BM)[:, None]
    is_row_M1 = row_M1 < tl.load(tile_M3 + tile * 3 + 2)
    return row_M1, is_row_M1, tl.load(order_P + row_M1, mask=is_row_M1, other=0)


@triton.jit
def up_product(
    x_PD, tile_M3, tile, gate_up, block,
    D: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """gate and up [BM, BF] of a tile and a block of features, without the weights' scales."""
    expert = tl.load(tile_M3 + tile * 3)
    row = tl.load(tile_M3 + tile * 3 + 1)
    both = tl.zeros((BM, 2 * BF), tl.float32)
    for k in tl.range(0, D, BK):
        w_2FK = gate_up.load([expert, 0, block * BF, k]).reshape(2 * BF, BK)
        both = tl.dot(x_PD.load([row, k]), w_2FK.T, both)
    return tl.split(both.reshape(BM, 2, BF).permute(0, 2, 1))


@triton.jit
def down_product(
    act, tile_M3, tile, down, block,
    F: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [BM, BD] of a tile and a block of features, without the weights' scales."""
    expert = tl.load(tile_M3 + tile * 3)
    row = tl.load(tile_M3 + tile * 3 + 1)
    y_MD = tl.zeros((BM, BD), tl.float32)
    for k in tl.range(0, F, BK):
        down_DK = down.load([expert, block * BD, k]).reshape(BD, BK)
        y_MD = tl.dot(act.load([row, k]), down_DK.T, y_MD)
    return y_MD


@triton.jit
def up_prefill_kernel(
    x_PD, weights_P, order_P, tile_M3, num_tiles_1, gate_up, act_PF,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """act [P, F]. Descriptors: `x_PD` of blocks [BM, BK], `gate_up` of blocks [1, 2, BF, BK] of [E, 2, F, D]."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.load(num_tiles_1)
    tile, block = tile_and_block(tl.program_id(0), num_tiles, F // BF, GROUP)
    if (tile < num_tiles) & (block < F // BF):
        gate_MF, up_MF = up_product(x_PD, tile_M3, tile, gate_up, block, D, BM, BF, BK)
        row_M1, is_row_M1, pair_M1 = rows_of(order_P, tile_M3, tile, BM)
        weight_M1 = tl.load(weights_P + pair_M1, mask=is_row_M1, other=0.0)
        act_MF = gate_MF / (1 + tl.exp(-gate_MF)) * up_MF * weight_M1
        act = act_PF + row_M1.to(tl.int64) * F + block * BF + tl.arange(0, BF)[None, :]
        tl.store(act, act_MF.to(act_PF.dtype.element_ty), mask=is_row_M1)


@triton.jit
def down_prefill_kernel(
    order_P, tile_M3, num_tiles_1, act, down, y_PD,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [P, D] in the order of pairs. Descriptors: `act` of blocks [BM, BK], `down` of blocks [1, BD, BK]."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.load(num_tiles_1)
    tile, block = tile_and_block(tl.program_id(0), num_tiles, D // BD, GROUP)
    if (tile < num_tiles) & (block < D // BD):
        y_MD = down_product(act, tile_M3, tile, down, block, F, BM, BD, BK)
        _row_M1, is_row_M1, pair_M1 = rows_of(order_P, tile_M3, tile, BM)
        y = y_PD + pair_M1.to(tl.int64) * D + block * BD + tl.arange(0, BD)[None, :]
        tl.store(y, y_MD.to(y_PD.dtype.element_ty), mask=is_row_M1)


class SortedPairs(NamedTuple):
    """Pairs by expert: their order [P] and its inverse (not for a pair without an expert); the tiles, their number."""

    order_P: Tensor
    place_P: Tensor
    tile_M3: Tensor
    num_tiles_1: Tensor


def sort_pairs(chosen_TA: Tensor, num_experts: int) -> SortedPairs:
    """Group many pairs by expert, stably, in two launches."""
    num_pairs, padded = chosen_TA.numel(), 1 << (num_experts - 1).bit_length()
    num_chunks, is_dependent = triton.cdiv(num_pairs, CHUNK_PAIRS), has_dependent_launch(chosen_TA.device)
    count_CE = torch.empty(num_chunks, padded, dtype=torch.int32, device=chosen_TA.device)
    count_pairs_kernel[(num_chunks,)](
        chosen_TA, count_CE, num_pairs, num_experts,
        EP=padded, CHUNK=CHUNK_PAIRS, DEPENDENT=is_dependent, num_warps=4, launch_pdl=is_dependent,
    )  # fmt: skip
    return place_pairs(chosen_TA, count_CE, num_experts, is_late=False)


def place_pairs(chosen_TA: Tensor, count_CE: Tensor, num_experts: int, *, is_late: bool) -> SortedPairs:
    """The sort behind its histogram; `is_late` if the launch in front has written `chosen` too."""
    num_pairs, num_chunks, is_dependent = chosen_TA.numel(), len(count_CE), has_dependent_launch(chosen_TA.device)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=chosen_TA.device)

    pairs = SortedPairs(empty(num_pairs), empty(num_pairs), empty(num_pairs // TILE_PAIRS + num_experts, 3), empty(1))
    place_pairs_kernel[(max(num_chunks, num_experts),)](
        chosen_TA, count_CE, *pairs, num_pairs, num_chunks, num_experts,
        EP=count_CE.shape[1], CHUNK=CHUNK_PAIRS, BM=TILE_PAIRS, IS_LATE=is_late, DEPENDENT=is_dependent,
        num_warps=8, launch_pdl=is_dependent,
    )  # fmt: skip
    return pairs


def spread(x_TD: Tensor, chosen_TA: Tensor, place_P: Tensor, num_experts: int) -> Tensor:
    """x of every pair, in sorted order [P, D]; rows behind the last pair with an expert are not written."""
    (num_tokens, hidden), num_chosen = x_TD.shape, chosen_TA.shape[1]
    is_dependent = has_dependent_launch(x_TD.device)
    block = largest_divisor(hidden, 2048)
    x_PD = x_TD.new_empty(num_tokens * num_chosen, hidden)
    spread_kernel[(num_tokens, hidden // block)](
        x_TD, chosen_TA, place_P, x_PD, num_experts,
        A=num_chosen, D=hidden, BD=block, DEPENDENT=is_dependent, num_warps=4, launch_pdl=is_dependent,
    )  # fmt: skip
    return x_PD


def products(x_PD: Tensor, pairs: SortedPairs, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """y [P, D] of the sorted pairs, one program per tile and block."""
    num_experts, hidden, width = down_EDF.shape
    num_pairs, num_tiles = len(x_PD), len(pairs.tile_M3)
    act_PF, y_PD = x_PD.new_empty(num_pairs, width), torch.empty_like(x_PD)
    is_dependent = has_dependent_launch(x_PD.device)
    options: dict[str, Any] = {
        "D": hidden, "F": width, "BM": TILE_PAIRS, "BK": 64, "GROUP": 8, "DEPENDENT": is_dependent,
        "num_warps": 8, "num_stages": 4, "launch_pdl": is_dependent,
    }  # fmt: skip
    features = largest_divisor(width, 128)
    up_prefill_kernel[(num_tiles * (width // features),)](
        blocks_of(x_PD, x_PD.shape, (TILE_PAIRS, 64)), weights_TA, pairs.order_P, pairs.tile_M3, pairs.num_tiles_1,
        blocks_of(gate_up_E2FD, (num_experts, 2, width, hidden), (1, 2, features, 64)), act_PF,
        BF=features, **options,
    )  # fmt: skip
    features = largest_divisor(hidden, 256)
    down_prefill_kernel[(num_tiles * (hidden // features),)](
        pairs.order_P, pairs.tile_M3, pairs.num_tiles_1, blocks_of(act_PF, act_PF.shape, (TILE_PAIRS, 64)),
        blocks_of(down_EDF, down_EDF.shape, (1, features, 64)), y_PD,
        BD=features, **options,
    )  # fmt: skip
    return y_PD


@cache
def has_prefill_kernels(device: torch.device) -> bool:
    """Tiles of 192 KB and the copy engine: Hopper and the large Blackwell chips."""
    return has_copy_engine(device) and torch.cuda.get_device_capability(device)[0] in (9, 10)


def experts_prefill(
    h_TD: Tensor, x_TD: Tensor, chosen_TA: Tensor, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """As `experts_ref`, for contiguous tensors with D and F multiples of 64."""
    num_experts = len(down_EDF)
    pairs = sort_pairs(chosen_TA, num_experts)
    x_PD = spread(x_TD, chosen_TA, pairs.place_P, num_experts)
    multiply = moe_persistent.products if moe_persistent.can_run(gate_up_E2FD, down_EDF) else products
    y_PD = multiply(x_PD, pairs, weights_TA, gate_up_E2FD, down_EDF)
    return sum_pairs(h_TD, chosen_TA, y_PD, num_experts)
