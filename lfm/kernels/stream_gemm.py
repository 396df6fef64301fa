"""Projections of few tokens at the speed at which memory gives W: every weight is read once, by one program.

    y = [norm(x) or x] W^T [+ bias] [+ residual]          and          y = silu(norm(x) Wg^T) * (norm(x) Wu^T)

A program owns ROWS rows of W and all of K, so nothing is reduced between programs, and a token's result depends on no
other token. Its warps share K; each keeps its part of W and x in registers, loaded in the order in which the tensor
cores take their operands (see `load_tile`), so that W never passes through shared memory. The norm costs no pass of its
own: W is multiplied with x * gain, and the mean of squares, from the same registers, scales the result. A program reads
W before it waits for the kernel in front (programmatic dependent launch), so that memory is busy between kernels too.

Bytes: N K 2 of W once (fp8: N K); T K 2 of x per program, from L2. Rounding: x * gain to the activation dtype; all else
in fp32 until the store.
Legend: T tokens, K inputs, N outputs, I dense width.
"""

from torch import Tensor

from lfm.kernels.fp8 import FP8
from lfm.kernels.triton_guard import has_dependent_launch, runs_triton, tl, triton
from lfm.kernels.tuned import StreamTile, tuned_for
from lfm.kernels.weights import Linear, Norm


