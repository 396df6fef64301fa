"""The sigmoid router of LFM2-MoE: which experts a token visits, and with what weight.

    x = norm(h);  s = sigmoid(x gate^T);  chosen = topk(s + bias);  w = s[chosen];  w = w / (sum w + 1e-6) * scale

The bias (fp32) selects only; weights come from the unbiased scores. Source: transformers Lfm2MoeTopKRouter.
Legend: T tokens, D hidden, E experts, A experts per token.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lfm.kernels.norm import rms_norm_ref, widen
from lfm.kernels.route_topk import route_fast
from lfm.kernels.triton_guard import runs_triton
from lfm.kernels.weights import Norm, Router


def route_ref(
    h_TD: Tensor, norm: Norm, router: Router, is_real_T: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x [T, D], expert ids int64 [T, A], weights [T, A] in fp32 or wider) with x = norm(h).

    A token whose `is_real_T` is 0 is padding: its ids are E, which is no expert.
    """
    x_TD = rms_norm_ref(h_TD, norm)
    scores_TE = widen(linear(x_TD, router.gate)).sigmoid()
    selection_TE = scores_TE if router.bias is None else scores_TE + router.bias
    chosen_TA = selection_TE.topk(router.num_chosen, dim=-1).indices
    weights_TA = scores_TE.gather(1, chosen_TA)
    if router.normalise:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-6)
    if is_real_T is not None:
        chosen_TA = torch.where(is_real_T[:, None] > 0, chosen_TA, router.gate.shape[0])
    return x_TD, chosen_TA, weights_TA * router.scale


def route(h_TD: Tensor, norm: Norm, router: Router, is_real_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `route_ref`, in one or two launches; logits are not rounded, and among equal scores the lower id wins."""
    hidden = h_TD.shape[1]
    is_fast = runs_triton(h_TD) and h_TD.shape[0] > 0 and hidden % 64 == 0 and router.gate.dtype == h_TD.dtype
    if not (is_fast and norm.weight.is_contiguous() and router.gate.is_contiguous()):
        return route_ref(h_TD, norm, router, is_real_T)
    return route_fast(h_TD.contiguous(), norm, router, is_real_T)
