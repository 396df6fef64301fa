"""Attention of many rows over leading blocks that they share: those K and V are read once for 16 rows, not 16 times.

A tile is up to 16 rows, each with a single query, whose block tables begin with the same blocks. Program (part, kv
head, tile) takes all their q heads of one kv head through one part of the shared keys, without a mask, since every
query comes after them. It leaves parts, which `lfm.kernels.paged_decode` takes in with what comes behind the prefix.
Bytes: 4 K G per shared key and tile, of which only the first tile's come from memory and not from L2.

Legend: T tokens, S rows, H q heads, G kv heads, K head dim, B block size, P parts, X rows of a tile, Y tiles.
"""

import torch
from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.kv_fp8 import as_bytes, block_size_of, scale_of
from lfm.kernels.paged_tiles import LOG2_E, key_offsets, row_parts, softmax_step
from lfm.kernels.triton_guard import TensorDescriptor, has_dependent_launch, tl, triton

PREFIX_PARTS = 4
PREFIX_TILE = 64


@triton.jit(do_not_specialize=["table_stride"])
def _prefix_kernel(
    q_THK, k_NGBK, v_NGBK, k_bytes, v_bytes, tables_SN, row_starts_S1, shared_S, tiles_YX, part_SPHK, sum_SPH,
    q_stride, table_stride, scale,
    G: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
    X: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, COPIES: tl.constexpr, IS_MIXED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """q [T, H, K] of the rows of tiles [Y, X] (-1: no row) -> parts [S, PARTS, H, K] in fp32, and log2 sums."""
    split, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(tiles_YX + tile * X)
    if PDL:  # in this order: the launch behind may read q, K and V as soon as it begins
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if first_row < 0:
        return
    shared = tl.load(shared_S + first_row).to(tl.int32) * B
    size, in_use = row_parts(shared, PARTS, 1, TILE)
    if split >= in_use:
        return
    begin, end = split * size, tl.minimum(split * size + size, shared)
    i, dims, keys = tl.arange(0, X * PADDED), tl.arange(0, K), tl.arange(0, TILE)
    row = tl.load(tiles_YX + tile * X + i // PADDED)
    is_real = (row >= 0) & (i % PADDED < GROUP)
    token = row
    if IS_MIXED:
        token = tl.load(row_starts_S1 + row, mask=row >= 0, other=0)
    head = g * GROUP + i % PADDED
    from_q = q_THK + (token * q_stride + head * K)[:, None] + dims[None, :]
    q = tl.load(from_q, mask=is_real[:, None], other=0.0)
    table = tables_SN + first_row * table_stride
    block = tl.load(table + begin // B)
    largest = tl.full([X * PADDED], float("-inf"), tl.float32)
    total = tl.zeros([X * PADDED], tl.float32)
    acc = tl.zeros([X * PADDED, K], tl.float32)
    for n in range(begin, end, TILE):
        first = (block.to(tl.int32) * G + g) * R + n % B
        offsets, scale_offsets = key_offsets(table, block, n, end, g, G, K, B, R, TILE)
        block = tl.load(table + tl.minimum(n + TILE, end - 1) // B)
        if COPIES:
            k = k_NGBK.load([first, 0]).T
        else:
            k = tl.load(k_NGBK + offsets[None, :] + dims[:, None])
        s = tl.dot(q, k.to(q.dtype))
        if R > B:
            s *= scale_of(tl.load(k_bytes + scale_offsets))[None, :]
        if B % TILE != 0:  # else every tile is whole; past the end there are copies of the last key
            s = tl.where((n + keys < end)[None, :], s, float("-inf"))
        p, shrink, largest, total = softmax_step(s, largest, total, scale)
        if COPIES:
            v = v_NGBK.load([first, 0])
        else:
            v = tl.load(v_NGBK + offsets[:, None] + dims[None, :])
        if R > B:
            p *= scale_of(tl.load(v_bytes + scale_offsets))[None, :]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
    part = (row * PARTS + split) * (G * GROUP) + head
    tl.store(part_SPHK + part[:, None] * K + dims[None, :], acc / total[:, None], mask=is_real[:, None])
    tl.store(sum_SPH + part, largest + tl.log2(total), mask=is_real)


def new_parts(q_THK: Tensor, num_rows: int, num_parts: int) -> tuple[Tensor, Tensor]:
    """Room for parts of o [S, P, H, K] and their log2 sums [S, P, H], in fp32."""
    shape = num_rows, num_parts, q_THK.shape[1]
    return q_THK.new_empty(*shape, q_THK.shape[2], dtype=torch.float32), q_THK.new_empty(shape, dtype=torch.float32)


def attend_prefix(
    q_THK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor, *, is_mixed: bool
) -> tuple[Tensor, Tensor]:
    """Parts and log2 sums of the rows in `batch.shared`, as many as their prefix fills; nothing else is written."""
    assert batch.shared is not None
    num_heads, head_dim = q_THK.shape[1:]
    num_groups, rows_per_block = k_NGBK.shape[1:3]
    block_size = block_size_of(k_NGBK)
    num_tiles, rows = batch.shared.tiles_YX.shape
    group = num_heads // num_groups
    part_SPHK, sum_SPH = new_parts(q_THK, len(batch.starts_S), PREFIX_PARTS)
    if num_tiles == 0:
        return part_SPHK, sum_SPH
    is_hopper = has_dependent_launch(q_THK.device)
    copies = is_hopper and block_size % PREFIX_TILE == 0
    k, v = k_NGBK, v_NGBK
    if copies:
        box = [PREFIX_TILE, head_dim]
        k, v = (TensorDescriptor.from_tensor(x.view(-1, head_dim), box) for x in (k_NGBK, v_NGBK))
    _prefix_kernel[(PREFIX_PARTS, num_groups, num_tiles)](
        q_THK, k, v, as_bytes(k_NGBK), as_bytes(v_NGBK), batch.block_tables_SN, batch.row_starts_S1,
        batch.shared.blocks_S, batch.shared.tiles_YX,
        part_SPHK, sum_SPH, q_THK.stride(0), batch.block_tables_SN.stride(0), head_dim**-0.5 * LOG2_E,
        G=num_groups, GROUP=group, PADDED=triton.next_power_of_2(group), K=head_dim, B=block_size,
        R=rows_per_block, X=rows,
        TILE=PREFIX_TILE, PARTS=PREFIX_PARTS, COPIES=copies, IS_MIXED=is_mixed, PDL=is_hopper,
        num_warps=4, num_stages=2, launch_pdl=is_hopper,
    )  # fmt: skip
    return part_SPHK, sum_SPH
