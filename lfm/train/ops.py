"""The ops table of training: `PACKED`, with what autograd can do better and what the trainer wants to see."""

from dataclasses import replace

import torch
from torch import Tensor

from lfm.kernels.attention import attend_packed
from lfm.kernels.forward_batch import ForwardBatch
from lfm.model.ops import PACKED, Ops
from lfm.train.experts import experts_train
from lfm.train.routing import RouteRecorder


def train_ops(recorder: RouteRecorder) -> Ops:
    """The ops of one trainer; its routers report to `recorder`."""
    return replace(PACKED, route=recorder.route, experts=experts_train, attend=attend_train)


def attend_train(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor
) -> Tensor:
    """As `attend_packed`; in bf16 on a GPU all rows go into one variable-length flash attention."""
    if not (q_THK.is_cuda and q_THK.dtype == torch.bfloat16):
        return attend_packed(q_THK, k_TGK, v_TGK, batch, k_NGBK, v_NGBK)
    from torch.nn.attention.varlen import varlen_attn  # takes 0.3 s to import, and only a GPU needs it

    # The flag for grouped heads came with torch 2.12, so each head gets its own copy of K and V instead.
    group = q_THK.shape[1] // k_TGK.shape[1]
    k_THK, v_THK = k_TGK.repeat_interleave(group, dim=1), v_TGK.repeat_interleave(group, dim=1)
    starts_S1, longest = batch.row_starts_S1.to(torch.int32), batch.num_positions
    causal = (-1, 0)
    out = varlen_attn(q_THK, k_THK, v_THK, starts_S1, starts_S1, longest, longest, window_size=causal)
    assert isinstance(out, Tensor)
    return out