@triton.jit
def load_tile(
    ptr, stride, first, limit, group_stride, k0,
    K: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS - 1 of each of GROUPS groups, inputs k0 .. k0 + WARPS * RUNS * 4 * VEC - 1.

    The result is [G * ROWS * WARPS * RUNS * 4, VEC], G the power of two from GROUPS on. Row limit - 1 stands for the
    rows from `limit` on, whose results nobody stores; zeros for inputs from K on and for groups from GROUPS on.
    Every lane loads 16 bytes of weights: lane = 4 * (row % 8) + quarter of a run. The tensor cores take two neighbours
    of every eight inputs from a lane, not VEC neighbours; but a dot product may take its inputs in any order that both
    operands share. So no value moves between lanes after the load.
    """
    SLOTS: tl.constexpr = 4 if GROUPS == 3 else GROUPS
    i = tl.arange(0, SLOTS * ROWS * WARPS * RUNS * 4)
    quarter, row8, warp = i % 4, i // 4 % 8, i // 32 % WARPS
    run, part = i // (32 * WARPS) % RUNS, i // (32 * WARPS * RUNS)
    row, group = tl.minimum(first + part % (ROWS // 8) * 8 + row8, limit - 1), part // (ROWS // 8)
    k = k0 + (warp * RUNS + run) * (4 * VEC) + quarter * VEC
    offsets = (row + group * group_stride).to(tl.int64) * stride + k
    pointers = ptr + offsets[:, None] + tl.arange(0, VEC)[None, :]
    if k0 + WARPS * RUNS * (4 * VEC) > K:
        return tl.load(pointers, mask=((k < K) & (group < GROUPS))[:, None], other=0.0)
    elif SLOTS > GROUPS:
        return tl.load(pointers, mask=(group < GROUPS)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def operand(tile, ROWS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr, VEC: tl.constexpr):
    """The tile of `load_tile` as [WARPS, ROWS, RUNS * 4 * VEC], without moving anything."""
    parts = tile.reshape(ROWS // 8, RUNS, WARPS, 8, 4, VEC // 4, 2, 2)
    return parts.permute(2, 0, 3, 1, 5, 6, 4, 7).reshape(WARPS, ROWS, RUNS * 4 * VEC)


@triton.jit
def load_ahead(
    w_ptr, w_stride, first, limit, group_stride,
    K: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    VEC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The first AHEAD tiles of the program's weights: for before the wait for the kernel in front."""
    STEP: tl.constexpr = WARPS * RUNS * 4 * VEC
    tiles = ()  # type: tuple[Tensor, ...]
    for i in tl.static_range(AHEAD):
        if i * STEP < K:
            tile = load_tile(w_ptr, w_stride, first, limit, group_stride, i * STEP, K, ROWS, GROUPS, WARPS, RUNS, VEC)
            tiles = tiles + (tile,)  # noqa: RUF005  (Triton knows no unpacking)
    return tiles


@triton.jit
def stream_dot(
    tiles, x_ptr, x_stride, gain_ptr, w_ptr, scale_ptr, w_stride, first, limit, group_stride, T, eps,
    K: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
    RUNS: tl.constexpr, VEC: tl.constexpr, AHEAD: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """x W^T, or norm(x) W^T, for the program's rows in every group: [TOKENS, G * ROWS] in fp32.

    The squares of a token are on the diagonal of x x^T, whose operands are in place already. Weights in fp8 become x's
    dtype in registers, exactly; HAS_SCALE: their rows' scales multiply the sums.
    """
    STEP: tl.constexpr = WARPS * RUNS * 4 * VEC
    ALL_ROWS: tl.constexpr = ROWS * (4 if GROUPS == 3 else GROUPS)
    acc = tl.zeros([WARPS, TOKENS, ALL_ROWS], tl.float32)
    squares = tl.zeros([WARPS, TOKENS, TOKENS], tl.float32)
    for i in tl.static_range((K + STEP - 1) // STEP):
        x = load_tile(x_ptr, x_stride, 0, T, 0, i * STEP, K, TOKENS, 1, WARPS, RUNS, VEC)
        if HAS_NORM:
            gain = load_tile(gain_ptr, 0, 0, T, 0, i * STEP, K, TOKENS, 1, WARPS, RUNS, VEC)
        if (i + AHEAD) * STEP < K:
            tile = load_tile(
                w_ptr, w_stride, first, limit, group_stride, (i + AHEAD) * STEP, K, ROWS, GROUPS, WARPS, RUNS, VEC
            )
            tiles = tiles + (tile,)  # noqa: RUF005
        if HAS_NORM:
            plain = operand(x, TOKENS, WARPS, RUNS, VEC)
            squares = tl.dot(plain, tl.trans(plain, (0, 2, 1)), squares)
            x = x * gain
        weights = operand(tiles[i].to(x.dtype), ALL_ROWS, WARPS, RUNS, VEC)
        acc = tl.dot(operand(x, TOKENS, WARPS, RUNS, VEC), tl.trans(weights, (0, 2, 1)), acc)
    y = tl.sum(acc, 0)
    if HAS_SCALE:
        i = tl.arange(0, ALL_ROWS)
        row = tl.minimum(first + i % ROWS, limit - 1) + i // ROWS * group_stride
        y *= tl.load(scale_ptr + row, mask=i < GROUPS * ROWS, other=0.0)[None, :]
    if HAS_NORM:
        t = tl.arange(0, TOKENS)
        mean = tl.sum(tl.where(t[:, None] == t[None, :], tl.sum(squares, 0), 0.0), 1) / K
        y *= tl.rsqrt(mean + eps)[:, None]
    return y


@triton.jit(do_not_specialize=["T"])
def project_kernel(
    x_ptr, gain_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, T, N, x_stride, w_stride, residual_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    VEC: tl.constexpr, AHEAD: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [T, N] = [norm(x) or x] [T, K] W^T [K, N] + bias [N] + residual [T, N]."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    tiles = load_ahead(w_ptr, w_stride, first, N, 0, K, ROWS, 1, WARPS, RUNS, VEC, AHEAD)
    t, n = tl.arange(0, TOKENS)[:, None], first + tl.arange(0, ROWS)[None, :]
    inside = (t < T) & (n < N)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + t * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
    y = stream_dot(
        tiles, x_ptr, x_stride, gain_ptr, w_ptr, scale_ptr, w_stride, first, N, 0, T, eps,
        K, ROWS, 1, TOKENS, WARPS, RUNS, VEC, AHEAD, HAS_NORM, HAS_SCALE,
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
    x_ptr, gain_ptr, w_ptr, scale_ptr, y_ptr, T, N, x_stride, w_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    VEC: tl.constexpr, AHEAD: tl.constexpr, HAS_SCALE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [T, N] = silu(norm(x) Wg^T) * (norm(x) Wu^T); w [2 N, K] holds the rows of Wg, then of Wu."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    tiles = load_ahead(w_ptr, w_stride, first, N, N, K, ROWS, 2, WARPS, RUNS, VEC, AHEAD)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    both = stream_dot(
        tiles, x_ptr, x_stride, gain_ptr, w_ptr, scale_ptr, w_stride, first, N, N, T, eps,
        K, ROWS, 2, TOKENS, WARPS, RUNS, VEC, AHEAD, True, HAS_SCALE,
    )  # fmt: skip
    both = both.reshape(TOKENS, 2, ROWS)
    gate, up = select(both, 0, 2), select(both, 1, 2)
    t, n = tl.arange(0, TOKENS)[:, None], first + tl.arange(0, ROWS)[None, :]
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + t.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(t < T) & (n < N))


MANY_INPUTS = 4096  # from here on a product with a residual is "down", one of many inputs


def token_slots(num_tokens: int) -> int:
    """The tokens that a program has room for."""
    return max(8, 1 << (num_tokens - 1).bit_length())


def lane_values(weight_NK: Tensor, tile: StreamTile, *, groups: int, slots: int) -> int:
    """Values of a weight that a lane loads at a time. 16 of fp8 only if the tiles of weights and x have one shape:
    Triton lays loads out alike only then, and a tile whose values move between lanes costs more than it gains."""
    is_alike = tile.rows * (4 if groups == 3 else groups) == slots
    return 16 if weight_NK.dtype == FP8 and is_alike and tile.runs % 2 == 0 else 8


def find_tile(what: str, x: Tensor, weight_NK: Tensor) -> StreamTile | None:
    """The tile for x W^T if the kernels of this file take these tensors and are the fastest choice."""
    num_inputs, aligned = weight_NK.shape[1], 16 if weight_NK.dtype == FP8 else 8
    takes = runs_triton(x) and weight_NK.dtype in (x.dtype, FP8) and x.stride(-1) == weight_NK.stride(-1) == 1
    if not takes or num_inputs % aligned or weight_NK.stride(0) % aligned or x.shape[0] == 0:
        return None
    name = "down" if what == "project_add" and num_inputs > MANY_INPUTS else what
    tiles = tuned_for(x.device).stream["fp8" if weight_NK.dtype == FP8 else "bf16"]
    tile = tiles.get((name, token_slots(x.shape[0])))
    if tile is None:
        return None
    return tile._replace(runs=min(tile.runs, -(-triton.next_power_of_2(num_inputs) // (32 * tile.warps))))


def launch_options(tile: StreamTile, weight_NK: Tensor, *, groups: int, num_tokens: int) -> dict[str, int | bool]:
    """How a streaming kernel is compiled and launched with a tile."""
    device, slots = weight_NK.device, token_slots(num_tokens)
    vec = lane_values(weight_NK, tile, groups=groups, slots=slots)
    options: dict[str, int | bool] = {"num_warps": tile.warps, "num_stages": 1}
    is_dependent = has_dependent_launch(device)
    if device.type != "cpu":  # which the interpreter is
        options |= {"maxnreg": tile.registers, "launch_pdl": is_dependent}
    return {
        "WARPS": tile.warps,
        "TOKENS": slots,
        "RUNS": tile.runs * 8 // vec,
        "ROWS": tile.rows,
        "VEC": vec,
        "AHEAD": tile.ahead,
        "DEPENDENT": is_dependent,
    } | options


def stream_project(
    x_TK: Tensor, projection: Linear, tile: StreamTile, *, norm: Norm | None = None, residual_TN: Tensor | None = None
) -> Tensor:
    """The projection of a few tokens, with a norm in front or a residual behind it [T, N]."""
    weight_NK, bias_N, scale_N = projection
    (num_tokens, num_inputs), num_outputs = x_TK.shape, weight_NK.shape[0]
    y_TN = x_TK.new_empty(num_tokens, num_outputs)
    project_kernel[(triton.cdiv(num_outputs, tile.rows),)](
        x_TK,
        norm.weight if norm else x_TK,
        weight_NK,
        weight_NK if scale_N is None else scale_N,
        x_TK if bias_N is None else bias_N,
        x_TK if residual_TN is None else residual_TN,
        y_TN,
        num_tokens,
        num_outputs,
        x_TK.stride(0),
        weight_NK.stride(0),
        0 if residual_TN is None else residual_TN.stride(0),
        norm.eps if norm else 0.0,
        K=num_inputs,
        HAS_NORM=norm is not None,
        HAS_SCALE=scale_N is not None,
        HAS_BIAS=bias_N is not None,
        HAS_RESIDUAL=residual_TN is not None,
        **launch_options(tile, weight_NK, groups=1, num_tokens=num_tokens),
    )
    return y_TN


def stream_gate_up(x_TK: Tensor, norm: Norm, gate_up: Linear, tile: StreamTile) -> Tensor:
    """silu(norm(x) Wg^T) * (norm(x) Wu^T) of a few tokens [T, I]; a tile has `rows` of each matrix."""
    gate_up_2IK = gate_up.weight
    (num_tokens, num_inputs), width = x_TK.shape, gate_up_2IK.shape[0] // 2
    y_TI = x_TK.new_empty(num_tokens, width)
    gate_up_kernel[(triton.cdiv(width, tile.rows),)](
        x_TK,
        norm.weight,
        gate_up_2IK,
        gate_up_2IK if gate_up.scale is None else gate_up.scale,
        y_TI,
        num_tokens,
        width,
        x_TK.stride(0),
        gate_up_2IK.stride(0),
        norm.eps,
        K=num_inputs,
        HAS_SCALE=gate_up.scale is not None,
        **launch_options(tile, gate_up_2IK, groups=2, num_tokens=num_tokens),
    )
    return y_TI
