"""Products in which weights and activations are fp8: for steps that the matrix units bind, at twice the rate of bf16.

    x8[t] = e4m3(x[t] / a[t]),  a[t] = max |x[t]| / 448;   y[t, n] = a[t] s[n] sum_k x8[t, k] w8[n, k]

A token's scale is its own, so neighbours change nothing. The norm in front is part of the launch that quantises, which
reads a row once (2 T K bytes in, T K out); the product is torch's own. Rounding: x to e4m3, y once.
Legend: T tokens, K inputs, N outputs.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lfm.kernels.fp8 import FP8, FP8_MAX, quantise_rows
from lfm.kernels.triton_guard import has_dependent_launch, runs_triton, tl, triton
from lfm.kernels.weights import Linear, Norm, scaled


@triton.jit
def quantise_tokens_kernel(
    x_ptr, gain_ptr, x8_ptr, scale_ptr, K, x_stride, eps, MAX: tl.constexpr,
    WIDTH: tl.constexpr, HAS_NORM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x8 [T, K] and scale [T] of [norm(x) or x], one row per program."""
    t, n = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    if HAS_NORM:
        gain = tl.load(gain_ptr + n, mask=n < K, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + t * x_stride + n, mask=n < K, other=0.0).to(tl.float32)
    if HAS_NORM:
        x = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * gain
    largest = tl.max(tl.abs(x), 0)
    scale = tl.where(largest > 0, largest / MAX, 1.0)
    x8 = tl.clamp(x / scale, -MAX, MAX)
    tl.store(x8_ptr + t * K + n, x8.to(x8_ptr.dtype.element_ty), mask=n < K)
    tl.store(scale_ptr + t, scale)


def quantise_tokens(x_TK: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
    """x, or norm(x), in fp8 [T, K], and its scales [T]; the innermost axis of x must be contiguous."""
    num_tokens, num_inputs = x_TK.shape
    x8_TK = torch.empty(num_tokens, num_inputs, dtype=FP8, device=x_TK.device)
    scale_T = torch.empty(num_tokens, dtype=torch.float32, device=x_TK.device)
    is_dependent = has_dependent_launch(x_TK.device)
    width = triton.next_power_of_2(num_inputs)
    quantise_tokens_kernel[(num_tokens,)](
        x_TK, norm.weight if norm else x_TK, x8_TK, scale_T, num_inputs, x_TK.stride(0), norm.eps if norm else 0.0,
        MAX=FP8_MAX, WIDTH=width, HAS_NORM=norm is not None, DEPENDENT=is_dependent,
        num_warps=8 if width > 4096 else 4, **({"launch_pdl": True} if is_dependent else {}),
    )  # fmt: skip
    return x8_TK, scale_T


def fp8_project_ref(x_TK: Tensor, projection: Linear) -> Tensor:
    """x8 W^T + b [T, N] with x rounded to fp8: what `fp8_project` computes, in plain torch."""
    rounded_TK = scaled(*quantise_rows(x_TK), torch.float32)
    y_TN = linear(rounded_TK, projection.plain(torch.float32))
    return (y_TN if projection.bias is None else y_TN + projection.bias).to(x_TK.dtype)


def has_fp8_product(x_TK: Tensor, projection: Linear) -> bool:
    """Whether `fp8_project` takes these."""
    num_outputs, num_inputs = projection.weight.shape
    is_aligned = num_outputs % 16 == 0 and num_inputs % 16 == 0 and projection.weight.is_contiguous()
    return projection.scale is not None and runs_triton(x_TK) and is_aligned and len(x_TK) > 0


def fp8_project(x_TK: Tensor, projection: Linear) -> Tensor:
    """As `fp8_project_ref`, of tensors that `has_fp8_product` takes."""
    return fp8_product(*quantise_tokens(x_TK), projection, x_TK.dtype)


def fp8_product(x8_TK: Tensor, scale_T: Tensor, projection: Linear, dtype: torch.dtype) -> Tensor:
    """The product of what `quantise_tokens` made [T, N]."""
    weight_NK, bias_N, scale_N = projection
    assert scale_N is not None
    y_TN: Tensor = torch._scaled_mm(
        x8_TK, weight_NK.t(), scale_a=scale_T[:, None], scale_b=scale_N[None, :], out_dtype=dtype
    )
    return y_TN if bias_N is None else y_TN.add_(bias_N)
