"""RMSNorm, alone and in front of a projection; a projection with the residual in its epilogue; the dense feed-forward.

    norm(x) = cast(x32 * rsqrt(mean(x32^2) + eps)) * weight          (transformers Lfm2RMSNorm)

Few tokens: every projection is one launch that streams its weights (stream_gemm.py). More: the library's GEMM, with the
norm and the gate as kernels of their own: 4 T D bytes for a norm, 6 T I for a gate.
Legend: T tokens, D hidden, K inputs, N outputs, I dense width.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.nn.functional import rms_norm as rms_norm_torch

from lfm.kernels.fp8_gemm import fp8_product, fp8_project, has_fp8_product, quantise_tokens
from lfm.kernels.stream_gemm import find_tile, stream_gate_up, stream_project
from lfm.kernels.triton_guard import has_dependent_launch, runs_triton, tl, triton
from lfm.kernels.weights import Linear, Norm


def widen(x: Tensor) -> Tensor:
    """The accumulation dtype: fp32, or fp64 where the tensor already is."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_ref(x_TD: Tensor, norm: Norm) -> Tensor:
    """RMSNorm over the last axis; rounds to x's dtype before the weight, as the checkpoint was trained."""
    if x_TD.dtype == torch.float32 and x_TD.device.type == "cpu" and not torch.is_grad_enabled():
        return rms_norm_torch(x_TD, (x_TD.shape[-1],), norm.weight, norm.eps)  # the same bits, without five calls
    wide = widen(x_TD)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return wide.to(x_TD.dtype) * norm.weight


def project_ref(x_TD: Tensor, projection: Linear) -> Tensor:
    """x W^T + b [T, N]."""
    return linear(x_TD, projection.plain(x_TD.dtype), projection.bias)


def project_add_ref(h_TD: Tensor, x_TD: Tensor, projection: Linear) -> Tensor:
    """The residual stream after an operator: h + x W^T + b [T, D]."""
    return h_TD + project_ref(x_TD, projection)


def norm_project_ref(h_TD: Tensor, norm: Norm, projection: Linear) -> Tensor:
    """norm(h) W^T + b [T, N]."""
    return project_ref(rms_norm_ref(h_TD, norm), projection)


def dense_ref(h_TD: Tensor, norm: Norm, gate_up: Linear, down: Linear) -> Tensor:
    """h + down(silu(gate x) * (up x)) with x = norm(h); rows 0..I-1 of `gate_up` [2 I, D] are the gate."""
    gate_TI, up_TI = norm_project_ref(h_TD, norm, gate_up).chunk(2, dim=-1)
    return project_add_ref(h_TD, silu(gate_TI) * up_TI, down)


@triton.jit
def rms_norm_kernel(
    x_ptr, gain_ptr, y_ptr, D, x_stride, eps, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """y [T, D] = norm(x) of x [T, D], one row per program."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    t, n = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    gain = tl.load(gain_ptr + n, mask=n < D, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + t * x_stride + n, mask=n < D, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * gain
    tl.store(y_ptr + t * D + n, y.to(y_ptr.dtype.element_ty), mask=n < D)


@triton.jit
def silu_mul_kernel(gate_up_ptr, y_ptr, N, WIDTH: tl.constexpr):
    """y [T, N] = silu(gate) * up of gate, up [T, 2 N]."""
    t, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(gate_up_ptr + t * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + t * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * N + n, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=n < N)


def norm_rows(x_TD: Tensor, norm: Norm) -> Tensor:
    """norm(x) by one program per row; the innermost axis of x must be contiguous."""
    num_tokens, hidden = x_TD.shape
    y_TD = x_TD.new_empty(num_tokens, hidden)
    is_dependent = has_dependent_launch(x_TD.device)
    options = {"launch_pdl": True} if is_dependent else {}
    rms_norm_kernel[(num_tokens,)](
        x_TD, norm.weight, y_TD, hidden, x_TD.stride(0), norm.eps,
        WIDTH=triton.next_power_of_2(hidden), DEPENDENT=is_dependent, **options,
    )  # fmt: skip
    return y_TD


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up [T, I] of contiguous [T, 2 I]."""
    num_tokens, width = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
    y_TI = gate_up_T2I.new_empty(num_tokens, width)
    silu_mul_kernel[(num_tokens, triton.cdiv(width, 1024))](gate_up_T2I, y_TI, width, WIDTH=1024)
    return y_TI


def rms_norm(x_TD: Tensor, norm: Norm) -> Tensor:
    """As `rms_norm_ref`, of [T, D]; rounds once."""
    if norm.known is not None:
        return norm.known
    if not runs_triton(x_TD) or x_TD.ndim != 2 or x_TD.stride(1) != 1:
        return rms_norm_ref(x_TD, norm)
    return norm_rows(x_TD, norm)


def project(x_TD: Tensor, projection: Linear) -> Tensor:
    """As `project_ref`."""
    if tile := find_tile("project", x_TD, projection.weight):
        return stream_project(x_TD, projection, tile)
    if has_fp8_product(x_TD, projection):
        return fp8_project(x_TD, projection)
    return project_ref(x_TD, projection)


def project_add(h_TD: Tensor, x_TD: Tensor, projection: Linear) -> Tensor:
    """As `project_add_ref`, but h's memory may become the result's: the caller must not use h again.

    Adding into h saves a pass over it: 20 us of the 8,192 tokens of a prefill step, twice per layer.
    """
    if tile := find_tile("project_add", x_TD, projection.weight):
        return stream_project(x_TD, projection, tile, residual_TN=h_TD)
    if has_fp8_product(x_TD, projection):
        return h_TD.add_(fp8_project(x_TD, projection))
    if not runs_triton(x_TD) or projection.scale is not None:
        return project_add_ref(h_TD, x_TD, projection)
    h_TD.addmm_(x_TD, projection.weight.t())
    return h_TD if projection.bias is None else h_TD.add_(projection.bias)


def norm_project(h_TD: Tensor, norm: Norm, projection: Linear) -> Tensor:
    """As `norm_project_ref`."""
    if tile := find_tile("norm_project", h_TD, projection.weight):
        return stream_project(h_TD, projection, tile, norm=norm)
    if has_fp8_product(h_TD, projection):
        return fp8_product(*quantise_tokens(h_TD, norm), projection, h_TD.dtype)
    return project(rms_norm(h_TD, norm), projection)


def dense(h_TD: Tensor, norm: Norm, gate_up: Linear, down: Linear) -> Tensor:
    """As `dense_ref`; h's memory may become the result's, as in `project_add`."""
    if not runs_triton(h_TD):
        return dense_ref(h_TD, norm, gate_up, down)
    return project_add(h_TD, gated(h_TD, norm, gate_up), down)


def gated(h_TD: Tensor, norm: Norm, gate_up: Linear) -> Tensor:
    """silu(gate x) * (up x) [T, I] with x = norm(h), by kernels."""
    if tile := find_tile("gate_up", h_TD, gate_up.weight):
        return stream_gate_up(h_TD, norm, gate_up, tile)
    return silu_mul(norm_project(h_TD, norm, gate_up))
