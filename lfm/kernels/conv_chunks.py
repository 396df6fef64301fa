"""The short convolution of a step with rows of many tokens: all reads of tails first, then the new ones.

    u = b * x;  z[t] = sum_j w[:, j] u[t - L + 1 + j] (+ bias);  y = c * z

A row is computed by several programs, and the block that its tail is read from may be one that this step writes: so
new tails are collected by a launch of their own, and stored by a third.

Bytes: 4 T D 2 (b, c, x in, y out; neighbours come from cache). Rounding: u and y; else fp32.
Legend: T tokens, S rows, D hidden, L window, N blocks, W tail writes.
"""

from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.triton_guard import tl, triton
from lfm.kernels.weights import Linear

# A warp takes REPEATS times TOKENS tokens of its channels, so that it reads its taps' weights once for all of them.
TOKENS, REPEATS, CHANNELS, WARPS = 4, 4, 256, 1


@triton.jit
def load_u(bcx_ptr, t, n, inside, D, DTYPE: tl.constexpr):
    """u of token t [n]."""
    b = tl.load(bcx_ptr + t * (3 * D) + n, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(bcx_ptr + t * (3 * D) + 2 * D + n, mask=inside, other=0.0).to(tl.float32)
    return (b * x).to(DTYPE)


@triton.jit
def u_before(
    bcx_ptr, rows_ptr, positions_ptr, starts_ptr, read_ptr, tails_ptr, block_stride, column_stride, t, n, D, back,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """u at `back` positions before token t [n]: from the chunk, from the row's tail, or zero."""
    row = tl.load(rows_ptr + t)
    wanted = tl.load(positions_ptr + t) - back
    start = tl.load(starts_ptr + row)
    u = load_u(bcx_ptr, t - back, n, (n < D) & (wanted >= start), D, tails_ptr.dtype.element_ty)
    if WINDOW > 1:
        block = tl.load(read_ptr + row)
        is_old = (n < D) & (wanted < start) & (wanted >= 0)
        column = tl.maximum(WINDOW - 1 + wanted - start, 0)  # below 0 for padding only, at position 0 of any row
        tail = tails_ptr + block * block_stride + column * column_stride + n
        u = tl.where(is_old, tl.load(tail, mask=is_old, other=0.0), u)
    return u


@triton.jit(do_not_specialize=["T"])
def conv_chunks_kernel(
    bcx_ptr, conv_ptr, conv_bias_ptr, positions_ptr, rows_ptr, starts_ptr, read_ptr, tails_ptr, y_ptr,
    T, D, block_stride, column_stride,
    WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, REPEATS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y [T, D] of b, c, x [T, 3 D], conv [D, WINDOW], tails [N, WINDOW - 1, D]."""
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    weights = ()  # type: tuple[Tensor, ...]
    for j in tl.static_range(WINDOW):
        weight = tl.load(conv_ptr + n * WINDOW + j, mask=n < D, other=0.0).to(tl.float32)
        weights = weights + (weight,)  # noqa: RUF005  (Triton knows no unpacking)
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(conv_bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)
    begin = tl.program_id(0).to(tl.int64) * TOKENS * REPEATS
    for first in range(begin, tl.minimum(begin + TOKENS * REPEATS, T), TOKENS):
        t = first + tl.arange(0, TOKENS)
        row = tl.load(rows_ptr + t, mask=t < T, other=0)
        age = tl.load(positions_ptr + t, mask=t < T, other=WINDOW) - tl.load(starts_ptr + row, mask=t < T, other=0)
        if tl.min(age) >= WINDOW - 1:  # all taps are in the step: each u is read once
            recent = ()  # type: tuple[Tensor, ...]
            for i in tl.static_range(TOKENS + WINDOW - 1):
                token = first + i - (WINDOW - 1)
                u = load_u(bcx_ptr, token, n, (n < D) & (token < T), D, tails_ptr.dtype.element_ty)
                recent = recent + (u,)  # noqa: RUF005
            gates = ()  # type: tuple[Tensor, ...]
            for i in tl.static_range(TOKENS):
                inside = (n < D) & (first + i < T)
                c = tl.load(bcx_ptr + (first + i) * (3 * D) + D + n, mask=inside, other=0.0)
                gates = gates + (c,)  # noqa: RUF005
            for i in tl.static_range(TOKENS):
                z = bias
                for j in tl.static_range(WINDOW):
                    z += recent[i + j].to(tl.float32) * weights[j]
                y = (gates[i].to(tl.float32) * z).to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + (first + i) * D + n, y, mask=(n < D) & (first + i < T))
        else:
            for token in range(first, tl.minimum(first + TOKENS, T)):
                z = bias
                for j in tl.static_range(WINDOW):
                    u = u_before(
                        bcx_ptr, rows_ptr, positions_ptr, starts_ptr, read_ptr, tails_ptr, block_stride, column_stride,
                        token, n, D, WINDOW - 1 - j, WINDOW,
                    )  # fmt: skip
                    z += u.to(tl.float32) * weights[j]
                c = tl.load(bcx_ptr + token * (3 * D) + D + n, mask=n < D, other=0.0).to(tl.float32)
                tl.store(y_ptr + token * D + n, (c * z).to(y_ptr.dtype.element_ty), mask=n < D)


@triton.jit
def new_tails_kernel(
    bcx_ptr, positions_ptr, rows_ptr, starts_ptr, read_ptr, written_ptr, tails_ptr, new_ptr,
    D, block_stride, column_stride, WINDOW: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The tails to be written [W, WINDOW - 1, D]: u at the last WINDOW - 1 positions up to the token `written` [W]."""
    write = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.load(written_ptr + write)
    for back in tl.static_range(WINDOW - 1):
        u = u_before(
            bcx_ptr, rows_ptr, positions_ptr, starts_ptr, read_ptr, tails_ptr, block_stride, column_stride,
            t, n, D, back, WINDOW,
        )  # fmt: skip
        tl.store(new_ptr + (write * (WINDOW - 1) + WINDOW - 2 - back) * D + n, u, mask=n < D)


def conv_chunks(bcx_T3D: Tensor, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor) -> Tensor:
    """As `short_conv_ref`: y [T, D], and the tails of the blocks that end in this step, after all reads."""
    num_tokens, hidden = bcx_T3D.shape[0], bcx_T3D.shape[1] // 3
    window, num_writes = conv.weight.shape[1], batch.tail_write_W.shape[0]
    y_TD = bcx_T3D.new_empty(num_tokens, hidden)
    channel_tiles = triton.cdiv(hidden, CHANNELS)
    conv_chunks_kernel[(triton.cdiv(num_tokens, TOKENS * REPEATS), channel_tiles)](
        bcx_T3D,
        conv.weight,
        conv.weight if conv.bias is None else conv.bias,
        batch.positions_T,
        batch.rows_T,
        batch.starts_S,
        batch.tail_read_S,
        tails_NLD,
        y_TD,
        num_tokens,
        hidden,
        tails_NLD.stride(0),
        tails_NLD.stride(1),
        WINDOW=window,
        HAS_BIAS=conv.bias is not None,
        TOKENS=TOKENS,
        REPEATS=REPEATS,
        CHANNELS=CHANNELS,
        num_warps=WARPS,
    )
    if window > 1 and num_writes:
        new_WLD = bcx_T3D.new_empty(num_writes, window - 1, hidden)
        new_tails_kernel[(num_writes, channel_tiles)](
            bcx_T3D,
            batch.positions_T,
            batch.rows_T,
            batch.starts_S,
            batch.tail_read_S,
            batch.tail_token_W,
            tails_NLD,
            new_WLD,
            hidden,
            tails_NLD.stride(0),
            tails_NLD.stride(1),
            WINDOW=window,
            CHANNELS=CHANNELS,
            num_warps=WARPS,
        )
        tails_NLD[batch.tail_write_W] = new_WLD
    return y_TD
