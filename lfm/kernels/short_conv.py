"""Double-gated short convolution over packed rows, with its state in the block pool.

    B, C, x = split(norm(h) W^T + b);  u = B * x;  z[t] = sum_j w[:, j] * u[t - L + 1 + j] (+ bias);  y = C * z

Before a row's chunk, u comes from the tail that `tail_read_S` names. Taps before position 0 are zero by a test on the
position, never by what memory contains. Rounding points: u, z, y (each to the activation dtype); z accumulates in fp32.
Source: transformers Lfm2MoeShortConv (chunk order B, C, x; cross-correlation; no activation).
Legend: T tokens, S rows, D hidden, L window, N blocks, W tail writes.
"""

import torch
from torch import Tensor

from lfm.kernels.conv_chunks import conv_chunks
from lfm.kernels.conv_step import conv_step, stream_conv_in
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.norm import norm_project, project_ref, rms_norm_ref, widen
from lfm.kernels.stream_gemm import find_tile
from lfm.kernels.triton_guard import runs_triton
from lfm.kernels.weights import Linear, Norm


def _taps(u_TD: Tensor, tails_NLD: Tensor, batch: ForwardBatch, tokens_M: Tensor, back: int) -> Tensor:
    """u at `back` positions before each of the tokens [M, D]: from the chunk, from the row's tail, or zero."""
    window = tails_NLD.shape[1] + 1
    rows_M = batch.rows_T[tokens_M]
    wanted_M = batch.positions_T[tokens_M] - back
    offset_M = wanted_M - batch.starts_S[rows_M]  # negative: before the chunk
    in_chunk_MD = u_TD[(tokens_M - back).clamp(min=0)]
    column_M = (window - 1 + offset_M).clamp(0, max(0, window - 2))
    in_tail_MD = tails_NLD[batch.tail_read_S[rows_M], column_M] if window > 1 else torch.zeros_like(in_chunk_MD)
    values_MD = torch.where((offset_M >= 0)[:, None], in_chunk_MD, in_tail_MD)
    return torch.where((wanted_M >= 0)[:, None], values_MD, torch.zeros_like(values_MD))


def short_conv_ref(bcx_T3D: Tensor, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor) -> Tensor:
    """Return y [T, D] and write the tails of the blocks that end in this step, after all reads."""
    weight_DL, bias_D, _ = conv
    b_TD, c_TD, x_TD = bcx_T3D.chunk(3, dim=-1)
    u_TD = b_TD * x_TD
    window = weight_DL.shape[1]
    tokens_T = torch.arange(u_TD.shape[0], device=u_TD.device)
    z_TD = widen(u_TD) * widen(weight_DL[:, window - 1])
    for back in range(1, window):
        z_TD = z_TD + widen(_taps(u_TD, tails_NLD, batch, tokens_T, back)) * widen(weight_DL[:, window - 1 - back])
    if bias_D is not None:
        z_TD = z_TD + widen(bias_D)
    if window > 1:
        columns = [_taps(u_TD, tails_NLD, batch, batch.tail_token_W, back) for back in range(window - 2, -1, -1)]
        tails_NLD[batch.tail_write_W] = torch.stack(columns, dim=1)
    return c_TD * z_TD.to(u_TD.dtype)


def short_conv_packed(bcx_T3D: Tensor, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor) -> Tensor:
    """The same without state, for training and full recompute: every row starts at position 0. Differentiable."""
    del tails_NLD
    weight_DL, bias_D, _ = conv
    b_TD, c_TD, x_TD = bcx_T3D.chunk(3, dim=-1)
    u_TD = b_TD * x_TD
    window = weight_DL.shape[1]
    z_TD = widen(u_TD) * widen(weight_DL[:, window - 1])
    for back in range(1, window):
        shifted_TD = torch.nn.functional.pad(u_TD, (0, 0, back, 0))[: u_TD.shape[0]]
        inside_T1 = (batch.positions_T >= back)[:, None]
        shifted_TD = torch.where(inside_T1, shifted_TD, torch.zeros_like(shifted_TD))
        z_TD = z_TD + widen(shifted_TD) * widen(weight_DL[:, window - 1 - back])
    if bias_D is not None:
        z_TD = z_TD + widen(bias_D)
    return c_TD * z_TD.to(u_TD.dtype)


def conv_in_ref(
    h_TD: Tensor, norm: Norm, in_proj: Linear, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor
) -> Tensor:
    """Norm, input projection and convolution of one layer: y [T, D]. `conv.weight` is [D, L]."""
    return short_conv_ref(project_ref(rms_norm_ref(h_TD, norm), in_proj), conv, batch, tails_NLD)


def conv_in_packed(
    h_TD: Tensor, norm: Norm, in_proj: Linear, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor
) -> Tensor:
    """The same without state; see `short_conv_packed`."""
    return short_conv_packed(project_ref(rms_norm_ref(h_TD, norm), in_proj), conv, batch, tails_NLD)


def conv_in(h_TD: Tensor, norm: Norm, in_proj: Linear, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor) -> Tensor:
    """As `conv_in_ref`. As many tokens as rows and tail writes means one token per row, in order: decode."""
    is_decode = batch.rows_T.shape[0] == batch.starts_S.shape[0] == batch.tail_write_W.shape[0]
    if not runs_triton(h_TD) or conv.weight.stride() != (conv.weight.shape[1], 1):
        return conv_in_ref(h_TD, norm, in_proj, conv, batch, tails_NLD)
    if is_decode and (tile := find_tile("conv_in", h_TD, in_proj.weight)):
        return stream_conv_in(h_TD, norm, in_proj, conv, batch, tails_NLD, tile)
    bcx_T3D = norm_project(h_TD, norm, in_proj)
    return (conv_step if is_decode else conv_chunks)(bcx_T3D, conv, batch, tails_NLD)
