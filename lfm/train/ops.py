"""The ops table of training: `PACKED`, with what autograd can do better and what the trainer wants to see."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lfm.kernels.attention import attend_packed, qkv_ref
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.norm import dense_ref, project_add_ref, rms_norm_ref
from lfm.kernels.short_conv import conv_in_packed
from lfm.model.ops import PACKED, Ops
from lfm.train.experts import experts_train
from lfm.train.fusion import fused
from lfm.train.routing import RouteRecorder


def train_ops(recorder: RouteRecorder) -> Ops:
    """The ops of one trainer; its routers report to `recorder`."""
    return replace(
        PACKED,
        conv_in=fused(conv_in_packed),
        qkv=fused(qkv_ref),
        attend=attend_train,
        project_add=fused(project_add_ref),
        dense=fused(dense_ref),
        route=recorder.route,
        experts=experts_train,
        norm=fused(rms_norm_ref),
    )


class _FlashAttention(torch.autograd.Function):
    """Causal attention of all rows at once, as `torch.nn.attention.varlen`, with two differences: heads of a group
    share K and V without copies, and the backward adds up in one order, so that a resumed run has the same bits."""

    @staticmethod
    def forward(ctx: Any, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, starts_S1: Tensor, longest: int) -> Tensor:
        out_THK, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            q_THK, k_TGK, v_TGK, starts_S1, starts_S1, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q_THK, k_TGK, v_TGK, out_THK, lse, starts_S1, rng_state, unused)
        ctx.longest = longest
        return out_THK

    @staticmethod
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, k_TGK, v_TGK, out_THK, lse, starts_S1, rng_state, unused = ctx.saved_tensors
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            grads = torch.ops.aten._flash_attention_backward(
                grad_THK.contiguous(), q_THK, k_TGK, v_TGK, out_THK, lse, starts_S1, starts_S1,
                ctx.longest, ctx.longest, 0.0, True, rng_state, unused,
            )  # fmt: skip
        finally:
            torch.use_deterministic_algorithms(was_deterministic, warn_only=warns_only)
        return *grads, None, None


def attend_train(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: ForwardBatch, k_NGBK: Tensor, v_NGBK: Tensor
) -> Tensor:
    """As `attend_packed`; in bf16 on a GPU all rows go into one variable-length flash attention."""
    if not (q_THK.is_cuda and q_THK.dtype == torch.bfloat16):
        return attend_packed(q_THK, k_TGK, v_TGK, batch, k_NGBK, v_NGBK)
    starts_S1 = batch.row_starts_S1.to(torch.int32)
    out = _FlashAttention.apply(q_THK, k_TGK, v_TGK.contiguous(), starts_S1, batch.num_positions)
    assert isinstance(out, Tensor)
    return out
