"""Projections of few tokens at the speed at which memory gives W: every weight is read once, by one program.

    y = [norm(x) or x] W^T [+ bias] [+ residual]          and          y = silu(norm(x) Wg^T) * (norm(x) Wu^T)

A program owns ROWS rows of W and all of K, so nothing is reduced between programs, and a token's result depends on no
other token. Its warps share K; each keeps its part of W and x in registers, loaded in the order in which the tensor
cores take their operands (see `load_tile`), so that W never passes through shared memory. The norm costs no pass of its
own: W is multiplied with x * gain, and the mean of squares, from the same registers, scales the result. A program reads
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


class Tile(NamedTuple):
    """What a program holds at a time: rows of W, by the warps that share K, by runs of 32 inputs per warp.

    `ahead` such parts of W are loaded before the first is used. `registers` per thread decide how many programs share a
    multiprocessor; left alone, the assembler spends too few of them on loads in flight.
    """

    rows: int
    warps: int
    runs: int
    ahead: int
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
def operand(tile, ROWS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr):
    """The tile of `load_tile` as [WARPS, ROWS, RUNS * 32], without moving anything."""
    parts = tile.reshape(ROWS // 8, RUNS, WARPS, 8, 4, 2, 2, 2)
    return parts.permute(2, 0, 3, 1, 5, 6, 4, 7).reshape(WARPS, ROWS, RUNS * 32)


@triton.jit
def load_ahead(
    w_ptr, w_stride, first, limit, group_stride,
    K: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The first AHEAD tiles of the program's weights: for before the wait for the kernel in front."""
    STEP: tl.constexpr = WARPS * RUNS * 32
    tiles = ()  # type: tuple[Tensor, ...]
    for i in tl.static_range(AHEAD):
        if i * STEP < K:
            tile = load_tile(w_ptr, w_stride, first, limit, group_stride, i * STEP, K, ROWS, GROUPS, WARPS, RUNS)
            tiles = tiles + (tile,)  # noqa: RUF005  (Triton knows no unpacking)
    return tiles


