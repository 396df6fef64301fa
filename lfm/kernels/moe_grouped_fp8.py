"""The experts of a step of some tokens with weights and activations in fp8: moe_grouped.py without conversions.

    act[i] = w[p] * silu(a s_g (gate8 x8[t])) * (a s_u (up8 x8[t])),  p = order[i] = (t, a);  x8 = e4m3(x / a)
    y[p] = s_d sum_j b[i, j] (down8 e4m3(act[i] / b[i, j]))           j: blocks of BF features, one scale each

A row's largest act is known only when all of it is; a scale per block of it is known to the program that makes the
block, so that act needs no pass of its own. Bytes as moe_grouped with fp8 weights; x8 and act8 are half of x and act.
Weights are the rows of the matrix unit: they come from shared memory as they are.

Legend: as moe_grouped.py.
"""

from typing import Any

import torch
from torch import Tensor

from lfm.kernels.fp8 import FP8, FP8_MAX
from lfm.kernels.fp8_gemm import quantise_tokens
from lfm.kernels.moe_grouped import blocks_of, has_copy_engine, sort_pairs, sum_pairs
from lfm.kernels.moe_small import largest_divisor
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton
from lfm.kernels.tuned import grouped_tiles
from lfm.kernels.weights import ExpertScales


@triton.jit
def up_grouped_fp8_kernel(
    x_TD, x_scale_T, weights_P, order_P, tile_M3, gate_up, scale_E2F, act_PF, act_scale_PJ,
    A: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    MAX: tl.constexpr, BULK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of BM, tile of BF): act [P, F] and its scales [P, F / BF] in sorted order from x [T, D].

    `gate_up` is the tensor [E, 2, F, D] or, with BULK, a descriptor of its blocks [1, 2, BF, BK].
    """
    tile = tile_M3 + tl.program_id(0) * 3
    block = tl.program_id(1)
    k_K = tl.arange(0, BK)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(tile)
    if expert >= 0:
        row_M = tl.load(tile + 1) + tl.arange(0, BM)
        is_row_M = row_M < tl.load(tile + 2)
        pair_M = tl.load(order_P + row_M, mask=is_row_M, other=0)
        factor_M = tl.load(x_scale_T + pair_M // A)
        x = x_TD + (pair_M // A).to(tl.int64)[:, None] * D + k_K[None, :]
        both = tl.zeros((2 * BF, BM), tl.float32)
        row_2F = tl.arange(0, 2 * BF)
        row_2F = block * BF + row_2F % BF + row_2F // BF * F
        if not BULK:
            weight = gate_up + expert.to(tl.int64) * (2 * F * D) + row_2F[:, None] * D + k_K[None, :]
        for k in tl.range(0, D, BK):
            x_MK = tl.load(x + k, mask=is_row_M[:, None], other=0.0)
            if BULK:
                w_2FK = gate_up.load([expert, 0, block * BF, k]).reshape(2 * BF, BK)
            else:
                w_2FK = tl.load(weight + k)
            both = tl.dot(w_2FK, x_MK.T, both)
        both *= tl.load(scale_E2F + expert * (2 * F) + row_2F)[:, None] * factor_M[None, :]
        gate_FM, up_FM = tl.split(both.reshape(2, BF, BM).permute(1, 2, 0))
        weight_M = tl.load(weights_P + pair_M, mask=is_row_M, other=0.0)
        act_FM = gate_FM / (1 + tl.exp(-gate_FM)) * up_FM * weight_M[None, :]
        largest_M = tl.max(tl.abs(act_FM), 0)
        scale_M = tl.where(largest_M > 0, largest_M / MAX, 1.0)
        act_FM = tl.clamp(act_FM / scale_M[None, :], -MAX, MAX)
        f = block * BF + tl.arange(0, BF)
        act = act_PF + row_M.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(act, act_FM.to(act_PF.dtype.element_ty).T, mask=is_row_M[:, None])
        tl.store(act_scale_PJ + row_M.to(tl.int64) * (F // BF) + block, scale_M, mask=is_row_M)


@triton.jit
def down_grouped_fp8_kernel(
    order_P, tile_M3, act_PF, act_scale_PJ, down, scale_ED, y_PD,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    BULK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of BM, tile of BD): y [P, D] in the order of pairs from act [P, F] and its scales.

    `down` is the tensor [E, D, F] or, with BULK, a descriptor of its blocks [1, BD, BK]. The tiles are read before the
    wait: `up` starts this launch only after its own wait for the sort.
    """
    tile = tile_M3 + tl.program_id(0) * 3
    first_D = tl.program_id(1) * BD
    d = first_D + tl.arange(0, BD)
    k_K = tl.arange(0, BK)
    expert = tl.load(tile, cache_modifier=".cg")
    row_M = tl.load(tile + 1, cache_modifier=".cg") + tl.arange(0, BM)
    is_row_M = row_M < tl.load(tile + 2, cache_modifier=".cg")
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if expert >= 0:
        pair_M = tl.load(order_P + row_M, mask=is_row_M, other=0)
        act = act_PF + row_M.to(tl.int64)[:, None] * F + k_K[None, :]
        act_scale = act_scale_PJ + row_M.to(tl.int64) * (F // BF)
        if not BULK:
            weight = down + expert.to(tl.int64) * (D * F) + d[:, None] * F + k_K[None, :]
        y_DM = tl.zeros((BD, BM), tl.float32)
        for k in tl.range(0, F, BK):
            act_MK = tl.load(act + k, mask=is_row_M[:, None], other=0.0)
            if BULK:
                down_DK = down.load([expert, first_D, k]).reshape(BD, BK)
            else:
                down_DK = tl.load(weight + k)
            scale_M = tl.load(act_scale + k // BF, mask=is_row_M, other=0.0)
            y_DM += tl.dot(down_DK, act_MK.T) * scale_M[None, :]
        y_DM *= tl.load(scale_ED + expert * D + d)[:, None]
        to = y_PD + pair_M.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(to, y_DM.T.to(y_PD.dtype.element_ty), mask=is_row_M[:, None])


def experts_grouped_fp8(
    h_TD: Tensor,
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales,
) -> Tensor:
    """As `experts_fp8_ref`, for contiguous tensors with D and F multiples of 64."""
    num_experts, hidden, width = down_EDF.shape
    num_tokens, num_chosen = chosen_TA.shape
    is_bulk, is_dependent = has_copy_engine(x_TD.device), has_dependent_launch(x_TD.device)
    tiles = grouped_tiles(x_TD.device, "fp8", num_tokens)
    x8_TD, x_scale_T = quantise_tokens(x_TD)
    pairs = sort_pairs(chosen_TA, num_experts, tiles.pairs)
    block = largest_divisor(width, tiles.up.features)
    act_PF = torch.empty(num_tokens * num_chosen, width, dtype=FP8, device=x_TD.device)
    act_scale_PJ = torch.empty(num_tokens * num_chosen, width // block, dtype=torch.float32, device=x_TD.device)
    y_PD = h_TD.new_empty(num_tokens * num_chosen, hidden)
    options = {"D": hidden, "F": width, "BM": tiles.pairs, "BF": block, "BULK": is_bulk, "DEPENDENT": is_dependent}
    tile, inputs = tiles.up, largest_divisor(hidden, tiles.up.inputs)
    gate_up: Any = gate_up_E2FD
    if is_bulk:
        gate_up = blocks_of(gate_up_E2FD, (num_experts, 2, width, hidden), (1, 2, block, inputs))
    up_grouped_fp8_kernel[(len(pairs.tile_M3), width // block)](
        x8_TD, x_scale_T, weights_TA, pairs.order_P, pairs.tile_M3, gate_up, scales.gate_up, act_PF, act_scale_PJ,
        A=num_chosen, BK=inputs, MAX=FP8_MAX, **options,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=is_dependent,
    )  # fmt: skip
    tile = tiles.down
    features, inputs = largest_divisor(hidden, tile.features), min(largest_divisor(width, tile.inputs), block)
    down = blocks_of(down_EDF, down_EDF.shape, (1, features, inputs)) if is_bulk else down_EDF
    down_grouped_fp8_kernel[(len(pairs.tile_M3), hidden // features)](
        pairs.order_P, pairs.tile_M3, act_PF, act_scale_PJ, down, scales.down, y_PD,
        BD=features, BK=inputs, **options, num_warps=tile.warps, num_stages=tile.stages, launch_pdl=is_dependent,
    )  # fmt: skip
    return sum_pairs(h_TD, chosen_TA, y_PD, num_experts)
