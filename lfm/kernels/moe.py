"""Router and experts of one MoE layer in one op, which may know the next layer's norm of the result at its end.

    h' = h + sum_a w[t, a] expert(norm(h)[t]),  e = chosen[t, a];   next = next_norm(h'), or None where nobody made it

As `route` and then `experts`; large steps go through one chain of launches instead (moe_chain.py).
Legend: T tokens, D hidden, E experts, F expert width.
"""

import torch
from torch import Tensor

from lfm.kernels.experts import experts, experts_ref
from lfm.kernels.moe_chain import can_chain, moe_chain
from lfm.kernels.moe_prefill import has_prefill_kernels
from lfm.kernels.router import route, route_ref
from lfm.kernels.triton_guard import runs_triton
from lfm.kernels.weights import ExpertScales, Norm, Router

# Tokens from which on the chain is taken. Never, until it is measured: predicted 43 us less of 173 a layer at 8,192.
MIN_CHAIN_TOKENS = 1 << 62


def moe_ref(
    h_TD: Tensor,
    norm: Norm,
    router: Router,
    is_real_T: Tensor | None,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales | None,
    next_norm: Norm,
) -> tuple[Tensor, Tensor | None]:
    """Return h' [T, D] and None: the next op applies its norm itself."""
    del next_norm
    x_TD, chosen_TA, weights_TA = route_ref(h_TD, norm, router, is_real_T)
    return experts_ref(h_TD, x_TD, chosen_TA, weights_TA, gate_up_E2FD, down_EDF, scales), None


def moe(
    h_TD: Tensor,
    norm: Norm,
    router: Router,
    is_real_T: Tensor | None,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales | None,
    next_norm: Norm,
) -> tuple[Tensor, Tensor | None]:
    """As `moe_ref`; of large steps with `next` [T, D]."""
    if _takes_chain(h_TD, norm, router, gate_up_E2FD, down_EDF, scales, next_norm):
        return moe_chain(h_TD.contiguous(), norm, router, is_real_T, gate_up_E2FD, down_EDF, next_norm)
    x_TD, chosen_TA, weights_TA = route(h_TD, norm, router, is_real_T)
    return experts(h_TD, x_TD, chosen_TA, weights_TA, gate_up_E2FD, down_EDF, scales), None


def _takes_chain(
    h_TD: Tensor,
    norm: Norm,
    router: Router,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales | None,
    next_norm: Norm,
) -> bool:
    num_tokens, hidden = h_TD.shape
    if num_tokens < MIN_CHAIN_TOKENS or scales is not None or not runs_triton(h_TD):
        return False
    fits = can_chain(hidden, router.num_chosen) and down_EDF.shape[2] % 64 == 0
    tensors = (norm.weight, next_norm.weight, router.gate, gate_up_E2FD, down_EDF)
    is_plain = router.gate.dtype == torch.bfloat16 and all(tensor.is_contiguous() for tensor in tensors)
    return fits and is_plain and has_prefill_kernels(h_TD.device)
