"""Attention of single queries over the paged cache: split-KV, one kv head at a time for all q heads of its group.

    o = softmax(q k^T / sqrt(K)) v  over the keys of the row's blocks, its own position last

Program (kv head, row, part): the group's q heads, padded to 16, against one part of the keys, a tile at a time. A
second launch merges the parts by their logarithmic sums, in order, so that a row's result depends on nothing but the
row. How many parts there may be follows from shapes alone; a row uses as many as its length fills, and a program
without keys ends at once. Bytes: 4 K G of K and V per key, once: 2 KB at the 24B's shapes. K and V in fp8 are half of
that; they become q's dtype in registers, and their scales multiply scores and weights.

Where rows share leading blocks, the programs begin behind those; the first part of a row takes in what
`lfm.kernels.shared_prefix` left for it.

Legend: T tokens, S rows, H q heads, G kv heads, K head dim, N blocks of a row, B block size, P parts.
"""

from typing import NamedTuple

from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.kv_fp8 import as_bytes, block_size_of, scale_of
from lfm.kernels.paged_tiles import LOG2_E, key_offsets, row_parts, softmax_step
from lfm.kernels.shared_prefix import PREFIX_PARTS, PREFIX_TILE, attend_prefix, new_parts
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton

GROUP_ROWS = 16  # rows of the smallest matrix product; more q heads per kv head are the reference's
MAX_PARTS = 32
# Whether a row's own keys are read while the launch in front still computes the prefix. Not measured yet.
OVERLAPS_PREFIX = False
FEW_ROWS = 16  # up to here parts are merged by a program per q head, and beyond by one per kv head


class Tiling(NamedTuple):
    """How one launch divides its work: keys per step of a program, its warps and stages, parts per row at most, and the
    steps that a part has at least."""

    tile: int
    warps: int
    stages: int
    parts: int
    min_tiles: int


