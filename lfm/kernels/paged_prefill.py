"""Causal attention of chunks over the paged cache, chunks of all lengths in one launch, each over its whole context.

    o[t] = softmax(q[t] k^T / sqrt(K)) v  over the row's keys at positions up to that of t

A program owns TOKENS neighbours of one row with all q heads of one kv head, so that K and V are loaded once for the
group, and walks over the keys with an online softmax in base 2; only the last few keys need the mask. Which row a
program serves it finds on the device: row r owns the tiles from row_starts[r] // TOKENS + r on, of which the last may
be empty. Long tiles begin first. On compute capability 9.0 K and V come by the copy engine, one block or part of one at
a time. 4 H K operations per query and key.

Rows of a single token are left to `lfm.kernels.paged_decode`, which divides their keys among programs.

Legend: T tokens, S rows, H q heads, G kv heads, K head dim, N blocks of a row, B block size.
"""

from typing import NamedTuple

from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.kv_fp8 import as_bytes, block_size_of, scale_of
from lfm.kernels.paged_tiles import LOG2_E, key_offsets, softmax_step
from lfm.kernels.triton_guard import TensorDescriptor, has_dependent_launch, tl, triton

ROWS_AT_ONCE = 128  # row starts that a program compares with its own at a time
# At head_dim 64 a score costs the unit for exponentials as many cycles as the matrix units. One column in so many (2 or
# 4; 0: none) has its exponential made of multiplications instead. Not measured yet.
FMA_SHARE = 0


class Tiling(NamedTuple):
    """Rows of the matrix products (tokens x q heads of a group), keys at a time, warps and stages; and a bound on the
    registers of a thread, where more would leave room for fewer programs."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def tiling_of(num_tokens: int, num_groups: int, head_dim: int, *, copies: bool) -> Tiling:
    """Measured on an H200 at head_dim 64 and 4 q heads per kv head.

    Three programs of the smaller tiles share a multiprocessor, 396 in all, two of the larger. Where the smaller ones
    would need a second round for little, and all are equally long, the larger ones take one round: 1,024 tokens behind
    29,000 others take 601 us instead of 767.
    """
    if head_dim > 64:
        return Tiling(64, 64, 4, 2)
    if not copies or 400 < num_tokens * num_groups // 16 <= 680:
        return Tiling(128, 64, 4, 3 if copies else 2)
    return Tiling(64, 128, 4, 2, 168)


@triton.jit
def _row_of_tile(row_starts_S1, num_rows, tile, TOKENS: tl.constexpr, CHUNK: tl.constexpr):
    """The last row whose first tile is not after `tile`."""
    found = tl.zeros([CHUNK], tl.int32)
    for begin in range(0, num_rows, CHUNK):
        rows = begin + tl.arange(0, CHUNK)
        starts = tl.load(row_starts_S1 + rows, mask=rows < num_rows, other=0).to(tl.int32)
        found += ((rows < num_rows) & (starts // TOKENS + rows <= tile)).to(tl.int32)
    return tl.sum(found, 0) - 1


@triton.jit
def _attend_tile(
    q, k_NGBK, v_NGBK, k_bytes, v_bytes, table, block, n, end, g, positions, acc, largest, total, scale,
    G: tl.constexpr, K: tl.constexpr, B: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, COPIES: tl.constexpr,
    FMA_SHARE: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys from n on. IS_MASKED: those after a query, and from `end` on, which may be NaN, are hidden."""
    dims, keys = tl.arange(0, K), n + tl.arange(0, TILE)
    first = (block.to(tl.int32) * G + g) * R + n % B
    offsets, scale_offsets = key_offsets(table, block, n, end, g, G, K, B, R, TILE)
    if COPIES:
        k = k_NGBK.load([first, 0]).T
    else:
        k = tl.load(k_NGBK + offsets[None, :] + dims[:, None])
    s = tl.dot(q, k.to(q.dtype))
    if R > B:
        s *= scale_of(tl.load(k_bytes + scale_offsets))[None, :]
    if IS_MASKED:
        s = tl.where(keys[None, :] <= positions[:, None], s, float("-inf"))
    p, shrink, largest, total = softmax_step(s, largest, total, scale, FMA_SHARE)
    if COPIES:
        v = v_NGBK.load([first, 0])
    else:
        v = tl.load(v_NGBK + offsets[:, None] + dims[None, :])
    v = v.to(q.dtype)
    if IS_MASKED:
        v = tl.where((keys < end)[:, None], v, 0.0)
    if R > B:
        p *= scale_of(tl.load(v_bytes + scale_offsets, mask=keys < end, other=0))[None, :]
    return tl.dot(p.to(q.dtype), v, acc * shrink[:, None]), largest, total