@triton.jit
def stream_dot(
    tiles, x_ptr, x_stride, gain_ptr, w_ptr, w_stride, first, limit, group_stride, T, eps,
    K: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
    RUNS: tl.constexpr, AHEAD: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """x W^T, or norm(x) W^T, for the program's rows in every group: [TOKENS, G * ROWS] in fp32.

    The squares of a token are on the diagonal of x x^T, whose operands are in place already.
    """
    STEP: tl.constexpr = WARPS * RUNS * 32
    ALL_ROWS: tl.constexpr = ROWS * (4 if GROUPS == 3 else GROUPS)
    acc = tl.zeros([WARPS, TOKENS, ALL_ROWS], tl.float32)
    squares = tl.zeros([WARPS, TOKENS, TOKENS], tl.float32)
    for i in tl.static_range((K + STEP - 1) // STEP):
        x = load_tile(x_ptr, x_stride, 0, T, 0, i * STEP, K, TOKENS, 1, WARPS, RUNS)
        if HAS_NORM:
            gain = load_tile(gain_ptr, 0, 0, T, 0, i * STEP, K, TOKENS, 1, WARPS, RUNS)
        if (i + AHEAD) * STEP < K:
            tile = load_tile(
                w_ptr, w_stride, first, limit, group_stride, (i + AHEAD) * STEP, K, ROWS, GROUPS, WARPS, RUNS
            )
            tiles = tiles + (tile,)  # noqa: RUF005
        if HAS_NORM:
            plain = operand(x, TOKENS, WARPS, RUNS)
            squares = tl.dot(plain, tl.trans(plain, (0, 2, 1)), squares)
            x = x * gain
        weights = operand(tiles[i], ALL_ROWS, WARPS, RUNS)
        acc = tl.dot(operand(x, TOKENS, WARPS, RUNS), tl.trans(weights, (0, 2, 1)), acc)
    y = tl.sum(acc, 0)
    if HAS_NORM:
        t = tl.arange(0, TOKENS)
        mean = tl.sum(tl.where(t[:, None] == t[None, :], tl.sum(squares, 0), 0.0), 1) / K
        y *= tl.rsqrt(mean + eps)[:, None]
    return y


@triton.jit(do_not_specialize=["T"])
def project_kernel(
    x_ptr, gain_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, T, N, x_stride, w_stride, residual_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    AHEAD: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [T, N] = [norm(x) or x] [T, K] W^T [K, N] + bias [N] + residual [T, N]."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    tiles = load_ahead(w_ptr, w_stride, first, N, 0, K, ROWS, 1, WARPS, RUNS, AHEAD)
    t, n = tl.arange(0, TOKENS)[:, None], first + tl.arange(0, ROWS)[None, :]
    inside = (t < T) & (n < N)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + t * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
    y = stream_dot(
        tiles, x_ptr, x_stride, gain_ptr, w_ptr, w_stride, first, N, 0, T, eps,
        K, ROWS, 1, TOKENS, WARPS, RUNS, AHEAD, HAS_NORM,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += residual
    tl.store(y_ptr + t.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def select(groups, index: tl.constexpr, GROUPS: tl.constexpr):
    """Group `index` of [t, GROUPS, n]: [t, n]."""
    group = tl.arange(0, GROUPS)[None, :, None]
    return tl.sum(tl.where(group == index, groups, 0.0), 1)


@triton.jit(do_not_specialize=["T"])
def gate_up_kernel(
    x_ptr, gain_ptr, w_ptr, y_ptr, T, N, x_stride, w_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [T, N] = silu(norm(x) Wg^T) * (norm(x) Wu^T); w [2 N, K] holds the rows of Wg, then of Wu."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    tiles = load_ahead(w_ptr, w_stride, first, N, N, K, ROWS, 2, WARPS, RUNS, AHEAD)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    both = stream_dot(
        tiles, x_ptr, x_stride, gain_ptr, w_ptr, w_stride, first, N, N, T, eps,
        K, ROWS, 2, TOKENS, WARPS, RUNS, AHEAD, True,
    )  # fmt: skip
    both = both.reshape(TOKENS, 2, ROWS)
    gate, up = select(both, 0, 2), select(both, 1, 2)
    t, n = tl.arange(0, TOKENS)[:, None], first + tl.arange(0, ROWS)[None, :]
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + t.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(t < T) & (n < N))


# (what, room for tokens) -> tile: the best on an H200 at D = 2048. Where one is missing, the library is as fast.
TILES = {
    ("project", 8): Tile(8, 4, 8, 2, 128),
    ("project", 16): Tile(16, 4, 16, 1, 255),
    ("norm_project", 8): Tile(16, 4, 16, 1, 255),
    ("project_add", 8): Tile(8, 4, 16, 1, 168),
    ("project_add", 16): Tile(16, 4, 16, 1, 255),
    ("down", 8): Tile(8, 8, 8, 1, 128),  # project_add of many inputs
    ("gate_up", 8): Tile(8, 4, 16, 1, 255),
    ("conv_in", 8): Tile(8, 4, 4, 2, 184),
    ("conv_in", 16): Tile(8, 4, 8, 1, 255),
}
MANY_INPUTS = 4096


def token_slots(num_tokens: int) -> int:
    """The tokens that a program has room for."""
    return max(8, 1 << (num_tokens - 1).bit_length())


def find_tile(what: str, x: Tensor, weight_NK: Tensor) -> Tile | None:
    """The tile for x W^T if the kernels of this file take these tensors and are the fastest choice."""
    num_inputs = weight_NK.shape[1]
    takes = (
        runs_triton(x)
        and weight_NK.dtype == x.dtype
        and x.stride(-1) == weight_NK.stride(-1) == 1
        and num_inputs % 8 == 0
    )
    if not takes or x.shape[0] == 0:
        return None
    name = "down" if what == "project_add" and num_inputs > MANY_INPUTS else what
    tile = TILES.get((name, token_slots(x.shape[0])))
    if tile is None:
        return None
    return tile._replace(runs=min(tile.runs, -(-triton.next_power_of_2(num_inputs) // (32 * tile.warps))))


def launch_options(tile: Tile, device: torch.device) -> dict[str, int | bool]:
    """How a streaming kernel is compiled and launched with a tile."""
    options: dict[str, int | bool] = {"num_warps": tile.warps, "num_stages": 1}
    is_dependent = has_dependent_launch(device)
    if device.type == "cuda":
        options |= {"maxnreg": tile.registers, "launch_pdl": is_dependent}
    return {
        "WARPS": tile.warps,
        "RUNS": tile.runs,
        "ROWS": tile.rows,
        "AHEAD": tile.ahead,
        "DEPENDENT": is_dependent,
    } | options


def stream_project(
    x_TK: Tensor, projection: Linear, tile: Tile, *, norm: Norm | None = None, residual_TN: Tensor | None = None
) -> Tensor:
    """The projection of a few tokens, with a norm in front or a residual behind it [T, N]."""
    weight_NK, bias_N, _ = projection
    (num_tokens, num_inputs), num_outputs = x_TK.shape, weight_NK.shape[0]
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


def stream_gate_up(x_TK: Tensor, norm: Norm, gate_up: Linear, tile: Tile) -> Tensor:
    """silu(norm(x) Wg^T) * (norm(x) Wu^T) of a few tokens [T, I]; a tile has `rows` of each matrix."""
    gate_up_2IK = gate_up.weight
    (num_tokens, num_inputs), width = x_TK.shape, gate_up_2IK.shape[0] // 2
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
