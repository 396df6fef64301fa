"""Norm, projections, dense feed-forward and router on a CPU in fp32 or fp64: the references in fewer calls.

A small model's token is calls, not arithmetic: 1 to 5 us each, several hundred of them. Values are those of the
references but for the order of sums. No rounding points here: for bf16 the references stay.
Legend: T tokens, D hidden, N outputs, I dense width, E experts, A experts per token.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lfm.kernels.norm import rms_norm_ref
from lfm.kernels.weights import Linear, Norm, Router


def cpu_norm(x_TD: Tensor, norm: Norm) -> Tensor:
    """As `rms_norm_ref`. One token: its square sum as a Python number, 5 us for torch's 9 (at D = 256)."""
    if x_TD.shape[0] != 1 or x_TD.ndim != 2 or not norm.eps:
        return rms_norm_ref(x_TD, norm)
    x_D = x_TD[0]
    scale = (torch.dot(x_D, x_D).item() / x_D.shape[0] + norm.eps) ** -0.5
    return torch.mul(x_TD, scale).mul_(norm.weight)


def cpu_project_add(h_TD: Tensor, x_TD: Tensor, projection: Linear) -> Tensor:
    """As `project_add_ref`."""
    h_TD = torch.addmm(h_TD, x_TD, projection.weight.t())
    return h_TD if projection.bias is None else h_TD.add_(projection.bias)


def cpu_dense(h_TD: Tensor, norm: Norm, gate_up: Linear, down: Linear) -> Tensor:
    """As `dense_ref`."""
    gate_TI, up_TI = linear(cpu_norm(h_TD, norm), gate_up.weight, gate_up.bias).chunk(2, dim=-1)
    return cpu_project_add(h_TD, silu(gate_TI).mul_(up_TI), down)


def cpu_route(
    h_TD: Tensor, norm: Norm, router: Router, is_real_T: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `route_ref`."""
    x_TD = cpu_norm(h_TD, norm)
    scores_TE = linear(x_TD, router.gate).sigmoid_()
    selection_TE = scores_TE if router.bias is None else scores_TE + router.bias
    chosen_TA = selection_TE.topk(router.num_chosen, dim=-1)[1]
    weights_TA = scores_TE.gather(1, chosen_TA)
    if router.normalise:
        weights_TA.div_(weights_TA.sum(-1, keepdim=True).add_(1e-6))
    if router.scale != 1:
        weights_TA.mul_(router.scale)
    if is_real_T is not None:
        chosen_TA = torch.where(is_real_T[:, None] > 0, chosen_TA, router.gate.shape[0])
    return x_TD, chosen_TA, weights_TA
