"""The experts of one MoE layer: every token through its chosen SwiGLU experts, summed by router weight, residual added.

    h[t] + sum_a w[t, a] * down[e] (silu(gate[e] x[t]) * (up[e] x[t])),   e = chosen[t, a]

Rounding point: the expert's output, before its weight. Sums over experts are kept in fp32. The kernels put the weight
on the down product's input instead, which is rounded there anyway.
An id of E or more is no expert: nothing is computed for it, and a token without experts keeps its h.
Legend: T tokens, D hidden, E experts, A experts per token, F expert width, P = T * A pairs sorted by expert.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lfm.kernels.fp8 import quantise_rows
from lfm.kernels.moe_grouped import experts_grouped
from lfm.kernels.moe_grouped_fp8 import experts_grouped_fp8
from lfm.kernels.moe_prefill import MIN_TOKENS as MIN_PREFILL_TOKENS
from lfm.kernels.moe_prefill import experts_prefill, has_prefill_kernels
from lfm.kernels.moe_prefill_fp8 import experts_prefill_fp8
from lfm.kernels.moe_small import MAX_TOKENS as MAX_SMALL_TOKENS
from lfm.kernels.moe_small import experts_small
from lfm.kernels.norm import widen
from lfm.kernels.triton_guard import runs_triton
from lfm.kernels.tuned import grouped_tiles, tuned_for
from lfm.kernels.weights import ExpertScales, scaled


def _sort_by_expert(chosen_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the (token, choice) pairs by expert [P], and where each expert's pairs end [E]."""
    flat_P = chosen_TA.flatten()
    order_P = flat_P.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_P.device)
    counts.scatter_add_(0, flat_P, torch.ones_like(flat_P))
    return order_P, counts[:num_experts].cumsum(0)


def _combine(h_TD: Tensor, out_PD: Tensor, order_P: Tensor, weights_TA: Tensor) -> Tensor:
    """Undo the sort and sum each token's experts in the order they were chosen, which no batch shape changes."""
    num_tokens, num_chosen = weights_TA.shape
    unsorted_PD = torch.empty_like(out_PD)
    unsorted_PD[order_P] = out_PD
    weighted = widen(unsorted_PD).view(num_tokens, num_chosen, -1) * widen(weights_TA)[:, :, None]
    return h_TD + weighted.sum(1).to(h_TD.dtype)


def experts_ref(
    h_TD: Tensor,
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales | None = None,
) -> Tensor:
    """One expert after the other. The counts are read by the host, so this synchronises on a GPU."""
    gate_up_scale, down_scale = scales or (None, None)
    order_P, ends_E = _sort_by_expert(chosen_TA, gate_up_E2FD.shape[0])
    x_PD = x_TD[order_P // chosen_TA.shape[1]]
    outputs, begin = [], 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > begin:
            gate_up = scaled(gate_up_E2FD[expert], None if gate_up_scale is None else gate_up_scale[expert], x_TD.dtype)
            down = scaled(down_EDF[expert], None if down_scale is None else down_scale[expert], x_TD.dtype)
            gate, up = linear(x_PD[begin:end], gate_up).chunk(2, dim=-1)
            outputs.append(linear(silu(gate) * up, down))
        begin = end
    outputs.append(torch.zeros_like(x_PD[begin:]))  # pairs without an expert come last
    return _combine(h_TD, torch.cat(outputs), order_P, weights_TA)


def experts_fp8_ref(
    h_TD: Tensor,
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales,
) -> Tensor:
    """As `experts_ref` with both inputs of every product in fp8: what large steps compute with fp8 weights."""
    x_TD = scaled(*quantise_rows(x_TD), x_TD.dtype)
    out_TD = widen(h_TD).clone()
    for expert in range(len(down_EDF)):
        token_P, choice_P = (chosen_TA == expert).nonzero(as_tuple=True)
        gate_up = scaled(gate_up_E2FD[expert], scales.gate_up[expert], torch.float32)
        gate, up = linear(x_TD[token_P].float(), gate_up).chunk(2, dim=-1)
        act_PF = (silu(gate) * up * weights_TA[token_P, choice_P, None]).to(x_TD.dtype)
        down = scaled(down_EDF[expert], scales.down[expert], torch.float32)
        out_TD.index_add_(0, token_P, linear(scaled(*quantise_rows(act_PF), torch.float32), down).to(out_TD.dtype))
    return out_TD.to(h_TD.dtype)


def has_grouped_mm(x: Tensor) -> bool:
    """Whether torch's grouped product runs on this tensor: bf16 on an NVIDIA GPU of capability 8.0 or later."""
    return x.is_cuda and x.dtype == torch.bfloat16


def experts(
    h_TD: Tensor,
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales | None = None,
) -> Tensor:
    """As `experts_ref`, in kernels that never ask the host; which of them is decided by the number of tokens alone."""
    num_tokens = x_TD.shape[0]
    _, hidden, width = down_EDF.shape
    is_fast = runs_triton(x_TD) and num_tokens > 0 and hidden % 64 == 0 and width % 64 == 0
    if not (is_fast and gate_up_E2FD.is_contiguous() and down_EDF.is_contiguous()):
        return experts_ref(h_TD, x_TD, chosen_TA, weights_TA, gate_up_E2FD, down_EDF, scales)
    args = h_TD.contiguous(), x_TD.contiguous(), chosen_TA.contiguous(), weights_TA.contiguous(), gate_up_E2FD, down_EDF
    if num_tokens <= MAX_SMALL_TOKENS:
        return experts_small(*args, scales)
    if has_prefill_kernels(x_TD.device):
        if scales is None and num_tokens >= MIN_PREFILL_TOKENS:
            return experts_prefill(*args)
        if scales is not None and num_tokens >= tuned_for(x_TD.device).fp8_prefill_tokens:
            return experts_prefill_fp8(*args, scales)
    if scales is not None and grouped_tiles(x_TD.device, "fp8", num_tokens).is_all_fp8:
        return experts_grouped_fp8(*args, scales)
    return experts_grouped(*args, scales)
