"""Attention over the paged cache on a CPU in fp32 or fp64: as the references, in fewer calls and smaller tiles.

Legend: T tokens, H q heads, G kv heads, K head dim, N blocks, B block size, C context.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from lfm.kernels.attention import attend_ref, write_kv_ref
from lfm.kernels.cpu_layers import cpu_norm
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.weights import Linear, Norm, Rope

# Queries per attention call of a prefill chunk. Each reads the keys up to its end: small tiles skip what is masked.
QUERY_TILE = 128


def cpu_qkv(
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
    """As `qkv_ref`; q and k are normed and rotated together."""
    num_groups, head_dim = k_NGBK.shape[1], rope.cos.shape[1]
    heads = linear(cpu_norm(h_TD, norm), qkv.weight, qkv.bias).view(h_TD.shape[0], -1, head_dim)
    num_rotated = heads.shape[1] - num_groups
    num_heads = num_rotated - num_groups
    weight = torch.cat((q_norm.weight.expand(num_heads, -1), k_norm.weight.expand(num_groups, -1)))
    raw = heads[:, :num_rotated]
    scale = raw.square().mean(-1, keepdim=True).add_(q_norm.eps).rsqrt_()  # rms_norm reads strided heads slowly
    low, high = (raw * scale).mul_(weight).chunk(2, dim=-1)
    half = head_dim // 2
    cos = rope.cos.index_select(0, batch.positions_T)[:, None, :half]
    sin = rope.sin.index_select(0, batch.positions_T)[:, None, :half]
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    q_THK, k_TGK, v_TGK = rotated[:, :num_heads], rotated[:, num_heads:], heads[:, num_rotated:]
    if k_NGBK.numel():
        _write(k_TGK, v_TGK, batch, k_NGBK, v_NGBK)
    return q_THK, k_TGK, v_TGK


def _write(k_TGK: Tensor, v_TGK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor) -> None:
    if k_TGK.shape[0] != 1 or k_NGBK.dtype != k_TGK.dtype:
        write_kv_ref(k_TGK, v_TGK, batch, k_NGBK, v_NGBK)
        return
    block, offset = divmod(int(batch.slots_T), k_NGBK.shape[2])
    k_NGBK[block, :, offset] = k_TGK[0]
    v_NGBK[block, :, offset] = v_TGK[0]


def cpu_attend(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor
) -> Tensor:
    """As `attend_ref`. A step of one row takes exactly its own keys, and no mask where it is one token."""
    if batch.num_rows != 1 or k_NGBK.dtype != q_THK.dtype:
        return attend_ref(q_THK, k_TGK, v_TGK, batch, k_NGBK, v_NGBK)
    num_tokens, start = q_THK.shape[0], batch.starts[0]
    context = start + num_tokens
    table = batch.block_tables_SN[0, : -(-context // k_NGBK.shape[2])]
    k_GCK, v_GCK = _row_of(k_NGBK, table), _row_of(v_NGBK, table)
    if num_tokens == 1:
        q_GMK = q_THK.view(k_GCK.shape[0], -1, q_THK.shape[2])
        o_1GMK = scaled_dot_product_attention(q_GMK[None], k_GCK[None, :, :context], v_GCK[None, :, :context])
        return o_1GMK.view(1, -1, q_THK.shape[2])
    return _chunk(q_THK, k_GCK, v_GCK, start)


def _row_of(kv_NGBK: Tensor, table: Tensor) -> Tensor:
    """K or V of whole blocks, in order [G, C, K]."""
    return kv_NGBK.index_select(0, table).transpose(0, 1).flatten(1, 2)


def _chunk(q_THK: Tensor, k_GCK: Tensor, v_GCK: Tensor, start: int) -> Tensor:
    """Causal attention of queries at positions from `start`."""
    outputs = []
    keys_C = torch.arange(k_GCK.shape[1])
    for q_MHK in torch.split(q_THK, QUERY_TILE):
        end = start + q_MHK.shape[0]
        mask_MC = keys_C[:end] <= torch.arange(start, end)[:, None]
        k_1GCK, v_1GCK = k_GCK[None, :, :end], v_GCK[None, :, :end]
        o_1HMK = scaled_dot_product_attention(
            q_MHK.transpose(0, 1)[None], k_1GCK, v_1GCK, attn_mask=mask_MC, enable_gqa=True
        )
        outputs.append(o_1HMK[0].transpose(0, 1))
        start = end
    return torch.cat(outputs)
