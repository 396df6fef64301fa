"""The short convolution of a step in which every row is one token: with its projection in front, or alone.

    b, c, x = split(norm(h) W^T + bias);  u = b * x;  z = sum_j w[:, j] u[t - L + 1 + j] (+ bias);  y = c * z

A program owns some channels of all tokens: the three rows of W of each, their taps in the tails, their new tails. It
reads what it needs of a tail before it writes, and a block that is written belongs to one row, so both may be the same
block. Tails and positions are read before the wait for the kernel in front: they were complete before the step began.

Bytes: 3 D D 2 of W once (fp8: 3 D D), and (L - 1) D 2 of tails per row, twice. Rounding: u to the tail's dtype; else
fp32.
Legend: T tokens = rows, D hidden, L window, N blocks.
"""

from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.stream_gemm import (
    launch_options,
    load_ahead,
    select,
    stream_dot,
)
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton
from lfm.kernels.tuned import StreamTile
from lfm.kernels.weights import Linear, Norm

# Tokens by channels of a program of the convolution alone.
STEP_TILE = (8, 128)


@triton.jit
def conv_token(
    b, c, x, before, last_weight, taps, new_tail, inside, column_stride,
    WINDOW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [t, n] of the gates and the input of one token per row; stores the row's new tail."""
    u = (b * x).to(taps.dtype)
    if WINDOW > 1:
        column = tl.arange(0, COLUMNS)[:, None, None]
        kept = inside[None] & (column > 0) & (column < WINDOW - 1)
        tl.store(new_tail[None] + (column - 1) * column_stride, taps, mask=kept)
        tl.store(new_tail + (WINDOW - 2) * column_stride, u, mask=inside)
    return c * (before + u.to(tl.float32) * last_weight)


@triton.jit
def load_step(
    conv_ptr, conv_bias_ptr, positions_ptr, read_ptr, write_ptr, tails_ptr, block_stride, column_stride, t, n, T, D,
    WINDOW: tl.constexpr, COLUMNS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
):  # fmt: skip
    """What the step needs beside the gates: the part of z from before the token [t, n], the token's weight [1, n], u at
    the WINDOW - 1 positions before it (oldest first, zero before position 0) [COLUMNS, t, n], where the new tail goes.
    """
    column = tl.arange(0, COLUMNS)[:, None, None]
    is_tap = (column < WINDOW - 1) & (n < D)[None]
    position = tl.load(positions_ptr + t, mask=t < T, other=0)
    old_tail = tails_ptr + tl.load(read_ptr + t, mask=t < T, other=0) * block_stride + n
    new_tail = tails_ptr + tl.load(write_ptr + t, mask=t < T, other=0) * block_stride + n
    is_there = is_tap & (t < T)[None] & (position >= WINDOW - 1 - column)
    taps = tl.load(old_tail[None] + column * column_stride, mask=is_there, other=0.0)
    weights = tl.load(conv_ptr + n[None] * WINDOW + column, mask=is_tap, other=0.0)
    before = tl.sum(taps.to(tl.float32) * weights.to(tl.float32), 0)
    if HAS_CONV_BIAS:
        before += tl.load(conv_bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)
    last_weight = tl.load(conv_ptr + n * WINDOW + WINDOW - 1, mask=n < D, other=0.0).to(tl.float32)
    return before, last_weight, taps, new_tail


@triton.jit(do_not_specialize=["T"])
def conv_in_kernel(
    h_ptr, gain_ptr, w_ptr, scale_ptr, bias_ptr, conv_ptr, conv_bias_ptr, positions_ptr, read_ptr, write_ptr,
    tails_ptr, y_ptr, T, h_stride, w_stride, block_stride, column_stride, eps,
    D: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    WARPS: tl.constexpr, RUNS: tl.constexpr, VEC: tl.constexpr, AHEAD: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [T, D] of h [T, D], w [3 D, D], conv [D, WINDOW], tails [N, WINDOW - 1, D] for one token per row."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    t, n = tl.arange(0, TOKENS)[:, None], first + tl.arange(0, ROWS)[None, :]
    tiles = load_ahead(w_ptr, w_stride, first, D, D, D, ROWS, 3, WARPS, RUNS, VEC, AHEAD)
    before, last_weight, taps, new_tail = load_step(
        conv_ptr, conv_bias_ptr, positions_ptr, read_ptr, write_ptr, tails_ptr, block_stride, column_stride, t, n, T, D,
        WINDOW, COLUMNS, HAS_CONV_BIAS,
    )  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    bcx = stream_dot(
        tiles, h_ptr, h_stride, gain_ptr, w_ptr, scale_ptr, w_stride, first, D, D, T, eps,
        D, ROWS, 3, TOKENS, WARPS, RUNS, VEC, AHEAD, True, HAS_SCALE,
    )  # fmt: skip
    bcx = bcx.reshape(TOKENS, 4, ROWS)
    b, c, x = select(bcx, 0, 4), select(bcx, 1, 4), select(bcx, 2, 4)
    if HAS_BIAS:
        b += tl.load(bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)
        c += tl.load(bias_ptr + D + n, mask=n < D, other=0.0).to(tl.float32)
        x += tl.load(bias_ptr + 2 * D + n, mask=n < D, other=0.0).to(tl.float32)
    inside = (t < T) & (n < D)
    y = conv_token(b, c, x, before, last_weight, taps, new_tail, inside, column_stride, WINDOW, COLUMNS)
    tl.store(y_ptr + t.to(tl.int64) * D + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def conv_step_kernel(
    bcx_ptr, conv_ptr, conv_bias_ptr, positions_ptr, read_ptr, write_ptr, tails_ptr, y_ptr,
    T, D, block_stride, column_stride,
    WINDOW: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [T, D] of b, c, x [T, 3 D]; the rest as in `conv_in_kernel`."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    before, last_weight, taps, new_tail = load_step(
        conv_ptr, conv_bias_ptr, positions_ptr, read_ptr, write_ptr, tails_ptr, block_stride, column_stride, t, n, T, D,
        WINDOW, COLUMNS, HAS_CONV_BIAS,
    )  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    inside = (t < T) & (n < D)
    bcx = bcx_ptr + t.to(tl.int64) * (3 * D) + n
    b = tl.load(bcx, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(bcx + D, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(bcx + 2 * D, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # every lane has its taps before any lane stores a tail
    y = conv_token(b, c, x, before, last_weight, taps, new_tail, inside, column_stride, WINDOW, COLUMNS)
    tl.store(y_ptr + t.to(tl.int64) * D + n, y.to(y_ptr.dtype.element_ty), mask=inside)


def _columns(window: int) -> int:
    """The power of two that has room for the window's tail."""
    return 1 << max(0, window - 2).bit_length()


def stream_conv_in(
    h_TD: Tensor, norm: Norm, in_proj: Linear, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor, tile: StreamTile
) -> Tensor:
    """Norm, projection, gates, convolution and tails of a few rows of one token each: y [T, D]."""
    num_tokens, hidden = h_TD.shape
    window = conv.weight.shape[1]
    y_TD = h_TD.new_empty(num_tokens, hidden)
    conv_in_kernel[(triton.cdiv(hidden, tile.rows),)](
        h_TD,
        norm.weight,
        in_proj.weight,
        in_proj.weight if in_proj.scale is None else in_proj.scale,
        h_TD if in_proj.bias is None else in_proj.bias,
        conv.weight,
        conv.weight if conv.bias is None else conv.bias,
        batch.positions_T,
        batch.tail_read_S,
        batch.tail_write_W,
        tails_NLD,
        y_TD,
        num_tokens,
        h_TD.stride(0),
        in_proj.weight.stride(0),
        tails_NLD.stride(0),
        tails_NLD.stride(1),
        norm.eps,
        D=hidden,
        WINDOW=window,
        COLUMNS=_columns(window),
        HAS_SCALE=in_proj.scale is not None,
        HAS_BIAS=in_proj.bias is not None,
        HAS_CONV_BIAS=conv.bias is not None,
        **launch_options(tile, in_proj.weight, groups=3, num_tokens=num_tokens),
    )
    return y_TD


def conv_step(bcx_T3D: Tensor, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor) -> Tensor:
    """Gates, convolution and tails of rows of one token each, any number of them: y [T, D]."""
    num_tokens, hidden = bcx_T3D.shape[0], bcx_T3D.shape[1] // 3
    window = conv.weight.shape[1]
    tokens, channels = STEP_TILE
    y_TD = bcx_T3D.new_empty(num_tokens, hidden)
    is_dependent = has_dependent_launch(bcx_T3D.device)
    conv_step_kernel[(triton.cdiv(num_tokens, tokens), triton.cdiv(hidden, channels))](
        bcx_T3D,
        conv.weight,
        conv.weight if conv.bias is None else conv.bias,
        batch.positions_T,
        batch.tail_read_S,
        batch.tail_write_W,
        tails_NLD,
        y_TD,
        num_tokens,
        hidden,
        tails_NLD.stride(0),
        tails_NLD.stride(1),
        WINDOW=window,
        COLUMNS=_columns(window),
        TOKENS=tokens,
        CHANNELS=channels,
        HAS_CONV_BIAS=conv.bias is not None,
        DEPENDENT=is_dependent,
        **({"launch_pdl": True} if is_dependent else {}),
    )
    return y_TD
