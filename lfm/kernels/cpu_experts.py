"""The experts of one MoE layer on a CPU in fp32 or fp64: as `experts_ref`, with fewer copies and calls.

Legend: T tokens, D hidden, E experts, A experts per token, F expert width, P = T * A pairs sorted by expert.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, silu

from lfm.kernels.experts import experts_ref
from lfm.kernels.weights import ExpertScales

# Copies of one token's experts, bytes: larger ones leave the caches, and the copy costs what reading them costs.
MAX_COPY = 2**21


def cpu_experts(
    h_TD: Tensor,
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales | None = None,
) -> Tensor:
    """As `experts_ref`."""
    if scales is not None:
        return experts_ref(h_TD, x_TD, chosen_TA, weights_TA, gate_up_E2FD, down_EDF, scales)
    num_experts, num_chosen = gate_up_E2FD.shape[0], chosen_TA.shape[1]
    copy_bytes = num_chosen * gate_up_E2FD[0].numel() * gate_up_E2FD.element_size()
    if x_TD.shape[0] == 1 and copy_bytes <= MAX_COPY and int(chosen_TA.max()) < num_experts:
        return _one_token(h_TD, x_TD, chosen_TA[0], weights_TA, gate_up_E2FD, down_EDF)
    return _sorted(h_TD, x_TD, chosen_TA, weights_TA, gate_up_E2FD, down_EDF)


def _one_token(
    h_1D: Tensor, x_1D: Tensor, chosen_A: Tensor, weights_1A: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The chosen experts side by side, as one of A times the width: two copies and two products."""
    gate_up_A12F = torch.matmul(x_1D, gate_up_E2FD.transpose(1, 2).index_select(0, chosen_A))
    gate_A1F, up_A1F = gate_up_A12F.chunk(2, dim=-1)
    act_A1F = silu(gate_A1F).mul_(up_A1F).mul_(weights_1A.view(-1, 1, 1))
    down_AFD = down_EDF.transpose(1, 2).index_select(0, chosen_A)
    return torch.addmm(h_1D, act_A1F.view(1, -1), down_AFD.view(-1, h_1D.shape[1]))


def _sorted(
    h_TD: Tensor, x_TD: Tensor, chosen_TA: Tensor, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """One expert after the other on its part of the sorted pairs; then each token's sum in the order of its choice."""
    num_experts, num_chosen = gate_up_E2FD.shape[0], chosen_TA.shape[1]
    chosen_P = chosen_TA.flatten()
    order_P = chosen_P.argsort(stable=True)
    ends = torch.bincount(chosen_P, minlength=num_experts)[:num_experts].cumsum(0).tolist()
    parts = [(e, begin, end) for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)) if begin < end]
    x_PD = x_TD.index_select(0, order_P.div(num_chosen, rounding_mode="floor"))
    gate_up_P2F = x_PD.new_empty(len(x_PD), gate_up_E2FD.shape[1])
    for expert, begin, end in parts:
        torch.mm(x_PD[begin:end], gate_up_E2FD[expert].t(), out=gate_up_P2F[begin:end])
    gate_PF, up_PF = gate_up_P2F[: ends[-1]].chunk(2, dim=-1)
    act_PF, out_PD = silu(gate_PF).mul_(up_PF), x_PD  # each expert's input is read by now
    for expert, begin, end in parts:
        torch.mm(act_PF[begin:end], down_EDF[expert].t(), out=out_PD[begin:end])
    out_PD[ends[-1] :] = 0.0  # pairs without an expert
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P))
    sums_TD = embedding_bag(place_P.view_as(chosen_TA), out_PD, per_sample_weights=weights_TA, mode="sum")
    return sums_TD.add_(h_TD)
