"""Grouped-query attention over the paged cache: q/k norm, RoPE and K/V write; then attention per row.

    q, k = rope(rms_norm(q)), rope(rms_norm(k));  o = softmax(q k^T / sqrt(K)) v, causal

RoPE is the rotate-half form on the whole head; angles in fp32, cos and sin rounded to the activation dtype
(transformers Lfm2RotaryEmbedding).
`qkv` and `attend` are the kernels of qk_rope.py, paged_decode.py and paged_prefill.py where these can run; together,
since the fast `attend` reads K and V from the cache and the fast `qkv` returns none.
Legend: T tokens, S rows, H q heads, G kv heads, K head dim, N blocks, B block size, C context. K and V in fp8 have more
rows than B per block: kv_layout.py.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.fp8 import FP8
from lfm.kernels.kv_fp8 import block_size_of, read_blocks, write_rows
from lfm.kernels.norm import norm_project, project_ref, rms_norm_ref
from lfm.kernels.paged_decode import GROUP_ROWS, decode_rows
from lfm.kernels.paged_prefill import prefill_rows
from lfm.kernels.qk_rope import norm_rotate_write
from lfm.kernels.triton_guard import runs_triton
from lfm.kernels.weights import Linear, Norm, Rope

# Queries per attention call of a prefill chunk: bounds the mask (heads/group x 512 x context booleans).
QUERY_TILE = 512
# Rows x context per attention call of decode rows: bounds the gathered copies of K and V (1 GB at 24B in bf16).
DECODE_TILE = 2**18


def rope_tables(num_positions: int, head_dim: int, theta: float, *, dtype: torch.dtype, device: torch.device) -> Rope:
    """Tables for positions 0 to num_positions - 1."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles_PK = positions[:, None] * (1.0 / theta**exponents)
    angles_PK = torch.cat((angles_PK, angles_PK), dim=-1)
    return Rope(angles_PK.cos().to(dtype), angles_PK.sin().to(dtype))


def _rotate(x_THK: Tensor, rope: Rope, positions_T: Tensor) -> Tensor:
    low, high = x_THK.chunk(2, dim=-1)
    rotated = torch.cat((-high, low), dim=-1)
    return x_THK * rope.cos[positions_T][:, None] + rotated * rope.sin[positions_T][:, None]


