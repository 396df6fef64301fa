"""The experts of one MoE layer: every token through its chosen SwiGLU experts, summed by router weight, residual added.

    h[t] + sum_a w[t, a] * down[e] (silu(gate[e] x[t]) * (up[e] x[t])),   e = chosen[t, a]

Rounding point: the expert's output, before its weight. Sums over experts are kept in fp32.
Legend: T tokens, D hidden, E experts, A experts per token, F expert width, P = T * A pairs sorted by expert.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lfm.kernels.norm import widen


def _sort_by_expert(chosen_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the (token, choice) pairs by expert [P], and where each expert's pairs end [E]."""
    flat_P = chosen_TA.flatten()
    order_P = flat_P.argsort(stable=True)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_P.device)
    counts_E.scatter_add_(0, flat_P, torch.ones_like(flat_P))
    return order_P, counts_E.cumsum(0)


def _combine(h_TD: Tensor, out_PD: Tensor, order_P: Tensor, weights_TA: Tensor) -> Tensor:
    """Undo the sort and sum each token's experts in the order they were chosen, which no batch shape changes."""
    num_tokens, num_chosen = weights_TA.shape
    unsorted_PD = torch.empty_like(out_PD)
    unsorted_PD[order_P] = out_PD
    weighted = widen(unsorted_PD).view(num_tokens, num_chosen, -1) * widen(weights_TA)[:, :, None]
    return h_TD + weighted.sum(1).to(h_TD.dtype)


def experts_ref(
    h_TD: Tensor, x_TD: Tensor, chosen_TA: Tensor, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """One expert after the other. The counts are read by the host, so this synchronises on a GPU."""
    order_P, ends_E = _sort_by_expert(chosen_TA, gate_up_E2FD.shape[0])
    x_PD = x_TD[order_P // chosen_TA.shape[1]]
    outputs, begin = [], 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > begin:
            gate, up = linear(x_PD[begin:end], gate_up_E2FD[expert]).chunk(2, dim=-1)
            outputs.append(linear(silu(gate) * up, down_EDF[expert]))
        begin = end
    return _combine(h_TD, torch.cat(outputs), order_P, weights_TA)


def _grouped_mm() -> Any:
    """torch's grouped GEMM under its public name (torch 2.10 and later) or the older private one."""
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def has_grouped_mm(x: Tensor) -> bool:
    """Whether the libraries' grouped GEMM runs on this tensor: bf16 on an NVIDIA GPU of capability 8.0 or later."""
    return x.is_cuda and x.dtype == torch.bfloat16 and _grouped_mm() is not None


def experts(
    h_TD: Tensor, x_TD: Tensor, chosen_TA: Tensor, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """As `experts_ref`, as two grouped GEMMs without a host synchronisation where the libraries offer them."""
    if not has_grouped_mm(x_TD):
        return experts_ref(h_TD, x_TD, chosen_TA, weights_TA, gate_up_E2FD, down_EDF)
    order_P, ends_E = _sort_by_expert(chosen_TA, gate_up_E2FD.shape[0])
    offsets_E = ends_E.to(torch.int32)
    grouped_mm = _grouped_mm()
    x_PD = x_TD[order_P // chosen_TA.shape[1]]
    gate_PF, up_PF = grouped_mm(x_PD, gate_up_E2FD.transpose(1, 2), offs=offsets_E).chunk(2, dim=-1)
    out_PD = grouped_mm(silu(gate_PF) * up_PF, down_EDF.transpose(1, 2), offs=offsets_E)
    return _combine(h_TD, out_PD, order_P, weights_TA)
