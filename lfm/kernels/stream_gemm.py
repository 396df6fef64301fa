"""Projections of few tokens at the speed at which memory gives W: every weight is read once, by one program.

    y = [norm(x) or x] W^T [+ bias] [+ residual]          and          y = silu(norm(x) Wg^T) * (norm(x) Wu^T)

A program owns ROWS rows of W and all of K, so nothing is reduced between programs, and a token's result depends on no
other token. Its warps share K; each keeps its part of W and x in registers, loaded in the order in which the tensor
cores take their operands (see `load_tile`), so that W never passes through shared memory. The norm costs no pass of its
own: W is multiplied with x * gain, and the sum of squares, from the same registers, scales the result. A program reads
W before it waits for the kernel in front (programmatic dependent launch), so that memory is busy between kernels too.

Bytes: N K 2 of W once; T K 2 of x per program, from L2. Rounding: x * gain to the activation dtype; all else in fp32
until the store.
Legend: T tokens, K inputs, N outputs, I dense width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lfm.kernels.triton_guard import has_dependent_launch, runs_triton, tl, triton
from lfm.kernels.weights import Linear, Norm

MAX_TOKENS = 32


class Tile(NamedTuple):
    """What a program holds at a time: rows of W, by the warps that share K, by runs of 32 inputs per warp.

    `registers` per thread decide how many programs share a multiprocessor; the assembler, left alone, spends too few of
    them on loads in flight.
    """

    rows: int
    warps: int
    runs: int
    registers: int


@triton.jit
def load_tile(
    ptr, stride, first, limit, group_stride, k0,
    K: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS - 1 of each of GROUPS groups, inputs k0 .. k0 + WARPS * RUNS * 32 - 1.

    The result is [G * ROWS * WARPS * RUNS * 4, 8], G the power of two from GROUPS on. Row limit - 1 stands for the rows
    from `limit` on, whose results nobody stores; zeros for inputs from K on and for groups from GROUPS on.
    Every lane loads 16 bytes: lane = 4 * (row % 8) + quarter of a run. The tensor cores take two neighbours of every
    eight inputs from a lane, not eight neighbours; but a dot product may take its inputs in any order that both
    operands share. So no value moves between lanes after the load.
    """
    SLOTS: tl.constexpr = 4 if GROUPS == 3 else GROUPS
    i = tl.arange(0, SLOTS * ROWS * WARPS * RUNS * 4)
    quarter, row8, warp = i % 4, i // 4 % 8, i // 32 % WARPS
    run, part = i // (32 * WARPS) % RUNS, i // (32 * WARPS * RUNS)
    row, group = tl.minimum(first + part % (ROWS // 8) * 8 + row8, limit - 1), part // (ROWS // 8)
    k = k0 + (warp * RUNS + run) * 32 + quarter * 8
    offsets = (row + group * group_stride).to(tl.int64) * stride + k
    pointers = ptr + offsets[:, None] + tl.arange(0, 8)[None, :]
    if k0 + WARPS * RUNS * 32 > K:
        return tl.load(pointers, mask=((k < K) & (group < GROUPS))[:, None], other=0.0)
    elif SLOTS > GROUPS:
        return tl.load(pointers, mask=(group < GROUPS)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def weight_operand(tile, ROWS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr):
    """The tile [WARPS, ROWS, RUNS * 32], without moving anything."""
    parts = tile.reshape(ROWS // 8, RUNS, WARPS, 8, 4, 2, 2, 2)
    return parts.permute(2, 0, 3, 1, 5, 6, 4, 7).reshape(WARPS, ROWS, RUNS * 32)


@triton.jit
def token_operand(tile, TOKENS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr):
    """The tile [WARPS, RUNS * 32, TOKENS], without moving anything."""
    parts = tile.reshape(TOKENS // 8, RUNS, WARPS, 8, 4, 2, 2, 2)
    return parts.permute(2, 1, 5, 6, 4, 7, 0, 3).reshape(WARPS, RUNS * 32, TOKENS)


@triton.jit
def stream_dot(
    w, x_ptr, x_stride, gain_ptr, w_ptr, w_stride, first, limit, group_stride, T, eps,
    K: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
    RUNS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """W x^T, or W norm(x)^T, of the program's rows in every group: [G * ROWS, TOKENS] in fp32.

    `w` is the tile at k0 = 0, which the kernel loads before anything that depends on the kernel in front of it.
    """
    STEP: tl.constexpr = WARPS * RUNS * 32
    ALL_ROWS: tl.constexpr = ROWS * (4 if GROUPS == 3 else GROUPS)
    acc = tl.zeros([WARPS, ALL_ROWS, TOKENS], tl.float32)
    squares = tl.zeros([TOKENS * WARPS * RUNS * 4], tl.float32)
    for k0 in tl.static_range(0, K, STEP):
        if k0 + STEP < K:  # the next step's weights are on their way while this one's are used
            following = load_tile(
                w_ptr, w_stride, first, limit, group_stride, k0 + STEP, K, ROWS, GROUPS, WARPS, RUNS
            )  # fmt: skip
        x = load_tile(x_ptr, x_stride, 0, T, 0, k0, K, TOKENS, 1, WARPS, RUNS)
        if HAS_NORM:
            gain = load_tile(gain_ptr, 0, 0, T, 0, k0, K, TOKENS, 1, WARPS, RUNS)
            x32 = x.to(tl.float32)
            squares += tl.sum(x32 * x32, 1)
            x = x * gain
        weights = weight_operand(w, ALL_ROWS, WARPS, RUNS)
        acc = tl.dot(weights, token_operand(x, TOKENS, WARPS, RUNS), acc)
        if k0 + STEP < K:
            w = following
    y = tl.sum(acc, 0)
    if HAS_NORM:
        mean = tl.sum(tl.sum(squares.reshape(TOKENS // 8, RUNS * WARPS, 8, 4), 3), 1).reshape(TOKENS) / K
        y *= tl.rsqrt(mean + eps)[None, :]
    return y


@triton.jit(do_not_specialize=["T"])
def project_kernel(
    x_ptr, gain_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, T, N, x_stride, w_stride, residual_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [T, N] = [norm(x) or x] [T, K] W^T [K, N] + bias [N] + residual [T, N]."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    n, t = first + tl.arange(0, ROWS)[:, None], tl.arange(0, TOKENS)[None, :]
    inside = (n < N) & (t < T)
    w = load_tile(w_ptr, w_stride, first, N, 0, 0, K, ROWS, 1, WARPS, RUNS)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + t * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
    y = stream_dot(
        w, x_ptr, x_stride, gain_ptr, w_ptr, w_stride, first, N, 0, T, eps,
        K, ROWS, 1, TOKENS, WARPS, RUNS, HAS_NORM,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += residual
    tl.store(y_ptr + t.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def gate_up_kernel(
    x_ptr, gain_ptr, w_ptr, y_ptr, T, N, x_stride, w_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [T, N] = silu(norm(x) Wg^T) * (norm(x) Wu^T); w [2 N, K] holds the rows of Wg, then of Wu."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    w = load_tile(w_ptr, w_stride, first, N, N, 0, K, ROWS, 2, WARPS, RUNS)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    both = stream_dot(
        w, x_ptr, x_stride, gain_ptr, w_ptr, w_stride, first, N, N, T, eps,
        K, ROWS, 2, TOKENS, WARPS, RUNS, True,
    )  # fmt: skip
    gate, up = tl.split(both.reshape(2, ROWS, TOKENS).permute(1, 2, 0))
    n, t = first + tl.arange(0, ROWS)[:, None], tl.arange(0, TOKENS)[None, :]
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + t.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(n < N) & (t < T))


# (what, token slots) -> tile.
TILES = {
    ("project", 8): Tile(16, 8, 8, 128),
    ("project", 16): Tile(16, 8, 8, 168),
    ("project", 32): Tile(16, 8, 4, 168),
    ("gate_up", 8): Tile(8, 8, 8, 128),
    ("gate_up", 16): Tile(8, 8, 4, 128),
    ("gate_up", 32): Tile(8, 8, 4, 168),
    ("conv_in", 8): Tile(8, 8, 4, 128),
    ("conv_in", 16): Tile(8, 8, 4, 168),
    ("conv_in", 32): Tile(8, 8, 4, 255),
}


def choose_tile(what: str, num_tokens: int, num_outputs: int, num_inputs: int) -> Tile:
    """The tile of a kernel at these sizes."""
    return TILES[what, token_slots(num_tokens)]


def can_stream(x: Tensor, weight_NK: Tensor) -> bool:
    """Whether the streaming kernels take these, and are the faster choice."""
    return (
        runs_triton(x)
        and 0 < x.shape[0] <= MAX_TOKENS
        and x.stride(1) == weight_NK.stride(1) == 1
        and weight_NK.shape[1] % 8 == 0
    )


def token_slots(num_tokens: int) -> int:
    """Tokens that a program has room for: 8, 16 or 32."""
    return max(8, 1 << (num_tokens - 1).bit_length())


def launch_options(tile: Tile, device: torch.device) -> dict[str, int | bool]:
    """How a streaming kernel is compiled and launched with a tile."""
    options: dict[str, int | bool] = {"num_warps": tile.warps, "num_stages": 1}
    is_dependent = has_dependent_launch(device)
    if device.type == "cuda":
        options |= {"maxnreg": tile.registers, "launch_pdl": is_dependent}
    return {"WARPS": tile.warps, "RUNS": tile.runs, "ROWS": tile.rows, "DEPENDENT": is_dependent} | options


def stream_project(
    x_TK: Tensor, projection: Linear, *, norm: Norm | None = None, residual_TN: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """The projection of at most MAX_TOKENS tokens, with a norm in front or a residual behind it [T, N]."""
    weight_NK, bias_N = projection
    (num_tokens, num_inputs), num_outputs = x_TK.shape, weight_NK.shape[0]
    tile = tile or choose_tile("project", num_tokens, num_outputs, num_inputs)
    y_TN = x_TK.new_empty(num_tokens, num_outputs)
    project_kernel[(triton.cdiv(num_outputs, tile.rows),)](
        x_TK,
        norm.weight if norm else x_TK,
        weight_NK,
        weight_NK if bias_N is None else bias_N,
        x_TK if residual_TN is None else residual_TN,
        y_TN,
        num_tokens,
        num_outputs,
        x_TK.stride(0),
        weight_NK.stride(0),
        0 if residual_TN is None else residual_TN.stride(0),
        norm.eps if norm else 0.0,
        K=num_inputs,
        TOKENS=token_slots(num_tokens),
        HAS_NORM=norm is not None,
        HAS_BIAS=bias_N is not None,
        HAS_RESIDUAL=residual_TN is not None,
        **launch_options(tile, x_TK.device),
    )
    return y_TN


def stream_gate_up(x_TK: Tensor, norm: Norm, gate_up_2IK: Tensor, *, tile: Tile | None = None) -> Tensor:
    """silu(norm(x) Wg^T) * (norm(x) Wu^T) of at most MAX_TOKENS tokens [T, I]; a tile has `rows` of each."""
    (num_tokens, num_inputs), width = x_TK.shape, gate_up_2IK.shape[0] // 2
    tile = tile or choose_tile("gate_up", num_tokens, width, num_inputs)
    y_TI = x_TK.new_empty(num_tokens, width)
    gate_up_kernel[(triton.cdiv(width, tile.rows),)](
        x_TK,
        norm.weight,
        gate_up_2IK,
        y_TI,
        num_tokens,
        width,
        x_TK.stride(0),
        gate_up_2IK.stride(0),
        norm.eps,
        K=num_inputs,
        TOKENS=token_slots(num_tokens),
        **launch_options(tile, x_TK.device),
    )
    return y_TI