def qkv_ref(
    h_TD: Tensor,
    norm: Norm,
    qkv: Linear,
    q_norm: Norm,
    k_norm: Norm,
    rope: Rope,
    batch: ForwardBatch,
    k_NGBK: Tensor,
    v_NGBK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, K], k and v [T, G, K] of one layer, normed and rotated; k and v are also written to the cache.

    `qkv.weight` holds the rows of q, then k, then v. Empty cache tensors: nothing is written.
    """
    head_dim = rope.cos.shape[1]
    qkv_THK = project_ref(rms_norm_ref(h_TD, norm), qkv).view(h_TD.shape[0], -1, head_dim)
    num_groups = k_NGBK.shape[1]
    q_THK, k_TGK, v_TGK = torch.split(qkv_THK, [qkv_THK.shape[1] - 2 * num_groups, num_groups, num_groups], dim=1)
    q_THK = _rotate(rms_norm_ref(q_THK, q_norm), rope, batch.positions_T)
    k_TGK = _rotate(rms_norm_ref(k_TGK, k_norm), rope, batch.positions_T)
    if k_NGBK.numel():
        write_kv_ref(k_TGK, v_TGK, batch, k_NGBK, v_NGBK)
    return q_THK, k_TGK, v_TGK


def is_paged_fast(x: Tensor, num_heads: int, k_NGBK: Tensor) -> bool:
    """Whether the kernels take activations `x`: a cache in its dtype or fp8, head sizes that a product can have."""
    _, num_groups, _, head_dim = k_NGBK.shape
    has_cache = k_NGBK.numel() > 0 and k_NGBK.dtype in (x.dtype, FP8) and k_NGBK.is_contiguous()
    return runs_triton(x) and has_cache and head_dim in (32, 64, 128) and num_heads // num_groups <= GROUP_ROWS


def qkv(
    h_TD: Tensor,
    norm: Norm,
    qkv: Linear,
    q_norm: Norm,
    k_norm: Norm,
    rope: Rope,
    batch: ForwardBatch,
    k_NGBK: Tensor,
    v_NGBK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `qkv_ref`, as a projection and one launch behind it; k and v are in the cache alone, what returns is empty."""
    _, num_groups, _, head_dim = k_NGBK.shape
    if not is_paged_fast(h_TD, qkv.weight.shape[0] // head_dim - 2 * num_groups, k_NGBK):
        return qkv_ref(h_TD, norm, qkv, q_norm, k_norm, rope, batch, k_NGBK, v_NGBK)
    q_THK = norm_rotate_write(norm_project(h_TD, norm, qkv), q_norm, k_norm, rope, batch, k_NGBK, v_NGBK)
    no_tokens = q_THK.new_empty(0, num_groups, head_dim)
    return q_THK, no_tokens, no_tokens


def write_kv_ref(k_TGK: Tensor, v_TGK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor) -> None:
    """Store K and V of the step's tokens at their slots. Idempotent; padding tokens go to the scratch block."""
    block_size = block_size_of(k_NGBK)
    blocks_T, offsets_T = batch.slots_T // block_size, batch.slots_T % block_size
    write_rows(k_TGK, blocks_T, offsets_T, k_NGBK)
    write_rows(v_TGK, blocks_T, offsets_T, v_NGBK)


def _attend_rows(q_GMK: Tensor, k_GCK: Tensor, v_GCK: Tensor, positions_M: Tensor) -> Tensor:
    """Causal attention of queries at `positions_M` over a contiguous context from position 0 [G, M, K]."""
    keys_C = torch.arange(k_GCK.shape[1], device=k_GCK.device)
    mask_MC = keys_C[None, :] <= positions_M[:, None]
    return scaled_dot_product_attention(q_GMK[None], k_GCK[None], v_GCK[None], attn_mask=mask_MC)[0]


def _attend_chunk(q_THK: Tensor, k_GCK: Tensor, v_GCK: Tensor, start: int) -> Tensor:
    """One row's chunk over its whole context. The q heads of a group become further queries of their kv head."""
    num_tokens, num_heads, head_dim = q_THK.shape
    num_groups = k_GCK.shape[0]
    outputs = []
    for begin in range(0, num_tokens, QUERY_TILE):
        tile_THK = q_THK[begin : begin + QUERY_TILE]
        size = tile_THK.shape[0]
        q_GMK = tile_THK.reshape(size, num_groups, -1, head_dim).permute(1, 2, 0, 3).reshape(num_groups, -1, head_dim)
        positions = torch.arange(start + begin, start + begin + size, device=q_THK.device)
        context = start + begin + size  # later keys are masked anyway
        o_GMK = _attend_rows(q_GMK, k_GCK[:, :context], v_GCK[:, :context], positions.repeat(num_heads // num_groups))
        outputs.append(
            o_GMK.reshape(num_groups, -1, size, head_dim).permute(2, 0, 1, 3).reshape(size, num_heads, head_dim)
        )
    return torch.cat(outputs)


def _attend_decode(q_SHK: Tensor, k_NGBK: Tensor, v_NGBK: Tensor, tables_SN: Tensor, positions_S: Tensor) -> Tensor:
    """One query per row, all rows at once. Slots past a row's end hold garbage, NaN even, so K and V are cleaned."""
    rows, num_heads, head_dim = q_SHK.shape
    num_groups = k_NGBK.shape[1]
    k_SGCK = read_blocks(k_NGBK, tables_SN, q_SHK.dtype).transpose(1, 2).reshape(rows, num_groups, -1, head_dim)
    v_SGCK = read_blocks(v_NGBK, tables_SN, q_SHK.dtype).transpose(1, 2).reshape(rows, num_groups, -1, head_dim)
    keys_C = torch.arange(k_SGCK.shape[2], device=q_SHK.device)
    valid_SC = keys_C[None, :] <= positions_S[:, None]
    clean = valid_SC[:, None, :, None]
    k_SGCK, v_SGCK = k_SGCK.where(clean, 0.0), v_SGCK.where(clean, 0.0)
    q_SGMK = q_SHK.reshape(rows, num_groups, -1, head_dim)
    o_SGMK = scaled_dot_product_attention(q_SGMK, k_SGCK, v_SGCK, attn_mask=valid_SC[:, None, None, :])
    return o_SGMK.reshape(rows, num_heads, head_dim)


def attend_ref(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor
) -> Tensor:
    """Attention of every token over its row's blocks [T, H, K]. Rows of one token go together, chunks one by one.

    The scheduler puts decode rows first, so they are a prefix of the batch.
    """
    del k_TGK, v_TGK  # already in the cache
    row_starts, block_size = batch.row_starts, block_size_of(k_NGBK)
    num_decode = 0
    while num_decode < batch.num_rows and row_starts[num_decode + 1] - row_starts[num_decode] == 1:
        num_decode += 1
    outputs = []
    if num_decode:
        blocks = max(batch.starts[:num_decode]) // block_size + 1
        tile = max(1, DECODE_TILE // (blocks * block_size))
        for begin in range(0, num_decode, tile):
            rows = slice(begin, min(begin + tile, num_decode))
            tables_SN, positions_S = batch.block_tables_SN[rows, :blocks], batch.positions_T[rows]
            outputs.append(_attend_decode(q_THK[rows], k_NGBK, v_NGBK, tables_SN, positions_S))
    for row in range(num_decode, batch.num_rows):
        begin, end = row_starts[row], row_starts[row + 1]
        context = batch.starts[row] + end - begin
        table = batch.block_tables_SN[row, : -(-context // block_size)]
        k_GCK = read_blocks(k_NGBK, table, q_THK.dtype).transpose(0, 1).flatten(1, 2)[:, :context]
        v_GCK = read_blocks(v_NGBK, table, q_THK.dtype).transpose(0, 1).flatten(1, 2)[:, :context]
        outputs.append(_attend_chunk(q_THK[begin:end], k_GCK, v_GCK, batch.starts[row]))
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


def attend(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor) -> Tensor:
    """As `attend_ref`, from the tensors of the batch alone. As many tokens as rows: every row has one."""
    if not is_paged_fast(q_THK, q_THK.shape[1], k_NGBK):
        return attend_ref(q_THK, k_TGK, v_TGK, batch, k_NGBK, v_NGBK)
    o_THK = torch.empty_like(q_THK)
    num_rows = batch.starts_S.shape[0]
    if q_THK.shape[0] == num_rows:
        decode_rows(q_THK, o_THK, batch, k_NGBK, v_NGBK, is_mixed=False)
        return o_THK
    if num_rows > 1:
        decode_rows(q_THK, o_THK, batch, k_NGBK, v_NGBK, is_mixed=True)
    prefill_rows(q_THK, o_THK, batch, k_NGBK, v_NGBK, skip_single=num_rows > 1)
    return o_THK


def attend_packed(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor
) -> Tensor:
    """The same without a cache, for training and full recompute: every row starts at position 0. Differentiable."""
    del k_NGBK, v_NGBK
    outputs = []
    for begin, end in zip(batch.row_starts[:-1], batch.row_starts[1:], strict=True):
        k_GCK, v_GCK = k_TGK[begin:end].transpose(0, 1), v_TGK[begin:end].transpose(0, 1)
        outputs.append(_attend_chunk(q_THK[begin:end], k_GCK, v_GCK, 0))
    return torch.cat(outputs)
