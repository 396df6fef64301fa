"""The experts of one MoE layer under autograd: grouped matrix products over the pairs sorted by expert.

The same maths as `lfm.kernels.experts`. What differs is the backward: gathering pairs and summing them back are
permutations, so their gradients are gathers too, without atomic additions: the result is the same in every run.
Legend: T tokens, D hidden, E experts, A experts per token, F expert width, P = T * A pairs sorted by expert.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lfm.kernels.experts import has_grouped_mm
from lfm.kernels.norm import widen
from lfm.kernels.weights import ExpertScales
from lfm.train.fusion import fused

_MAX_BYTE = 255


@fused
def _gather_sum(grad_PD: Tensor, inverse_P: Tensor, num_chosen: int) -> Tensor:
    """Each token's pairs, added up [T, D]."""
    grad_TAD = grad_PD[inverse_P].view(-1, num_chosen, grad_PD.shape[1])
    return widen(grad_TAD).sum(1).to(grad_PD.dtype)


@fused
def _weighted_sum(out_PD: Tensor, weights_TA: Tensor, inverse_P: Tensor) -> Tensor:
    out_TAD = out_PD[inverse_P].view(*weights_TA.shape, -1)
    return (widen(out_TAD) * widen(weights_TA)[:, :, None]).sum(1).to(out_PD.dtype)


@fused
def _weighted_sum_backward(
    grad_TD: Tensor, out_PD: Tensor, weights_TA: Tensor, order_P: Tensor, inverse_P: Tensor
) -> tuple[Tensor, Tensor]:
    num_chosen = weights_TA.shape[1]
    grad_out_PD = widen(grad_TD[order_P // num_chosen]) * widen(weights_TA).flatten()[order_P, None]
    out_TAD = out_PD[inverse_P].view(*weights_TA.shape, -1)
    grad_weights_TA = (widen(out_TAD) * widen(grad_TD)[:, None]).sum(-1)
    return grad_out_PD.to(out_PD.dtype), grad_weights_TA.to(weights_TA.dtype)


@fused
def _counts(flat_P: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs [E], without additions that wait for each other."""
    return (flat_P[:, None] == torch.arange(num_experts, device=flat_P.device)).sum(0)


@fused
def _gate(gate_up_P2F: Tensor) -> Tensor:
    gate_PF, up_PF = gate_up_P2F.chunk(2, dim=-1)
    return silu(gate_PF) * up_PF


class _Dispatch(torch.autograd.Function):
    """x_TD -> the rows of its sorted pairs [P, D]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_P: Tensor, inverse_P: Tensor, num_chosen: int) -> Tensor:
        ctx.save_for_backward(inverse_P)
        ctx.num_chosen = num_chosen
        return x_TD[order_P // num_chosen]

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_P,) = ctx.saved_tensors
        return _gather_sum(grad_PD, inverse_P, ctx.num_chosen), None, None, None


class _Combine(torch.autograd.Function):
    """out_PD, weights_TA -> each token's weighted sum [T, D], added up in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, out_PD: Tensor, weights_TA: Tensor, order_P: Tensor, inverse_P: Tensor) -> Tensor:
        ctx.save_for_backward(out_PD, weights_TA, order_P, inverse_P)
        return _weighted_sum(out_PD, weights_TA, inverse_P)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return *_weighted_sum_backward(grad_TD, *ctx.saved_tensors), None, None


def experts_train(
    h_TD: Tensor,
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales | None = None,
) -> Tensor:
    """h + the weighted sum of each token's experts [T, D]; differentiable in all floating-point arguments."""
    assert scales is None, "weights in fp8 are not trained"
    num_experts, num_chosen = gate_up_E2FD.shape[0], chosen_TA.shape[1]
    flat_P = chosen_TA.flatten()
    # The fewer bits, the fewer passes of the sort.
    order_P = (flat_P.to(torch.uint8) if num_experts <= _MAX_BYTE else flat_P).argsort(stable=True)
    inverse_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
    counts_E = _counts(flat_P, num_experts)
    x_PD = _Dispatch.apply(x_TD, order_P, inverse_P, num_chosen)
    multiply = _grouped if has_grouped_mm(x_TD) else _one_by_one
    out_PD = multiply(x_PD, counts_E, gate_up_E2FD, down_EDF)
    return h_TD + _Combine.apply(out_PD, weights_TA, order_P, inverse_P)


def _grouped(x_PD: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Two grouped products, without a host synchronisation."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    grouped_mm = torch.nn.functional.grouped_mm
    gate_up_P2F = grouped_mm(x_PD, gate_up_E2FD.transpose(1, 2), offs=ends_E)
    return grouped_mm(_gate(gate_up_P2F), down_EDF.transpose(1, 2), offs=ends_E)


def _one_by_one(x_PD: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """One expert after the other: any dtype and device. The counts are read by the host."""
    outputs = []
    for expert, part_PD in enumerate(x_PD.split(counts_E.tolist())):
        if part_PD.shape[0]:
            gate, up = linear(part_PD, gate_up_E2FD[expert]).chunk(2, dim=-1)
            outputs.append(linear(silu(gate) * up, down_EDF[expert]))
    return torch.cat(outputs)
