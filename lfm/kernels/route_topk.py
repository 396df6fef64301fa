"""The router's kernels: norm, gate, sigmoid, selection and weights.

Few tokens: `score_kernel` spreads the gate's rows over programs, which have them in registers before the hidden states
are there (programmatic dependent launch), and `select_kernel` picks. More: `score_tile_kernel` does so for tiles of
tokens, on the matrix units. From hundreds on `route_tile_kernel` does everything for a tile of tokens. Rounding: x as
`rms_norm_ref`; logits, scores and weights in fp32.
Among equal scores the lower id wins; a NaN is never chosen, and where nothing is left to choose the id is E.
Bytes: h once from memory, x once; the gate (256 KB for the 24B) per token, or per tile, from L2. A program that reads
all of the gate takes 10 us, since a multiprocessor gets some 64 bytes a cycle from L2: so tiles of experts too.

Legend: T tokens, D hidden, E experts, A experts per token; EP, E rounded up to a power of two; K columns of a step.
"""

from functools import cache

import torch
from torch import Tensor

from lfm.kernels.moe_small import largest_divisor
from lfm.kernels.stream_gemm import load_ahead, load_tile, operand
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton
from lfm.kernels.weights import Norm, Router

# Measured on an H200 at 64 experts: 32 tokens 5.5 us, tiles from there 6.4 to 7.2 and 10.2 at 512, one launch 10.2.
MAX_FEW_TOKENS = 32
MAX_SPREAD_TOKENS = 384
MAX_SELECTING_TOKENS = 0  # up to here the last program selects, without a second launch; none, until it is measured
TILE_TOKENS, TILE_EXPERTS, TILE_WARPS = 16, 8, 8


