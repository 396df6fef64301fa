"""The sigmoid router of LFM2-MoE: which experts a token visits, and with what weight.

    x = norm(h);  s = sigmoid(x gate^T);  chosen = topk(s + bias);  w = s[chosen];  w = w / (sum w + 1e-6) * scale

The bias (fp32) selects only; weights come from the unbiased scores. Source: transformers Lfm2MoeTopKRouter.
Legend: T tokens, D hidden, E experts, A experts per token.
"""

from torch import Tensor
from torch.nn.functional import linear

from lfm.kernels.norm import rms_norm_ref, widen
from lfm.kernels.weights import Norm, Router


def route_ref(h_TD: Tensor, norm: Norm, router: Router) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x [T, D], expert ids int64 [T, A], weights [T, A] in fp32 or wider) with x = norm(h)."""
    x_TD = rms_norm_ref(h_TD, norm)
    scores_TE = widen(linear(x_TD, router.gate)).sigmoid()
    selection_TE = scores_TE if router.bias is None else scores_TE + router.bias
    chosen_TA = selection_TE.topk(router.num_chosen, dim=-1).indices
    weights_TA = scores_TE.gather(1, chosen_TA)
    if router.normalise:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-6)
    return x_TD, chosen_TA, weights_TA * router.scale
