"""The decoupled top-K distillation loss of the LFM2 technical report (arXiv 2511.23404).

Of the teacher only the logits of its K likeliest tokens are stored. With T that set and P_T(T) its probability, the
chain rule splits the divergence into "is the token in T?" and "which one of T is it?":

    loss = KL(Bern(P_T(T)) || Bern(P_S(T))) + P_T(T) * KL_tau(P_T(. | T) || P_S(. | T))

The temperature tau applies to the second term only. At tau = 1 and K = V this is KL(P_T || P_S); for smaller K it never
compares the teacher's truncated distribution with the student's whole one, which would pull the student's tail to zero.
In training it is mixed with next-token cross-entropy, and logits exist for one chunk of tokens at a time.
Legend: T tokens, C tokens of a chunk, D hidden, K stored logits per token, V vocab.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lfm.kernels.norm import widen
from lfm.train.batches import NO_TARGET


class TopK(NamedTuple):
    """What a teacher says of each token: its likeliest ids, their logits, log-sum-exp over all of its logits."""

    ids_TK: Tensor
    logits_TK: Tensor
    lse_T: Tensor


def chunked_distillation(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    teacher: TopK,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 4096,
) -> Tensor:
    """The loss of logits `hidden @ head^T` against the teacher, summed over the tokens that have a target.

    Differentiable in both tensors. The backward makes each chunk's logits again.
    """
    total = widen(hidden_TD.new_zeros(()))
    for begin in range(0, hidden_TD.shape[0], chunk_tokens):
        chunk = slice(begin, begin + chunk_tokens)
        total = total + checkpoint(
            _chunk_loss,
            hidden_TD[chunk],
            head_VD,
            targets_T[chunk],
            TopK(*(tensor[chunk] for tensor in teacher)),
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


def _chunk_loss(hidden_CD: Tensor, head_VD: Tensor, targets_C: Tensor, teacher: TopK, temperature: float) -> Tensor:
    loss_C = decoupled_top_k_loss(linear(hidden_CD, head_VD), *teacher, temperature=temperature)
    return torch.where(targets_C != NO_TARGET, loss_C, 0.0).sum()


def decoupled_top_k_loss(
    student_TV: Tensor,
    teacher_ids_TK: Tensor,
    teacher_logits_TK: Tensor,
    teacher_lse_T: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Loss of each token [T], in fp32 or wider, differentiable in the student's logits.

    Args:
        teacher_ids_TK: the teacher's likeliest tokens, no id twice in a row.
        teacher_logits_TK: their logits, at temperature 1.
        teacher_lse_T: log-sum-exp over all of the teacher's logits.
    """
    student_TV, teacher_logits_TK = widen(student_TV), widen(teacher_logits_TK)
    student_TK = student_TV.gather(1, teacher_ids_TK)
    log_inside_teacher_T = (teacher_logits_TK.logsumexp(-1) - widen(teacher_lse_T)).clamp(max=0.0)
    log_inside_student_T = (student_TK.logsumexp(-1) - student_TV.logsumexp(-1)).clamp(max=0.0)
    inside_T = log_inside_teacher_T.exp()
    which_T = _kl((teacher_logits_TK / temperature).log_softmax(-1), (student_TK / temperature).log_softmax(-1))
    return _bernoulli_kl(log_inside_teacher_T, log_inside_student_T) + inside_T * which_T


def _kl(log_p_TK: Tensor, log_q_TK: Tensor) -> Tensor:
    return (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum(-1)


def _bernoulli_kl(log_p_T: Tensor, log_q_T: Tensor) -> Tensor:
    """KL between two coins, given the logs of their first probability. A certain teacher has no second term."""
    inside_T = log_p_T.exp() * (log_p_T - log_q_T)
    outside_T = -log_p_T.expm1()
    log_ratio_T = _log1mexp(log_p_T) - _log1mexp(log_q_T)
    return inside_T + outside_T * log_ratio_T


def _log1mexp(log_p_T: Tensor) -> Tensor:
    """log(1 - p) from log p, finite at p = 1 (there its factor is 0, or the loss is capped)."""
    tiny = 1e-7 if log_p_T.element_size() < 8 else 1e-15
    return (-log_p_T.expm1()).clamp(min=tiny).log()
