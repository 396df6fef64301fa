"""The sigmoid router of LFM2-MoE: which experts a token visits, and with what weight.

    s = sigmoid(x gate^T);  chosen = topk(s + bias);  w = s[chosen];  w = w / (sum w + 1e-6) * scale

The bias (fp32) selects only; weights come from the unbiased scores. Source: transformers Lfm2MoeTopKRouter.
Legend: T tokens, D hidden, E experts, A experts per token.
"""

from torch import Tensor
from torch.nn.functional import linear

from lfm.kernels.norm import widen


def route_ref(
    x_TD: Tensor,
    gate_ED: Tensor,
    bias_E: Tensor | None,
    *,
    num_chosen: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return (expert ids int64 [T, A], weights [T, A] in fp32 or wider)."""
    scores_TE = widen(linear(x_TD, gate_ED)).sigmoid()
    selection_TE = scores_TE if bias_E is None else scores_TE + bias_E
    chosen_TA = selection_TE.topk(num_chosen, dim=-1).indices
    weights_TA = scores_TE.gather(1, chosen_TA)
    if normalise:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-6)
    return chosen_TA, weights_TA * scale