def tiling_of(num_rows: int, num_groups: int) -> Tiling:
    """Measured on an H200 with contexts of 128 to 30,000. Some 500 programs fill it; more parts only cost.

    Parts of 1,024 or 2,048 keys and more are for a long row among short ones: without them 128 rows, one of 30,000 keys
    and 127 of 1,024, take 389 us instead of 156. From 2,048 programs on the others hide it.
    """
    programs = triton.next_power_of_2(num_rows * num_groups)
    if programs <= 16:
        return Tiling(128, 4, 2, MAX_PARTS, 1)
    if programs <= 128:
        return Tiling(64, 4, 4, min(MAX_PARTS, 512 // programs), 1)
    if programs <= 2048:
        return Tiling(64, 4, 4, 4, 16 if programs <= 256 else 32)
    return Tiling(64, 4, 4, 1, 1)


@triton.jit
def _take_in_prefix(
    prefix_SPHK, prefix_sum_SPH, row, head, is_head, dims, in_use, acc, largest, total,
    H: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The sums of a row's keys together with the first `in_use` parts of its prefix."""
    for part in tl.static_range(PARTS):
        at = (row * PARTS + part) * H + head
        is_read = is_head & (part < in_use)
        part_sum = tl.load(prefix_sum_SPH + at, mask=is_read, other=float("-inf"))
        values = tl.load(prefix_SPHK + at[:, None] * K + dims[None, :], mask=is_read[:, None], other=0.0)
        new_largest = tl.maximum(largest, part_sum)
        shrink, weight = tl.exp2(largest - new_largest), tl.exp2(part_sum - new_largest)
        acc = acc * shrink[:, None] + values * weight[:, None]
        total = total * shrink + weight
        largest = new_largest
    return acc, largest, total


@triton.jit(do_not_specialize=["table_stride", "parts", "min_tiles"])
def _decode_kernel(
    q_THK, k_NGBK, v_NGBK, k_bytes, v_bytes, tables_SN, starts_S, row_starts_S1, o_THK, part_SPHK, sum_SPH,
    shared_S, prefix_SPHK, prefix_sum_SPH, q_stride, table_stride, parts, min_tiles, scale,
    G: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, K: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr,
    PREFIX_PARTS: tl.constexpr, PREFIX_TILE: tl.constexpr, IS_MIXED: tl.constexpr, PDL: tl.constexpr,
    LATE_WAIT: tl.constexpr,
):  # fmt: skip
    """q [T, H, K] against K and V [blocks, G, R, K] -> o [T, H, K], or a part of it in fp32 and its log2 sum.

    IS_MIXED: rows of other than one token are left out. PREFIX_PARTS > 0: the first `shared_S` blocks come in parts.
    Parts are the slowest axis: programs without keys come last, and those with keys spread over the whole GPU.
    LATE_WAIT: q, K and V are older than the launch in front, which makes the parts of the prefix; only those, and what
    is written, have to wait for it.
    """
    g, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    token, is_single = row, True
    if IS_MIXED:
        token = tl.load(row_starts_S1 + row)
        is_single = tl.load(row_starts_S1 + row + 1) - token == 1
    end = tl.load(starts_S + row).to(tl.int32) + 1
    shared = 0
    if PREFIX_PARTS > 0:
        shared = tl.load(shared_S + row).to(tl.int32) * B
    size, in_use = row_parts(end - shared, parts, min_tiles, TILE)
    begin = shared + split * size
    table = tables_SN + row * table_stride
    block = tl.load(table + tl.minimum(begin, end - 1) // B)
    if PDL:  # before any return: a launch that no program of waits would let the next one overtake the last
        tl.extra.cuda.gdc_launch_dependents()
        if not LATE_WAIT:
            tl.extra.cuda.gdc_wait()
    if not is_single or split >= in_use:
        if LATE_WAIT:
            tl.extra.cuda.gdc_wait()
        return
    end = tl.minimum(begin + size, end)
    rows, dims, keys = tl.arange(0, M), tl.arange(0, K), tl.arange(0, TILE)
    head = g * GROUP + rows
    is_head = (rows < GROUP)[:, None]
    q = tl.load(q_THK + token * q_stride + head[:, None] * K + dims[None, :], mask=is_head, other=0.0)
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, K], tl.float32)
    for n in range(begin, end, TILE):
        offsets, scale_offsets = key_offsets(table, block, n, end, g, G, K, B, R, TILE)
        is_key = n + keys < end
        block = tl.load(table + tl.minimum(n + TILE, end - 1) // B)
        k = tl.load(k_NGBK + offsets[None, :] + dims[:, None], mask=is_key[None, :], other=0.0)
        s = tl.dot(q, k.to(q.dtype))
        if R > B:
            s *= scale_of(tl.load(k_bytes + scale_offsets, mask=is_key, other=0))[None, :]
        s = tl.where(is_key[None, :], s, float("-inf"))
        p, shrink, largest, total = softmax_step(s, largest, total, scale)
        v = tl.load(v_NGBK + offsets[:, None] + dims[None, :], mask=is_key[:, None], other=0.0)
        if R > B:
            p *= scale_of(tl.load(v_bytes + scale_offsets, mask=is_key, other=0))[None, :]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
    if LATE_WAIT:
        tl.extra.cuda.gdc_wait()
    if PREFIX_PARTS > 0:
        _, in_prefix = row_parts(shared, PREFIX_PARTS, 1, PREFIX_TILE)
        in_prefix = tl.where(split == 0, in_prefix, 0)
        acc, largest, total = _take_in_prefix(
            prefix_SPHK, prefix_sum_SPH, row, head, rows < GROUP, dims, in_prefix, acc, largest, total,
            G * GROUP, K, PREFIX_PARTS,
        )  # fmt: skip
    acc = acc / total[:, None]
    if in_use == 1:
        to = o_THK + (token * (G * GROUP) + head[:, None]) * K + dims[None, :]
        tl.store(to, acc.to(o_THK.dtype.element_ty), mask=is_head)
    else:
        part = (row * parts + split) * (G * GROUP) + head
        tl.store(part_SPHK + part[:, None] * K + dims[None, :], acc, mask=is_head)
        tl.store(sum_SPH + part, largest + tl.log2(total), mask=rows < GROUP)


@triton.jit(do_not_specialize=["parts", "min_tiles"])
def _merge_kernel(
    part_SPHK, sum_SPH, starts_S, row_starts_S1, shared_S, o_THK, parts, min_tiles,
    H: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr,
    P: tl.constexpr, HAS_PREFIX: tl.constexpr, IS_MIXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """o of (HEADS heads, row): sum_p 2^sum_p part_p / sum_p 2^sum_p. A row of a single part is in o already."""
    row = tl.program_id(1).to(tl.int64)
    num_keys = tl.load(starts_S + row).to(tl.int32) + 1
    if HAS_PREFIX:
        num_keys -= tl.load(shared_S + row).to(tl.int32) * B
    _, in_use = row_parts(num_keys, parts, min_tiles, TILE)
    token, is_single = row, True
    if IS_MIXED:
        token = tl.load(row_starts_S1 + row)
        is_single = tl.load(row_starts_S1 + row + 1) - token == 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if not is_single or in_use == 1:
        return
    part, dims = tl.arange(0, P), tl.arange(0, K)
    is_used = part < in_use
    for i in tl.static_range(HEADS):
        head = tl.program_id(0) * HEADS + i
        at = (row * parts + part) * H + head
        weights = tl.load(sum_SPH + at, mask=is_used, other=float("-inf"))
        weights = tl.exp2(weights - tl.max(weights, 0))
        values = tl.load(part_SPHK + at[:, None] * K + dims[None, :], mask=is_used[:, None], other=0.0)
        o = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
        tl.store(o_THK + (token * H + head) * K + dims, o.to(o_THK.dtype.element_ty))


def decode_rows(
    q_THK: Tensor, o_THK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor, *, is_mixed: bool
) -> None:
    """Write attention of the rows of one token to `o_THK`: of all rows, unless `is_mixed`."""
    num_heads, head_dim = q_THK.shape[1:]
    num_groups, rows = k_NGBK.shape[1:3]
    num_rows, tables_SN = len(batch.starts_S), batch.block_tables_SN
    group, block_size = num_heads // num_groups, block_size_of(k_NGBK)
    tiling = tiling_of(num_rows, num_groups)
    is_dependent, has_prefix = has_dependent_launch(q_THK.device), batch.shared is not None
    part_SPHK = sum_SPH = prefix_SPHK = prefix_sum_SPH = o_THK
    if tiling.parts > 1:
        part_SPHK, sum_SPH = new_parts(q_THK, num_rows, tiling.parts)
    overlaps = False
    if batch.shared is not None:
        prefix_SPHK, prefix_sum_SPH = attend_prefix(q_THK, batch, k_NGBK, v_NGBK, is_mixed=is_mixed)
        overlaps = OVERLAPS_PREFIX and is_dependent and len(batch.shared.tiles_YX) > 0  # else nothing was launched
    shared_S = batch.starts_S if batch.shared is None else batch.shared.blocks_S
    _decode_kernel[(num_groups, num_rows, tiling.parts)](
        q_THK, k_NGBK, v_NGBK, as_bytes(k_NGBK), as_bytes(v_NGBK), tables_SN, batch.starts_S, batch.row_starts_S1,
        o_THK, part_SPHK, sum_SPH,
        shared_S, prefix_SPHK, prefix_sum_SPH, q_THK.stride(0), tables_SN.stride(0), tiling.parts, tiling.min_tiles,
        head_dim**-0.5 * LOG2_E,
        G=num_groups, GROUP=group, M=GROUP_ROWS, K=head_dim, B=block_size, R=rows, TILE=tiling.tile,
        PREFIX_PARTS=PREFIX_PARTS if has_prefix else 0, PREFIX_TILE=PREFIX_TILE,
        IS_MIXED=is_mixed, PDL=is_dependent, LATE_WAIT=overlaps,
        num_warps=tiling.warps, num_stages=tiling.stages, launch_pdl=is_dependent,
    )  # fmt: skip
    if tiling.parts > 1:
        heads = 1 if num_rows <= FEW_ROWS else group
        _merge_kernel[(num_heads // heads, num_rows)](
            part_SPHK, sum_SPH, batch.starts_S, batch.row_starts_S1, shared_S, o_THK, tiling.parts, tiling.min_tiles,
            H=num_heads, HEADS=heads, K=head_dim, B=block_size, TILE=tiling.tile,
            P=triton.next_power_of_2(tiling.parts), HAS_PREFIX=has_prefix,
            IS_MIXED=is_mixed, PDL=is_dependent, num_warps=1, launch_pdl=is_dependent,
        )  # fmt: skip
