"""What training sees of the routers: how many tokens each expert got, and the z-loss of the router's logits.

Load is balanced without an auxiliary loss (Wang et al. 2024, as DeepSeek-V3 and LFM2 do it): after each step every
expert's selection bias moves by a fixed amount against its load. The z-loss (Zoph et al., ST-MoE, 2022) is
mean(logsumexp(router logits)^2); it keeps the logits small enough for bf16.
Legend: T tokens, D hidden, E experts, A experts per token, M MoE layers.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from lfm.config import ModelConfig
from lfm.kernels.norm import rms_norm_ref, widen
from lfm.kernels.weights import Norm, Router
from lfm.model.lfm2 import Lfm2, MoeFeedForward
from lfm.train.fusion import fused


class RouteRecorder:
    """Stands in for the `route` op and keeps what balancing and the z-loss need.

    Between `begin` and `end` the layers of one forward call it in order. Calls outside do the same work and do not
    count: activation checkpointing makes them when it runs a layer again during the backward.

    Attributes:
        load_ME: tokens per expert, summed over all batches since `reset_load`; int64, on the model's device.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._num_layers = config.num_moe_layers
        self._is_recording = False
        self._z_losses: list[Tensor] = []
        self.load_ME = torch.zeros(config.num_moe_layers, config.num_experts, dtype=torch.int64, device=device)

    def reset_load(self) -> None:
        self.load_ME.zero_()

    def begin(self) -> None:
        """Start of a forward."""
        self._z_losses = []
        self._is_recording = True

    def end(self) -> Tensor | None:
        """End of a forward: the z-loss summed over layers, a mean over tokens; None for a model without experts."""
        self._is_recording = False
        losses, self._z_losses = self._z_losses, []
        assert len(losses) == self._num_layers, f"{len(losses)} of {self._num_layers} routers were seen"
        return torch.stack(losses).sum() if losses else None

    def route(
        self, h_TD: Tensor, norm: Norm, router: Router, is_real_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `route_ref`, whose maths it is."""
        x_TD, chosen_TA, weights_TA, z_loss, load_E = route_train(h_TD, norm, router, is_real_T)
        if self._is_recording:
            self.load_ME[len(self._z_losses)] += load_E
            self._z_losses.append(z_loss)
        return x_TD, chosen_TA, weights_TA


@fused
def route_train(
    h_TD: Tensor, norm: Norm, router: Router, is_real_T: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `route_ref`, and the z-loss and the tokens per expert [E]; written in sums and maxima, which fuse.

    Among equal scores the lower id wins. `is_real_T` is for padding in serving, which training does not have.
    """
    assert is_real_T is None
    x_TD = rms_norm_ref(h_TD, norm)
    logits_TE = widen(linear(x_TD, router.gate))
    scores_TE = logits_TE.sigmoid()
    left_TE = (scores_TE if router.bias is None else scores_TE + router.bias).detach()
    ids_E = torch.arange(logits_TE.shape[1], device=h_TD.device)
    chosen, weights, load_E = [], [], torch.zeros_like(ids_E)
    for _ in range(router.num_chosen):
        chosen_T = left_TE.argmax(-1)
        is_chosen_TE = ids_E == chosen_T[:, None]
        left_TE = left_TE.masked_fill(is_chosen_TE, -math.inf)
        chosen.append(chosen_T)
        weights.append(torch.where(is_chosen_TE, scores_TE, 0.0).sum(-1))
        load_E = load_E + is_chosen_TE.sum(0)
    weights_TA = torch.stack(weights, dim=1)
    if router.normalise:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-6)
    z_loss = logits_TE.logsumexp(-1).square().mean()
    return x_TD, torch.stack(chosen, dim=1), weights_TA * router.scale, z_loss, load_E


@torch.no_grad()
def balance_experts(model: Lfm2, load_ME: Tensor, *, rate: float) -> None:
    """Move the selection bias of every expert by `rate`: up if it got fewer tokens than the mean, down if more."""
    moe_layers = [module for module in model.modules() if isinstance(module, MoeFeedForward)]
    for module, load_E in zip(moe_layers, load_ME, strict=True):
        if module.expert_bias is not None:
            load_E = load_E.to(module.expert_bias.dtype)
            module.expert_bias += rate * torch.sign(load_E.mean() - load_E)


def load_entropy(load_ME: Tensor) -> list[float]:
    """Per layer, the entropy of the expert load over that of a uniform one: 1 is balanced, 0 is one expert alone."""
    num_experts = load_ME.shape[1]
    if num_experts < 2:
        return [1.0] * load_ME.shape[0]
    share_ME = load_ME.double() / load_ME.sum(1, keepdim=True).clamp(min=1)
    entropy_M = -torch.special.xlogy(share_ME, share_ME).sum(1)
    return (entropy_M / math.log(num_experts)).tolist()