@triton.jit(do_not_specialize=["table_stride", "num_rows"])
def _prefill_kernel(
    q_THK, k_NGBK, v_NGBK, k_bytes, v_bytes, tables_SN, starts_S, row_starts_S1, o_THK, q_stride, table_stride,
    num_rows, scale,
    G: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
    TOKENS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, COPIES: tl.constexpr, SKIP_SINGLE: tl.constexpr,
    FMA_SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q [T, H, K] against K and V [blocks, G, R, K] (COPIES: descriptors of [blocks G R, K]) -> o [T, H, K].

    Program (tile, kv head); matrix row i is token i // PADDED with q head i % PADDED of the group.
    """
    tile, g = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row = _row_of_tile(row_starts_S1, num_rows, tile, TOKENS, CHUNK)
    first = tl.load(row_starts_S1 + row).to(tl.int32)
    size = tl.load(row_starts_S1 + row + 1).to(tl.int32) - first
    done = (tile - row - first // TOKENS) * TOKENS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if done >= size or (SKIP_SINGLE and size == 1):
        return
    begin = tl.load(starts_S + row).to(tl.int32) + done
    end = begin + tl.minimum(TOKENS, size - done)
    rows, dims = tl.arange(0, TOKENS * PADDED), tl.arange(0, K)
    positions = begin + rows // PADDED
    is_real = (positions < end) & (rows % PADDED < GROUP)
    token = (first + done + rows // PADDED).to(tl.int64)
    head = g * GROUP + rows % PADDED
    from_q = q_THK + token[:, None] * q_stride + head[:, None] * K + dims[None, :]
    q = tl.load(from_q, mask=is_real[:, None], other=0.0)
    table = tables_SN + row.to(tl.int64) * table_stride
    block = tl.load(table)
    largest = tl.full([TOKENS * PADDED], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * PADDED], tl.float32)
    acc = tl.zeros([TOKENS * PADDED, K], tl.float32)
    unmasked = (begin + 1) // TILE * TILE
    for n in range(0, unmasked, TILE):
        next_block = tl.load(table + tl.minimum(n + TILE, end - 1) // B)
        acc, largest, total = _attend_tile(
            q, k_NGBK, v_NGBK, k_bytes, v_bytes, table, block, n, end, g, positions, acc, largest, total, scale,
            G, K, B, R, TILE, COPIES, FMA_SHARE, False,
        )  # fmt: skip
        block = next_block
    for n in range(unmasked, end, TILE):
        next_block = tl.load(table + tl.minimum(n + TILE, end - 1) // B)
        acc, largest, total = _attend_tile(
            q, k_NGBK, v_NGBK, k_bytes, v_bytes, table, block, n, end, g, positions, acc, largest, total, scale,
            G, K, B, R, TILE, COPIES, 0, True,
        )  # fmt: skip
        block = next_block
    acc = acc / total[:, None]
    to = o_THK + (token * (G * GROUP) + head)[:, None] * K + dims[None, :]
    tl.store(to, acc.to(o_THK.dtype.element_ty), mask=is_real[:, None])


def prefill_rows(
    q_THK: Tensor, o_THK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor, *, skip_single: bool
) -> None:
    """Write attention of the rows' chunks to `o_THK`; with `skip_single`, of all but those of one token."""
    num_tokens, num_heads, head_dim = q_THK.shape
    num_groups, rows_per_block = k_NGBK.shape[1:3]
    num_rows, group, block_size = len(batch.starts_S), num_heads // num_groups, block_size_of(k_NGBK)
    padded = triton.next_power_of_2(group)
    is_hopper = has_dependent_launch(q_THK.device)
    tiling = tiling_of(num_tokens, num_groups, head_dim, copies=is_hopper)
    copies = is_hopper and block_size % tiling.keys == 0
    k, v = k_NGBK, v_NGBK
    if copies:
        box = [tiling.keys, head_dim]
        k, v = (TensorDescriptor.from_tensor(x.view(-1, head_dim), box) for x in (k_NGBK, v_NGBK))
    tokens = max(1, tiling.rows // padded)
    _prefill_kernel[(triton.cdiv(num_tokens, tokens) + num_rows, num_groups)](
        q_THK, k, v, as_bytes(k_NGBK), as_bytes(v_NGBK), batch.block_tables_SN, batch.starts_S, batch.row_starts_S1,
        o_THK, q_THK.stride(0), batch.block_tables_SN.stride(0), num_rows, head_dim**-0.5 * LOG2_E,
        G=num_groups, GROUP=group, PADDED=padded, K=head_dim, B=block_size, R=rows_per_block, TOKENS=tokens,
        TILE=tiling.keys,
        CHUNK=ROWS_AT_ONCE, COPIES=copies, SKIP_SINGLE=skip_single, FMA_SHARE=FMA_SHARE, PDL=is_hopper,
        num_warps=tiling.warps, num_stages=tiling.stages, maxnreg=tiling.registers, launch_pdl=is_hopper,
    )  # fmt: skip
