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
from lfm.train.fusion import fused


class TokenLoss(NamedTuple):
    """Sums over the tokens that have a target: the differentiable objective, and its cross-entropy part alone."""

    objective: Tensor
    cross_entropy: Tensor


@fused
def _terms(logits_CV: Tensor, targets_C: Tensor, z_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's cross-entropy [C], squared lse [C], and the gradient of the objective by the logits [C, V]."""
    wide_CV = widen(logits_CV)
    has_target_C = targets_C != NO_TARGET
    index_C1 = targets_C.clamp(min=0)[:, None]
    lse_C = wide_CV.logsumexp(-1)
    nll_C = torch.where(has_target_C, lse_C - wide_CV.gather(1, index_C1)[:, 0], 0.0)
    # d objective / d z = softmax * (1 + 2 z_weight lse) - onehot
    softmax_CV = (wide_CV - lse_C[:, None]).exp() * (1 + 2 * z_weight * lse_C)[:, None]
    is_target_CV = torch.arange(wide_CV.shape[1], device=wide_CV.device) == index_C1
    grad_CV = (softmax_CV - is_target_CV.to(wide_CV.dtype)) * has_target_C[:, None]
    return nll_C, torch.where(has_target_C, lse_C.square(), 0.0), grad_CV.to(logits_CV.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_weight: float, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        total = widen(hidden_TD.new_zeros(()))
        cross_entropy, squares = total, total.clone()
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_head_VD = torch.zeros_like(head_VD, dtype=total.dtype)
        for begin in range(0, hidden_TD.shape[0], chunk_tokens):
            chunk = slice(begin, begin + chunk_tokens)
            hidden_CD = hidden_TD[chunk]
            nll_C, square_C, grad_CV = _terms(linear(hidden_CD, head_VD), targets_T[chunk], z_weight)
            cross_entropy = cross_entropy + nll_C.sum()
            squares = squares + square_C.sum()
            grad_hidden_TD[chunk] = grad_CV @ head_VD
            grad_head_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(cross_entropy)
        return cross_entropy + z_weight * squares, cross_entropy

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


class _SelectRows(torch.autograd.Function):
    """x_TD -> the rows that are named, each once, so that the gradient is a copy and no sum."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_R: Tensor) -> Tensor:
        ctx.save_for_backward(rows_R)
        ctx.num_rows = x_TD.shape[0]
        return x_TD[rows_R.clamp(max=ctx.num_rows - 1)]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        (rows_R,) = ctx.saved_tensors
        grad_TD = grad_RD.new_zeros(ctx.num_rows + 1, grad_RD.shape[1])  # the last row is for padding
        return grad_TD.index_copy_(0, rows_R, grad_RD)[:-1], None


def select_rows(x_TD: Tensor, rows_R: Tensor) -> Tensor:
    """The rows `rows_R` of x [R, D], all different but for T, which is padding; the same in every run."""
    out = _SelectRows.apply(x_TD, rows_R)
    assert isinstance(out, Tensor)
    return out
