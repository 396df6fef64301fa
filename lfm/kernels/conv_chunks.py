"""The short convolution of a step with rows of many tokens: all reads in one launch, then the tails.

    u = b * x;  z[t] = sum_j w[:, j] u[t - L + 1 + j] (+ bias);  y = c * z

A row is computed by several programs, and the block that its tail is read from may be one that this step writes: so
new tails are collected first, and stored by a second launch.

Bytes: 4 T D 2 (b, c, x in, y out; taps of neighbours come from cache). Rounding: u and y; else fp32.
Legend: T tokens, S rows, D hidden, L window, N blocks, W tail writes.
"""

from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.triton_guard import tl, triton
from lfm.kernels.weights import Linear

TOKENS, CHANNELS = 16, 256  # of a program


@triton.jit
def u_before(
    bcx_ptr, D, tails_ptr, block_stride, column_stride, t, n, inside, position, start, block, back,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """u at `back` positions before the tokens `t` [t, n]: from the chunk, from the row's tail, or zero."""
    wanted = position - back
    is_new = inside & (wanted >= start)
    gates = bcx_ptr + (t - back) * (3 * D) + n
    b = tl.load(gates, mask=is_new, other=0.0).to(tl.float32)
    x = tl.load(gates + 2 * D, mask=is_new, other=0.0).to(tl.float32)
    u = (b * x).to(tails_ptr.dtype.element_ty)
    if WINDOW > 1:
        is_old = inside & (wanted < start) & (wanted >= 0)
        column = WINDOW - 1 + wanted - start
        old = tl.load(tails_ptr + block * block_stride + column * column_stride + n, mask=is_old, other=0.0)
        u = tl.where(is_old, old, u)
    return u


@triton.jit(do_not_specialize=["T", "W", "num_tiles"])
def conv_chunks_kernel(
    bcx_ptr, conv_ptr, conv_bias_ptr, positions_ptr, rows_ptr, starts_ptr, read_ptr, written_ptr, tails_ptr,
    y_ptr, new_ptr, T, W, num_tiles, D, block_stride, column_stride,
    WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The first `num_tiles` programs: y [T, D] of b, c, x [T, 3 D]. The others: the new tails [W, WINDOW - 1, D]."""
    tile = tl.program_id(0)
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    if tile < num_tiles:
        t = (tile * TOKENS + tl.arange(0, TOKENS)[:, None]).to(tl.int64)
        inside = (t < T) & (n < D)
    else:
        w = ((tile - num_tiles) * TOKENS + tl.arange(0, TOKENS)[:, None]).to(tl.int64)
        inside = (w < W) & (n < D)
        t = tl.load(written_ptr + w, mask=w < W, other=0)
    row = tl.load(rows_ptr + t, mask=t < T, other=0)
    position = tl.load(positions_ptr + t, mask=t < T, other=0)
    start = tl.load(starts_ptr + row)
    block = tl.load(read_ptr + row)
    if tile < num_tiles:
        z = tl.zeros([TOKENS, CHANNELS], tl.float32)
        for back in tl.static_range(WINDOW):
            u = u_before(
                bcx_ptr, D, tails_ptr, block_stride, column_stride, t, n, inside, position, start, block, back, WINDOW
            )  # fmt: skip
            z += u.to(tl.float32) * tl.load(conv_ptr + n * WINDOW + WINDOW - 1 - back, mask=n < D, other=0.0)
        if HAS_BIAS:
            z += tl.load(conv_bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)
        c = tl.load(bcx_ptr + t * (3 * D) + D + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + t * D + n, (c * z).to(y_ptr.dtype.element_ty), mask=inside)
    else:
        w = ((tile - num_tiles) * TOKENS + tl.arange(0, TOKENS)[:, None]).to(tl.int64)
        for back in tl.static_range(WINDOW - 1):
            u = u_before(
                bcx_ptr, D, tails_ptr, block_stride, column_stride, t, n, inside, position, start, block, back, WINDOW
            )  # fmt: skip
            tl.store(new_ptr + (w * (WINDOW - 1) + WINDOW - 2 - back) * D + n, u, mask=inside)


def conv_chunks(bcx_T3D: Tensor, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor) -> Tensor:
    """As `short_conv_ref`: y [T, D], and the tails of the blocks that end in this step, after all reads."""
    num_tokens, hidden = bcx_T3D.shape[0], bcx_T3D.shape[1] // 3
    window, num_writes = conv.weight.shape[1], batch.tail_write_W.shape[0] if conv.weight.shape[1] > 1 else 0
    y_TD = bcx_T3D.new_empty(num_tokens, hidden)
    new_WLD = bcx_T3D.new_empty(num_writes, window - 1, hidden)
    num_tiles = triton.cdiv(num_tokens, TOKENS)
    conv_chunks_kernel[(num_tiles + triton.cdiv(num_writes, TOKENS), triton.cdiv(hidden, CHANNELS))](
        bcx_T3D,
        conv.weight,
        conv.weight if conv.bias is None else conv.bias,
        batch.positions_T,
        batch.rows_T,
        batch.starts_S,
        batch.tail_read_S,
        batch.tail_token_W,
        tails_NLD,
        y_TD,
        new_WLD,
        num_tokens,
        num_writes,
        num_tiles,
        hidden,
        tails_NLD.stride(0),
        tails_NLD.stride(1),
        WINDOW=window,
        HAS_BIAS=conv.bias is not None,
        TOKENS=TOKENS,
        CHANNELS=CHANNELS,
    )
    if window > 1:
        tails_NLD[batch.tail_write_W] = new_WLD
    return y_TD