@triton.jit
def score_kernel(
    h_TD, norm_D, gate_ED, x_TD, score_TE, eps, E, bias_E, is_real_T, chosen_TA, weights_TA, num_done_T, weight_scale,
    D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, EP: tl.constexpr, A: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, NORMALISE: tl.constexpr, SELECTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (token, tile of ROWS experts): sigmoid(x gate^T) [T, E]; the first tile writes x [T, D].

    SELECTS: the last program of a token to be done selects, and sets the token's count of them back to 0.
    """
    token = tl.program_id(0)
    e = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LANES)[None, :]
    is_expert = e < E
    gates: tl.tuple = ()
    norms: tl.tuple = ()
    hs: tl.tuple = ()
    for i in tl.static_range(D // LANES):
        gate = gate_ED + e[:, None] * D + k + i * LANES
        gates += (tl.load(gate, mask=is_expert[:, None], other=0.0),)
        norms += (tl.load(tl.broadcast_to(norm_D + k + i * LANES, (ROWS, LANES))),)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    square = tl.zeros((ROWS, LANES), tl.float32)
    for i in tl.static_range(D // LANES):
        h = tl.load(tl.broadcast_to(h_TD + token * D + k + i * LANES, (ROWS, LANES)))
        hs += (h,)
        square += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(square, 1) / D + eps)[:, None]
    score = tl.zeros((ROWS, LANES), tl.float32)
    is_first = (e == 0)[:, None]
    for i in tl.static_range(D // LANES):
        x = (hs[i].to(tl.float32) * scale).to(x_TD.dtype.element_ty) * norms[i]
        tl.store(tl.broadcast_to(x_TD + token * D + k + i * LANES, (ROWS, LANES)), x, mask=is_first)
        score += x.to(tl.float32) * gates[i].to(tl.float32)
    tl.store(score_TE + token * E + e, tl.sigmoid(tl.sum(score, 1)), mask=is_expert)
    if SELECTS:
        tl.debug_barrier()  # all threads have stored when one of them counts
        before = tl.atomic_add(num_done_T + token, 1, sem="acq_rel", scope="gpu")
        if before == tl.num_programs(1) - 1:
            tl.store(num_done_T + token, 0)
            tl.debug_barrier()
            select_token(
                score_TE, bias_E, is_real_T, chosen_TA, weights_TA, weight_scale, token, E,
                EP, A, HAS_BIAS, HAS_PADDING, NORMALISE, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def score_tile_kernel(
    h_TD, norm_D, gate_ED, x_TD, score_TE, num_tokens, eps, E,
    D: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, RUNS: tl.constexpr,
    WIDTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of TOKENS, tile of ROWS experts): sigmoid(x gate^T) [T, E], and WIDTH columns of x [T, D].

    As `stream_gemm`: its warps share D, the gate is on its way before h is there, and the norm's scale comes last.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    STEP: tl.constexpr = WARPS * RUNS * 32
    token = tl.program_id(0) * TOKENS
    e = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    gates = load_ahead(gate_ED, D, tl.program_id(1) * ROWS, E, 0, D, ROWS, 1, WARPS, RUNS, 8, 1)
    h_tile, rows = h_TD + token.to(tl.int64) * D, num_tokens - token
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    score = tl.zeros([WARPS, TOKENS, ROWS], tl.float32)
    squares = tl.zeros([WARPS, TOKENS, TOKENS], tl.float32)
    for i in tl.static_range((D + STEP - 1) // STEP):
        h = load_tile(h_tile, D, 0, rows, 0, i * STEP, D, TOKENS, 1, WARPS, RUNS, 8)
        gain = load_tile(norm_D, 0, 0, rows, 0, i * STEP, D, TOKENS, 1, WARPS, RUNS, 8)
        if i > 0:
            gate = load_tile(gate_ED, D, tl.program_id(1) * ROWS, E, 0, i * STEP, D, ROWS, 1, WARPS, RUNS, 8)
            gates = gates + (gate,)  # noqa: RUF005  (Triton knows no unpacking)
        plain = operand(h, TOKENS, WARPS, RUNS, 8)
        squares = tl.dot(plain, tl.trans(plain, (0, 2, 1)), squares)
        weights = operand(gates[i], ROWS, WARPS, RUNS, 8)
        score = tl.dot(operand(h * gain, TOKENS, WARPS, RUNS, 8), tl.trans(weights, (0, 2, 1)), score)
    t = tl.arange(0, TOKENS)
    mean = tl.sum(tl.where(t[:, None] == t[None, :], tl.sum(squares, 0), 0.0), 1) / D
    scale = tl.rsqrt(mean + eps)[:, None]
    inside = (t < rows)[:, None]
    to_score = score_TE + (token + t).to(tl.int64)[:, None] * E + e[None, :]
    tl.store(to_score, tl.sigmoid(tl.sum(score, 0) * scale), mask=inside & (e < E)[None, :])
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = inside & (d < D)
    offsets = t[:, None] * D + d
    h = tl.load(h_tile + offsets, mask=inside, other=0.0).to(tl.float32)
    x = (h * scale).to(x_TD.dtype.element_ty) * tl.load(norm_D + d, mask=d < D, other=0.0)
    tl.store(x_TD + token.to(tl.int64) * D + offsets, x, mask=inside)


@triton.jit
def select_kernel(
    score_TE, bias_E, is_real_T, chosen_TA, weights_TA, scale,
    E, EP: tl.constexpr, A: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, NORMALISE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (token): as `select_token`."""
    select_token(
        score_TE, bias_E, is_real_T, chosen_TA, weights_TA, scale, tl.program_id(0), E,
        EP, A, HAS_BIAS, HAS_PADDING, NORMALISE, DEPENDENT,
    )  # fmt: skip


@triton.jit
def select_token(
    score_TE, bias_E, is_real_T, chosen_TA, weights_TA, scale, token,
    E, EP: tl.constexpr, A: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, NORMALISE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The A best of E by score + bias, best first, and their weights. Rank: how many are better."""
    e = tl.arange(0, EP)
    bias = tl.zeros((EP,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_E + e, mask=e < E, other=0.0)
    is_real = True
    if HAS_PADDING:
        is_real = tl.load(is_real_T + token) > 0
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    score = tl.load(score_TE + token * E + e, mask=e < E, other=0.0, cache_modifier=".cg")  # others' are in L2
    is_choice = (e < E) & (score == score)
    selection = tl.where(is_choice, score + bias, float("-inf"))
    mine, other = selection[:, None], selection[None, :]
    is_better = (other > mine) | ((other == mine) & (e[None, :] < e[:, None]))
    rank = tl.sum(is_better.to(tl.int32), 1)
    is_chosen = rank < A
    weight = score
    if NORMALISE:
        weight = score / (tl.sum(tl.where(is_chosen, score, 0.0)) + 1e-6)
    expert = tl.where(is_choice & is_real, e, E).to(tl.int64)
    tl.store(chosen_TA + token * A + rank, expert, mask=is_chosen)
    tl.store(weights_TA + token * A + rank, weight * scale, mask=is_chosen)


@triton.jit
def choose_tile(score_TE, bias_E, is_real_T, E, EP: tl.constexpr, A: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Per choice, best first: ids [T], E where there is none or the token is not real, and scores [T]; sums [T]."""
    e = tl.arange(0, EP)
    selection_TE = score_TE
    if HAS_BIAS:
        selection_TE += tl.load(bias_E + e, mask=e < E, other=0.0)[None, :]
    selection_TE = tl.where((e < E)[None, :] & (score_TE == score_TE), selection_TE, float("-inf"))
    total_T = tl.zeros((score_TE.shape[0],), tl.float32)
    experts: tl.tuple = ()
    weights: tl.tuple = ()
    for _ in tl.static_range(A):
        best_T = tl.max(selection_TE, 1)
        is_best_TE = (selection_TE == best_T[:, None]) & (best_T > float("-inf"))[:, None]
        expert_T = tl.min(tl.where(is_best_TE, e[None, :], E), 1)
        is_chosen_TE = e[None, :] == expert_T[:, None]
        weight_T = tl.sum(tl.where(is_chosen_TE, score_TE, 0.0), 1)
        selection_TE = tl.where(is_chosen_TE, float("-inf"), selection_TE)
        total_T += weight_T
        experts += (tl.where(is_real_T, expert_T, E),)
        weights += (weight_T,)
    return experts, weights, total_T


@triton.jit(do_not_specialize=["num_tokens"])
def route_tile_kernel(
    h_TD, norm_D, gate_ED, bias_E, is_real_T, x_TD, chosen_TA, weights_TA, num_tokens, eps, scale,
    E, EP: tl.constexpr, A: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, NORMALISE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of BT): x [T, D], chosen [T, A] and weights [T, A]; h is read twice, the second time from L2."""
    token_T = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    k_K = tl.arange(0, BK)
    is_token_T = token_T < num_tokens
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    square_TK = tl.zeros((BT, BK), tl.float32)
    row = token_T[:, None] * D + k_K[None, :]
    for k in tl.range(0, D, BK, num_stages=STAGES):
        h = tl.load(h_TD + row + k, mask=is_token_T[:, None], other=0.0).to(tl.float32)
        square_TK += h * h
    scale_T1 = tl.rsqrt(tl.sum(square_TK, 1) / D + eps)[:, None]
    score_TE = tl.zeros((BT, EP), tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        h = tl.load(h_TD + row + k, mask=is_token_T[:, None], other=0.0).to(tl.float32)
        norm = tl.load(norm_D + k + k_K)[None, :]
        gate_EK = tl.load(gate_ED + e[:, None] * D + k + k_K[None, :], mask=(e < E)[:, None], other=0.0)
        x_TK = (h * scale_T1).to(x_TD.dtype.element_ty) * norm
        tl.store(x_TD + row + k, x_TK, mask=is_token_T[:, None])
        score_TE = tl.dot(x_TK, gate_EK.T, score_TE)
    score_TE = tl.sigmoid(score_TE)
    is_real_token_T = is_token_T
    if HAS_PADDING:
        is_real_token_T = is_token_T & (tl.load(is_real_T + token_T, mask=is_token_T, other=0) > 0)
    experts, weights, total_T = choose_tile(score_TE, bias_E, is_real_token_T, E, EP, A, HAS_BIAS)
    scale_T = tl.full((BT,), 1.0, tl.float32) * scale
    if NORMALISE:
        scale_T = scale / (total_T + 1e-6)
    for a in tl.static_range(A):
        tl.store(chosen_TA + token_T * A + a, experts[a].to(tl.int64), mask=is_token_T)
        tl.store(weights_TA + token_T * A + a, weights[a] * scale_T, mask=is_token_T)


@cache
def counters(device: torch.device) -> Tensor:
    """Zeros [MAX_FEW_TOKENS], which every launch leaves as zeros; one launch at a time uses them."""
    return torch.zeros(MAX_FEW_TOKENS, dtype=torch.int32, device=device)


def route_fast(
    h_TD: Tensor, norm: Norm, router: Router, is_real_T: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `route_ref`, for contiguous tensors with D a multiple of 64."""
    num_tokens, hidden = h_TD.shape
    num_experts, num_chosen = router.gate.shape[0], router.num_chosen
    is_dependent = has_dependent_launch(h_TD.device)
    x_TD = torch.empty_like(h_TD)
    chosen_TA = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=h_TD.device)
    weights_TA = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=h_TD.device)
    bias_E = weights_TA if router.bias is None else router.bias  # not read where there is none
    padding_T = chosen_TA if is_real_T is None else is_real_T
    padded = 1 << (num_experts - 1).bit_length()
    choice = {
        "EP": padded, "A": num_chosen, "HAS_BIAS": router.bias is not None, "HAS_PADDING": is_real_T is not None,
        "NORMALISE": router.normalise, "DEPENDENT": is_dependent, "launch_pdl": is_dependent,
    }  # fmt: skip
    score_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=h_TD.device)  # costs nothing unused
    selects = num_tokens <= MAX_SELECTING_TOKENS
    if num_tokens <= MAX_FEW_TOKENS:
        score_kernel[(num_tokens, padded // 4)](
            h_TD, norm.weight, router.gate, x_TD, score_TE, norm.eps, num_experts,
            bias_E, padding_T, chosen_TA, weights_TA, counters(h_TD.device) if selects else chosen_TA, router.scale,
            D=hidden, ROWS=4, LANES=largest_divisor(hidden, 256), SELECTS=selects, **choice, num_warps=4,
        )  # fmt: skip
        if selects:
            return x_TD, chosen_TA, weights_TA
    elif num_tokens <= MAX_SPREAD_TOKENS:
        num_tiles = triton.cdiv(num_experts, TILE_EXPERTS)
        score_tile_kernel[(triton.cdiv(num_tokens, TILE_TOKENS), num_tiles)](
            h_TD, norm.weight, router.gate, x_TD, score_TE, num_tokens, norm.eps, num_experts,
            D=hidden, ROWS=TILE_EXPERTS, TOKENS=TILE_TOKENS, WARPS=TILE_WARPS,
            RUNS=min(8, triton.cdiv(triton.next_power_of_2(hidden), 32 * TILE_WARPS)),
            WIDTH=triton.next_power_of_2(triton.cdiv(hidden, num_tiles)), DEPENDENT=is_dependent,
            num_warps=TILE_WARPS, num_stages=1, launch_pdl=is_dependent,
        )  # fmt: skip
    if num_tokens <= MAX_SPREAD_TOKENS:
        select_kernel[(num_tokens,)](
            score_TE, bias_E, padding_T, chosen_TA, weights_TA, router.scale, num_experts, **choice, num_warps=1
        )
        return x_TD, chosen_TA, weights_TA
    is_many = num_tokens > 4096
    tile = 64 if is_many else 16
    route_tile_kernel[(triton.cdiv(num_tokens, tile),)](
        h_TD, norm.weight, router.gate, bias_E, padding_T, x_TD, chosen_TA, weights_TA, num_tokens, norm.eps,
        router.scale, num_experts, D=hidden, BT=tile, BK=largest_divisor(hidden, 128 if is_many else 256),
        STAGES=3, **choice, num_warps=8 if is_many else 4, num_stages=3,
    )  # fmt: skip
    return x_TD, chosen_TA, weights_TA
