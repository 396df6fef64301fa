"""The experts of a large step with weights and activations in fp8: the products of moe_prefill.py at twice the rate.

    xs[i] = x8[t],  x8 = e4m3(x / a);   act[i] = w[p] * silu(a s_g (gate8 xs[i])) * (a s_u (up8 xs[i])),  p = order[i]
    y[p] = b[i] s_d (down8 e4m3(act[i] / b[i]));   out[t] = h[t] + sum_a y[t, a]

a [T] and b [P] are the scales of rows, s those of the weights' rows. act passes through memory in bf16 once more than
in moe_prefill, since a row's largest value is known only when all of it is: 3 P F bytes, 35 us of 8,192 tokens of the
24B. Sums as the matrix units keep those of fp8 products, with some 14 bits: finer than the rounding to e4m3 before.

Legend: as moe_prefill.py.
"""

from typing import Any

import torch
from torch import Tensor

from lfm.kernels.fp8_gemm import quantise_tokens
from lfm.kernels.moe_grouped import blocks_of, sum_pairs
from lfm.kernels.moe_prefill import (
    TILE_PAIRS,
    SortedPairs,
    down_product,
    rows_of,
    sort_pairs,
    spread,
    tile_and_block,
    up_product,
)
from lfm.kernels.moe_small import largest_divisor
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton
from lfm.kernels.weights import ExpertScales


@triton.jit
def up_prefill_fp8_kernel(
    x_PD, x_scale_T, weights_P, order_P, tile_M3, num_tiles_1, gate_up, scale_E2F, act_PF,
    A: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """act [P, F]. Descriptors: `x_PD` of blocks [BM, BK], `gate_up` of blocks [1, 2, BF, BK] of [E, 2, F, D]."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.load(num_tiles_1)
    tile, block = tile_and_block(tl.program_id(0), num_tiles, F // BF, GROUP)
    if (tile < num_tiles) & (block < F // BF):
        expert = tl.load(tile_M3 + tile * 3)
        gate_MF, up_MF = up_product(x_PD, tile_M3, tile, gate_up, block, D, BM, BF, BK)
        row_M1, is_row_M1, pair_M1 = rows_of(order_P, tile_M3, tile, BM)
        weight_M1 = tl.load(weights_P + pair_M1, mask=is_row_M1, other=0.0)
        x_scale_M1 = tl.load(x_scale_T + pair_M1 // A, mask=is_row_M1, other=0.0)
        f = block * BF + tl.arange(0, BF)
        scale = scale_E2F + expert * (2 * F) + f[None, :]
        gate_MF *= x_scale_M1 * tl.load(scale)
        up_MF *= x_scale_M1 * tl.load(scale + F)
        act_MF = gate_MF / (1 + tl.exp(-gate_MF)) * up_MF * weight_M1
        tl.store(act_PF + row_M1.to(tl.int64) * F + f[None, :], act_MF.to(act_PF.dtype.element_ty), mask=is_row_M1)


@triton.jit
def down_prefill_fp8_kernel(
    order_P, tile_M3, num_tiles_1, act, act_scale_P, down, scale_ED, y_PD,
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
        expert = tl.load(tile_M3 + tile * 3)
        y_MD = down_product(act, tile_M3, tile, down, block, F, BM, BD, BK)
        row_M1, is_row_M1, pair_M1 = rows_of(order_P, tile_M3, tile, BM)
        d = block * BD + tl.arange(0, BD)[None, :]
        y_MD *= tl.load(act_scale_P + row_M1, mask=is_row_M1, other=0.0) * tl.load(scale_ED + expert * D + d)
        tl.store(y_PD + pair_M1.to(tl.int64) * D + d, y_MD.to(y_PD.dtype.element_ty), mask=is_row_M1)


def _products(
    x_PD: Tensor, x_scale_T: Tensor, pairs: SortedPairs, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor,
    scales: ExpertScales, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y [P, D] of the sorted pairs, one program per tile and block."""
    num_experts, hidden, width = down_EDF.shape
    num_pairs, num_tiles = len(x_PD), len(pairs.tile_M3)
    act_PF = torch.empty(num_pairs, width, dtype=dtype, device=x_PD.device)
    y_PD = torch.empty(num_pairs, hidden, dtype=dtype, device=x_PD.device)
    is_dependent = has_dependent_launch(x_PD.device)
    options: dict[str, Any] = {
        "D": hidden, "F": width, "BM": TILE_PAIRS, "GROUP": 8, "DEPENDENT": is_dependent,
        "num_warps": 8, "num_stages": 4, "launch_pdl": is_dependent,
    }  # fmt: skip
    features, inputs = largest_divisor(width, 128), largest_divisor(hidden, 128)
    up_prefill_fp8_kernel[(num_tiles * (width // features),)](
        blocks_of(x_PD, x_PD.shape, (TILE_PAIRS, inputs)), x_scale_T, weights_TA, *pairs[:1], *pairs[2:],
        blocks_of(gate_up_E2FD, (num_experts, 2, width, hidden), (1, 2, features, inputs)), scales.gate_up, act_PF,
        A=weights_TA.shape[1], BF=features, BK=inputs, **options,
    )  # fmt: skip
    act8_PF, act_scale_P = quantise_tokens(act_PF)
    features, inputs = largest_divisor(hidden, 256), largest_divisor(width, 128)
    down_prefill_fp8_kernel[(num_tiles * (hidden // features),)](
        pairs.order_P, pairs.tile_M3, pairs.num_tiles_1, blocks_of(act8_PF, act8_PF.shape, (TILE_PAIRS, inputs)),
        act_scale_P, blocks_of(down_EDF, down_EDF.shape, (1, features, inputs)), scales.down, y_PD,
        BD=features, BK=inputs, **options,
    )  # fmt: skip
    return y_PD


def experts_prefill_fp8(
    h_TD: Tensor,
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales,
) -> Tensor:
    """As `experts_fp8_ref`, for contiguous tensors with D and F multiples of 64."""
    num_experts = len(down_EDF)
    x8_TD, x_scale_T = quantise_tokens(x_TD)  # before the sort: `spread` reads x before it waits
    pairs = sort_pairs(chosen_TA, num_experts)
    x_PD = spread(x8_TD, chosen_TA, pairs.place_P, num_experts)
    y_PD = _products(x_PD, x_scale_T, pairs, weights_TA, gate_up_E2FD, down_EDF, scales, h_TD.dtype)
    return sum_pairs(h_TD, chosen_TA, y_PD, num_experts)
