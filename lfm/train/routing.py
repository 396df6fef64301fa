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
from lfm.kernels.norm import widen
from lfm.kernels.router import route_ref
from lfm.kernels.weights import Norm, Router
from lfm.model.lfm2 import Lfm2, MoeFeedForward


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
        x_TD, chosen_TA, weights_TA = route_ref(h_TD, norm, router, is_real_T)
        # The logits a second time: T x E numbers, against which one definition of the router is worth more.
        z_loss = widen(linear(x_TD, router.gate)).logsumexp(-1).square().mean()
        if self._is_recording:
            flat_P = chosen_TA.flatten()
            self.load_ME[len(self._z_losses)].scatter_add_(0, flat_P, torch.ones_like(flat_P))
            self._z_losses.append(z_loss)
        return x_TD, chosen_TA, weights_TA


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
