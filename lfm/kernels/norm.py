"""Residual add and RMSNorm, the op between any two blocks of the model.

Formula (transformers Lfm2RMSNorm): h = h + delta; y = cast(h32 * rsqrt(mean(h32^2) + eps)) * weight.
Legend: T tokens, D width (hidden, or head dim for the q/k norms).
"""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """The accumulation dtype: fp32, or fp64 where the tensor already is."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_ref(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis; rounds to x's dtype before the weight, as the checkpoint was trained."""
    wide = widen(x_TD)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x_TD.dtype) * weight_D


def add_norm_ref(h_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (h + delta, RMSNorm(h + delta)); `delta_TD` None at the first norm of the model."""
    if delta_TD is not None:
        h_TD = h_TD + delta_TD
    return h_TD, rms_norm_ref(h_TD, weight_D, eps)
