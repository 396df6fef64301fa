"""The two grouped products of a large prefill on Hopper: persistent programs of one loading and two multiplying parts.

    act[i] = w[p] * silu(gate[e] xs[i]) * (up[e] xs[i]),  p = order[i];       y[p] = down[e] act[i]

One program per multiprocessor takes every N-th (tile, block of features). One warp copies blocks of both operands into
a ring in shared memory (TMA); two warpgroups multiply 64 of a tile's 128 rows each with 256 columns (wgmma, sums in
registers) and write. So loads of the next tile run while the last one is written, and a warpgroup without rows rests.
Written in Gluon, Triton's lower language, which has no interpreter: on a CPU there is nothing to test.
Rounding: as moe_prefill, which calls this. Memory beyond the last row of `xs` is read as zeros or as anybody's rows,
and neither is written.

Legend: P pairs, D hidden, E experts, F expert width, K inputs, N outputs, M tiles (expert, start, end) of 128 pairs.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lfm.kernels.triton_guard import has_warp_group_products, num_multiprocessors

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    HAS_GLUON = True
except ImportError:
    gluon: Any = SimpleNamespace(jit=lambda function: function)  # type: ignore[no-redef]
    gl: Any = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[no-redef]
    HAS_GLUON = False

STAGES = 4  # of 48 KB
GROUP = 8


@gluon.jit
def tile_and_block(program, num_tiles, BLOCKS: gl.constexpr, GROUP: gl.constexpr):
    """The tile and the block of features of a unit of work: GROUP neighbouring tiles share the weights in L2."""
    first = program // (GROUP * BLOCKS) * GROUP
    size = gl.minimum(num_tiles - first, GROUP)
    inside = program % (GROUP * BLOCKS)
    return first + inside % size, inside // size


@gluon.jit
def load_part(
    rows, weights, tile_M3, num_tiles_1, row_ring, weight_ring, is_full, is_empty,
    K: gl.constexpr, BLOCKS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, IS_UP: gl.constexpr,
):  # fmt: skip
    """Copy the operands of every step of every unit, as fast as stages become empty."""
    BYTES: gl.constexpr = (128 + 256) * BK * 2
    num_tiles = gl.load(num_tiles_1)
    stage = 0
    phase = 1
    for unit in range(gl.program_id(0), num_tiles * BLOCKS, gl.num_programs(0)):
        tile, block = tile_and_block(unit, num_tiles, BLOCKS, GROUP)
        expert = gl.load(tile_M3 + tile * 3)
        row = gl.load(tile_M3 + tile * 3 + 1)
        for k in range(0, K, BK):
            mbarrier.wait(is_empty.index(stage), phase)
            barrier = is_full.index(stage)
            mbarrier.expect(barrier, BYTES)
            tma.async_copy_global_to_shared(rows, [row, k], barrier, row_ring.index(stage))
            if IS_UP:
                tma.async_copy_global_to_shared(weights, [expert, 0, block * BN, k], barrier, weight_ring.index(stage))
            else:
                tma.async_copy_global_to_shared(weights, [expert, block * BN, k], barrier, weight_ring.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def multiply_part(
    tile_M3, num_tiles_1, order_P, weights_P, out_PN, row_ring, weight_ring, is_full, is_empty,
    PART: gl.constexpr, K: gl.constexpr, N: gl.constexpr, BLOCKS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, IS_UP: gl.constexpr,
):  # fmt: skip
    """Multiply and write rows 64 * PART .. 64 * PART + 63 of every unit's tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    num_tiles = gl.load(num_tiles_1)
    stage = 0
    phase = 0
    for unit in range(gl.program_id(0), num_tiles * BLOCKS, gl.num_programs(0)):
        tile, block = tile_and_block(unit, num_tiles, BLOCKS, GROUP)
        row = gl.load(tile_M3 + tile * 3 + 1) + PART * 64
        end = gl.load(tile_M3 + tile * 3 + 2)
        if row < end:
            sums = gl.zeros((64, 256), gl.float32, SUMS)
            for k in range(0, K, BK):
                mbarrier.wait(is_full.index(stage), phase)
                a = row_ring.index(stage).slice(PART * 64, 64)
                b = weight_ring.index(stage).reshape((256, BK)).permute((1, 0))
                # One product stays under way; the one before it is done, and its stage can be filled again.
                sums = warpgroup_mma_wait(1, deps=(warpgroup_mma(a, b, sums, is_async=True),))
                previous = stage - 1
                if stage == 0:
                    previous = STAGES - 1
                mbarrier.arrive(is_empty.index(previous), pred=k > 0)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            sums = warpgroup_mma_wait(0, deps=(sums,))
            last = stage - 1
            if stage == 0:
                last = STAGES - 1
            mbarrier.arrive(is_empty.index(last))
            low, high = gl.split(sums.reshape((64, 2, 128)).permute((0, 2, 1)))
            row_M = row + gl.arange(0, 64, gl.SliceLayout(1, OUT))
            is_row_M = row_M < end
            column = block * BN + gl.arange(0, 128, gl.SliceLayout(0, OUT))
            if IS_UP:
                row_of_low = row + gl.arange(0, 64, gl.SliceLayout(1, low.type.layout))
                pair_of_low = gl.load(order_P + row_of_low, mask=row_of_low < end, other=0)
                weight = gl.load(weights_P + pair_of_low, mask=row_of_low < end, other=0.0)
                act = (low / (1 + gl.exp(-low)) * high * weight[:, None]).to(gl.bfloat16)
                out = out_PN + row_M.to(gl.int64)[:, None] * N + column[None, :]
                gl.store(out, gl.convert_layout(act, OUT), mask=is_row_M[:, None])
            else:
                pair_M = gl.load(order_P + row_M, mask=is_row_M, other=0)
                out = out_PN + pair_M.to(gl.int64)[:, None] * N + column[None, :]
                gl.store(out, gl.convert_layout(low.to(gl.bfloat16), OUT), mask=is_row_M[:, None])
                gl.store(out + 128, gl.convert_layout(high.to(gl.bfloat16), OUT), mask=is_row_M[:, None])
        else:
            for _ in range(0, K, BK):
                mbarrier.wait(is_full.index(stage), phase)
                mbarrier.arrive(is_empty.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def grouped_product_kernel(
    rows, weights, order_P, weights_P, tile_M3, num_tiles_1, out_PN,
    K: gl.constexpr, N: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    IS_UP: gl.constexpr,
):  # fmt: skip
    """act [P, F] from xs [P, D] and gate and up together, or y [P, D] in the order of pairs from act [P, F] and down.

    Descriptors: `rows` of blocks [128, BK]; `weights` of blocks [1, 2, 128, BK] of [E, 2, F, D], or [1, 256, BK].
    """
    BLOCKS: gl.constexpr = N // BN
    row_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + rows.block_type.shape, rows.layout)  # noqa: RUF005
    weight_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + weights.block_type.shape, weights.layout)  # noqa: RUF005
    is_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    is_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(is_full.index(stage), count=1)
        mbarrier.init(is_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply_part,
                (tile_M3, num_tiles_1, order_P, weights_P, out_PN, row_ring, weight_ring, is_full, is_empty,
                 0, K, N, BLOCKS, BN, BK, STAGES, GROUP, IS_UP),
            ),
            (
                multiply_part,
                (tile_M3, num_tiles_1, order_P, weights_P, out_PN, row_ring, weight_ring, is_full, is_empty,
                 1, K, N, BLOCKS, BN, BK, STAGES, GROUP, IS_UP),
            ),
            (
                load_part,
                (rows, weights, tile_M3, num_tiles_1, row_ring, weight_ring, is_full, is_empty,
                 K, BLOCKS, BN, BK, STAGES, GROUP, IS_UP),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def can_run(gate_up_E2FD: Tensor, down_EDF: Tensor) -> bool:
    """Whether these weights are on a Hopper GPU and fit the blocks."""
    _, hidden, width = down_EDF.shape
    return HAS_GLUON and has_warp_group_products(gate_up_E2FD.device) and hidden % 256 == 0 and width % 128 == 0


def _blocks_of(tensor: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Any:
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    return TensorDescriptor.from_tensor(tensor.view(shape), list(block), layout)


def products(x_PD: Tensor, pairs: Any, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """y [P, D] of the sorted pairs (a `moe_prefill.SortedPairs`); one program per multiprocessor."""
    num_experts, hidden, width = down_EDF.shape
    act_PF, y_PD = x_PD.new_empty(len(x_PD), width), torch.empty_like(x_PD)
    grid = (num_multiprocessors(x_PD.device),)
    common = (pairs.order_P, weights_TA, pairs.tile_M3, pairs.num_tiles_1)
    options = {"BK": 64, "STAGES": STAGES, "GROUP": GROUP, "num_warps": 4}
    gate_up = _blocks_of(gate_up_E2FD, (num_experts, 2, width, hidden), (1, 2, 128, 64))
    x = _blocks_of(x_PD, tuple(x_PD.shape), (128, 64))
    grouped_product_kernel[grid](x, gate_up, *common, act_PF, K=hidden, N=width, BN=128, IS_UP=True, **options)
    down = _blocks_of(down_EDF, tuple(down_EDF.shape), (1, 256, 64))
    act = _blocks_of(act_PF, tuple(act_PF.shape), (128, 64))
    grouped_product_kernel[grid](act, down, *common, y_PD, K=width, N=hidden, BN=256, IS_UP=False, **options)
    return y_PD
