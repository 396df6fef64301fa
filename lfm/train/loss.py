"""Next-token cross-entropy over a large vocabulary, without ever holding all logits.

    lse[t] = log sum_v exp(z[t, v]);   loss = sum_t (lse[t] - z[t, target[t]]) + z_weight * sum_t lse[t]^2

Logits exist for one chunk of tokens at a time: the forward computes each chunk's gradient too, so the backward is two
multiplications. Logits, softmax and the sums are fp32 (fp64 for fp64 inputs); the gradient of the head accumulates in
that dtype over all chunks. The second term (Chowdhery et al., PaLM, 2022) keeps the logits from drifting.
Legend: T tokens, C tokens of a chunk, D hidden, V vocab.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lfm.kernels.norm import widen
from lfm.train.batches import NO_TARGET


class TokenLoss(NamedTuple):
    """Sums over the tokens that have a target: the differentiable objective, and its cross-entropy part alone."""

    objective: Tensor
    cross_entropy: Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_weight: float, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        total = widen(hidden_TD.new_zeros(()))
        objective, cross_entropy = total, total.clone()
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_head_VD = torch.zeros_like(head_VD, dtype=total.dtype)
        for begin in range(0, hidden_TD.shape[0], chunk_tokens):
            chunk = slice(begin, begin + chunk_tokens)
            hidden_CD, targets_C = hidden_TD[chunk], targets_T[chunk]
            logits_CV = widen(linear(hidden_CD, head_VD))
            has_target_C = targets_C != NO_TARGET
            index_C1 = targets_C.clamp(min=0)[:, None]
            lse_C = logits_CV.logsumexp(-1)
            picked_C = logits_CV.gather(1, index_C1)[:, 0]
            nll_C = torch.where(has_target_C, lse_C - picked_C, 0.0)
            lse_C = torch.where(has_target_C, lse_C, 0.0)
            cross_entropy = cross_entropy + nll_C.sum()
            objective = objective + nll_C.sum() + z_weight * lse_C.square().sum()
            # d objective / d z = softmax * (1 + 2 z_weight lse) - onehot; the logits' memory becomes the gradient's
            grad_CV = logits_CV.softmax(-1)
            grad_CV *= (1 + 2 * z_weight * lse_C)[:, None]
            grad_CV.scatter_(
                1, index_C1, grad_CV.gather(1, index_C1) - 1
            )  # an atomic addition would do it in any order
            grad_CV *= has_target_C[:, None]
            grad_CV = grad_CV.to(hidden_TD.dtype)
            grad_hidden_TD[chunk] = grad_CV @ head_VD
            grad_head_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_head_VD = ctx.saved_tensors
        grad_hidden_TD = grad_hidden_TD * grad_objective.to(grad_hidden_TD.dtype)
        return grad_hidden_TD, (grad_head_VD * grad_objective).to(ctx.head_dtype), None, None, None


def chunked_cross_entropy(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, *, z_weight: float = 0.0, chunk_tokens: int = 4096
) -> TokenLoss:
    """Loss of `hidden_TD @ head_VD^T` against the targets; rows with NO_TARGET cost nothing and get no gradient.

    Differentiable once, in both tensors. Returns sums, not means: the caller knows over what to average.
    """
    objective, cross_entropy = _ChunkedCrossEntropy.apply(hidden_TD, head_VD, targets_T, z_weight, chunk_tokens)
    return TokenLoss(objective, cross_entropy)
