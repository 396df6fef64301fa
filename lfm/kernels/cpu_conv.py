"""The short convolution on a CPU in fp32 or fp64: as `short_conv_ref`, by whole rows instead of single taps.

The chunk's u stand in one buffer, each row behind its tail, so that a tap is a slice of it:

    buffer   tail of row 0 | u of row 0 | tail of row 1 | u of row 1 | ...

Legend: T tokens, S rows, D hidden, L window, B = L - 1 columns of a tail, P = T + B S, N blocks, W tail writes.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lfm.kernels.cpu_layers import cpu_norm
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.weights import Linear, Norm


def cpu_conv_in(
    h_TD: Tensor, norm: Norm, in_proj: Linear, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor
) -> Tensor:
    """As `conv_in_ref`."""
    return cpu_short_conv(linear(cpu_norm(h_TD, norm), in_proj.weight, in_proj.bias), conv, batch, tails_NLD)


def cpu_short_conv(bcx_T3D: Tensor, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor) -> Tensor:
    """As `short_conv_ref`. As many tokens as rows and tail writes means one token per row, in order: decode."""
    weight_LD, before = conv.weight.t(), conv.weight.shape[1] - 1
    b_TD, c_TD, x_TD = bcx_T3D.chunk(3, dim=-1)
    u_TD = b_TD * x_TD
    if not before:
        z_TD = u_TD.mul_(weight_LD[0])
    elif u_TD.shape[0] == batch.num_rows == batch.tail_write_W.shape[0]:
        window_SLD = torch.cat((_tails(batch, tails_NLD, before), u_TD[:, None]), dim=1)
        tails_NLD.index_copy_(0, batch.tail_write_W, window_SLD[:, 1:])
        z_TD = (window_SLD * weight_LD).sum(1)
    else:
        z_TD = _chunks(u_TD, weight_LD, batch, tails_NLD)
    if conv.bias is not None:
        z_TD.add_(conv.bias)
    return z_TD.mul_(c_TD)


def _tails(batch: ForwardBatch, tails_NLD: Tensor, before: int) -> Tensor:
    """u before each row's chunk [S, B, D]: zero before position 0, whatever memory contains."""
    tails_SBD = tails_NLD.index_select(0, batch.tail_read_S)
    if min(batch.starts) < before:
        positions_SB = batch.starts_S[:, None] + torch.arange(-before, 0)
        tails_SBD.masked_fill_((positions_SB < 0)[:, :, None], 0.0)
    return tails_SBD


def _chunks(u_TD: Tensor, weight_LD: Tensor, batch: ForwardBatch, tails_NLD: Tensor) -> Tensor:
    """z [T, D] of rows of any length, and the tails of the blocks that end in this step."""
    num_tokens, hidden = u_TD.shape
    before, num_rows = len(weight_LD) - 1, batch.num_rows
    first_T = torch.arange(num_tokens) + before * batch.rows_T  # where each token's window begins in the buffer
    columns_B = torch.arange(before)
    tails_at = batch.row_starts_S1[:-1, None] + before * torch.arange(num_rows)[:, None] + columns_B
    buffer_PD = u_TD.new_empty(num_tokens + before * num_rows, hidden)
    buffer_PD.index_copy_(0, tails_at.flatten(), _tails(batch, tails_NLD, before).flatten(0, 1))
    buffer_PD.index_copy_(0, first_T + before, u_TD)
    ends_WB = first_T[batch.tail_token_W][:, None] + 1 + columns_B
    tails_NLD.index_copy_(0, batch.tail_write_W, buffer_PD.index_select(0, ends_WB.flatten()).view(-1, before, hidden))
    size = len(buffer_PD) - before
    weight_LD = weight_LD.contiguous()
    z_PD = buffer_PD[:size] * weight_LD[0]
    for tap in range(1, before + 1):
        z_PD.addcmul_(buffer_PD[tap : tap + size], weight_LD[tap])
    return z_PD if num_rows == 1 else z_PD.index_select(0, first_T)
