"""RMSNorm, alone and in front of a projection; a projection with the residual in its epilogue; the dense feed-forward.

    norm(x) = cast(x32 * rsqrt(mean(x32^2) + eps)) * weight          (transformers Lfm2RMSNorm)

Legend: T tokens, D hidden, N outputs, I dense width.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lfm.kernels.weights import Linear, Norm


def widen(x: Tensor) -> Tensor:
    """The accumulation dtype: fp32, or fp64 where the tensor already is."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_ref(x_TD: Tensor, norm: Norm) -> Tensor:
    """RMSNorm over the last axis; rounds to x's dtype before the weight, as the checkpoint was trained."""
    wide = widen(x_TD)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return wide.to(x_TD.dtype) * norm.weight


def project_ref(x_TD: Tensor, projection: Linear) -> Tensor:
    """x W^T + b [T, N]."""
    return linear(x_TD, projection.weight, projection.bias)


def project_add_ref(h_TD: Tensor, x_TD: Tensor, projection: Linear) -> Tensor:
    """The residual stream after an operator: h + x W^T + b [T, D]."""
    return h_TD + linear(x_TD, projection.weight, projection.bias)


def norm_project_ref(h_TD: Tensor, norm: Norm, projection: Linear) -> Tensor:
    """norm(h) W^T + b [T, N]."""
    return project_ref(rms_norm_ref(h_TD, norm), projection)


def norm_project(h_TD: Tensor, norm: Norm, projection: Linear) -> Tensor:
    """As `norm_project_ref`."""
    return norm_project_ref(h_TD, norm, projection)


def dense_ref(h_TD: Tensor, norm: Norm, gate_up_2ID: Tensor, down_DI: Tensor) -> Tensor:
    """h + down(silu(gate x) * (up x)) with x = norm(h); rows 0..I-1 of `gate_up_2ID` are the gate."""
    gate_TI, up_TI = linear(rms_norm_ref(h_TD, norm), gate_up_2ID).chunk(2, dim=-1)
    return h_TD + linear(silu(gate_TI) * up_TI, down_DI)
