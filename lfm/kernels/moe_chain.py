"""Router and experts of a large prefill as one chain of five launches, with the next layer's norm at its end.

    x = norm(h);  chosen, w = route(x);  h' = h + sum_a w[t, a] expert(x);  next = next_norm(h')

As route_topk and moe_prefill one after the other, with fewer bytes beside the products: x is never written but for its
copies in sorted order, the norm's scale of a token (4 bytes) is what travels from the router to there; the histogram of
the sort comes with the choice; and h' is normalised by the program that has it in registers. Per token of the 24B: h
read by the router (4 KB), h read and A copies written (20 KB), y and h read, h' and next written (28 KB): 52 KB, where
separate launches move 4 + 4 + 20 + 24 + 8 = 60 KB, with two launches more.
Rounding: logits from h * weight, rounded once, with the norm's scale behind the product, as for few tokens; x and next
as `rms_norm_ref` and `rms_norm`; else as moe_prefill.

Legend: T tokens, D hidden, E experts, EP E rounded up to a power of two, A experts per token, F expert width,
P = T * A pairs, C chunks of BT tokens.
"""

import torch
from torch import Tensor

from lfm.kernels import moe_persistent
from lfm.kernels.moe_prefill import CHUNK_PAIRS, place_pairs, products
from lfm.kernels.moe_small import largest_divisor
from lfm.kernels.route_topk import choose_tile
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton
from lfm.kernels.weights import Norm, Router

ROUTE_INPUTS, ROUTE_WARPS, ROUTE_STAGES = 128, 8, 4
SPREAD_WARPS, SUM_WARPS = 4, 4


@triton.jit(do_not_specialize=["num_tokens"])
def route_count_kernel(
    h_TD, norm_D, gate_ED, bias_E, is_real_T, chosen_TA, weights_TA, scale_T, count_CE, num_tokens, eps, scale, E,
    EP: tl.constexpr, A: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr, NORMALISE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (chunk of BT tokens): chosen and weights [T, A], the norm's scale [T], pairs per expert [C, EP]."""
    token_T = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    k_K = tl.arange(0, BK)
    is_token_T = token_T < num_tokens
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = token_T[:, None] * D + k_K[None, :]
    square_T = tl.zeros((BT,), tl.float32)
    logit_TE = tl.zeros((BT, EP), tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        h_TK = tl.load(h_TD + row + k, mask=is_token_T[:, None], other=0.0)
        gain_K = tl.load(norm_D + k + k_K)
        gate_EK = tl.load(gate_ED + e[:, None] * D + k + k_K[None, :], mask=(e < E)[:, None], other=0.0)
        wide_TK = h_TK.to(tl.float32)
        square_T += tl.sum(wide_TK * wide_TK, 1)
        logit_TE = tl.dot(h_TK * gain_K[None, :], gate_EK.T, logit_TE)
    norm_T = tl.rsqrt(square_T / D + eps)
    tl.store(scale_T + token_T, norm_T, mask=is_token_T)
    score_TE = tl.sigmoid(logit_TE * norm_T[:, None])
    is_real_token_T = is_token_T
    if HAS_PADDING:
        is_real_token_T = is_token_T & (tl.load(is_real_T + token_T, mask=is_token_T, other=0) > 0)
    experts, weights, total_T = choose_tile(score_TE, bias_E, is_real_token_T, E, EP, A, HAS_BIAS)
    weight_scale_T = tl.full((BT,), 1.0, tl.float32) * scale
    if NORMALISE:
        weight_scale_T = scale / (total_T + 1e-6)
    picked_TE = tl.zeros((BT, EP), tl.int32)
    for a in tl.static_range(A):
        tl.store(chosen_TA + token_T * A + a, experts[a].to(tl.int64), mask=is_token_T)
        tl.store(weights_TA + token_T * A + a, weights[a] * weight_scale_T, mask=is_token_T)
        picked_TE += ((experts[a][:, None] == e[None, :]) & (e < E)[None, :]).to(tl.int32)
    tl.store(count_CE + tl.program_id(0) * EP + e, tl.sum(picked_TE, 0))


@triton.jit
def spread_norm_kernel(
    h_TD, norm_D, scale_T, chosen_TA, place_P, x_PD, E,
    A: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (token, tile of BD): its x to its places in sorted order. All but `place` is older than the sort."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    h = tl.load(h_TD + token * D + d).to(tl.float32)
    x = (h * tl.load(scale_T + token)).to(x_PD.dtype.element_ty) * tl.load(norm_D + d)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for a in tl.static_range(A):
        expert = tl.load(chosen_TA + token * A + a)
        if (expert >= 0) & (expert < E):
            tl.store(x_PD + tl.load(place_P + token * A + a).to(tl.int64) * D + d, x)


@triton.jit
def sum_norm_kernel(
    h_TD, chosen_TA, y_PD, norm_D, out_TD, next_TD, eps, E,
    A: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (token): out[t] = h[t] + sum_a y[t, a], next[t] = norm(out[t]). `h`, `chosen` are older than `down`."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    out_D = tl.load(h_TD + token * D + d, mask=d < D, other=0.0).to(tl.float32)
    gain = tl.load(norm_D + d, mask=d < D, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for a in tl.static_range(A):
        expert = tl.load(chosen_TA + token * A + a)
        is_expert = (expert >= 0) & (expert < E)
        out_D += tl.load(y_PD + (token * A + a) * D + d, mask=is_expert & (d < D), other=0.0).to(tl.float32)
    out = out_D.to(out_TD.dtype.element_ty)
    tl.store(out_TD + token * D + d, out, mask=d < D)
    x = out.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * gain
    tl.store(next_TD + token * D + d, x.to(next_TD.dtype.element_ty), mask=d < D)


def can_chain(hidden: int, num_chosen: int) -> bool:
    """Whether a chunk of the router's tokens is a chunk of the sort, and x is made of whole blocks."""
    return hidden % 64 == 0 and CHUNK_PAIRS % num_chosen == 0 and CHUNK_PAIRS // num_chosen >= 16


def route_count(
    h_TD: Tensor, norm: Norm, router: Router, is_real_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids int64 and weights [T, A] as `route_ref`, the norm's scales [T], pairs per chunk and expert [C, EP]."""
    num_tokens, hidden = h_TD.shape
    num_experts, num_chosen = router.gate.shape[0], router.num_chosen
    padded, tile = max(16, 1 << (num_experts - 1).bit_length()), CHUNK_PAIRS // num_chosen
    num_chunks, is_dependent = triton.cdiv(num_tokens, tile), has_dependent_launch(h_TD.device)
    chosen_TA = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=h_TD.device)
    weights_TA = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=h_TD.device)
    scale_T = torch.empty(num_tokens, dtype=torch.float32, device=h_TD.device)
    count_CE = torch.empty(num_chunks, padded, dtype=torch.int32, device=h_TD.device)
    route_count_kernel[(num_chunks,)](
        h_TD, norm.weight, router.gate, weights_TA if router.bias is None else router.bias,
        chosen_TA if is_real_T is None else is_real_T, chosen_TA, weights_TA, scale_T, count_CE,
        num_tokens, norm.eps, router.scale, num_experts,
        EP=padded, A=num_chosen, D=hidden, BT=tile, BK=largest_divisor(hidden, ROUTE_INPUTS),
        STAGES=ROUTE_STAGES, HAS_BIAS=router.bias is not None, HAS_PADDING=is_real_T is not None,
        NORMALISE=router.normalise, DEPENDENT=is_dependent, num_warps=ROUTE_WARPS, launch_pdl=is_dependent,
    )  # fmt: skip
    return chosen_TA, weights_TA, scale_T, count_CE


def moe_chain(
    h_TD: Tensor,
    norm: Norm,
    router: Router,
    is_real_T: Tensor | None,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    next_norm: Norm,
) -> tuple[Tensor, Tensor]:
    """The residual stream behind the experts, and the next norm of it [T, D], for contiguous tensors."""
    num_tokens, hidden = h_TD.shape
    num_experts, num_chosen, is_dependent = len(down_EDF), router.num_chosen, has_dependent_launch(h_TD.device)
    chosen_TA, weights_TA, scale_T, count_CE = route_count(h_TD, norm, router, is_real_T)
    pairs = place_pairs(chosen_TA, count_CE, num_experts, is_late=True)
    block = largest_divisor(hidden, 2048)
    x_PD = h_TD.new_empty(num_tokens * num_chosen, hidden)
    options = {"A": num_chosen, "D": hidden, "DEPENDENT": is_dependent, "launch_pdl": is_dependent}
    spread_norm_kernel[(num_tokens, hidden // block)](
        h_TD, norm.weight, scale_T, chosen_TA, pairs.place_P, x_PD, num_experts,
        BD=block, **options, num_warps=SPREAD_WARPS,
    )  # fmt: skip
    multiply = moe_persistent.products if moe_persistent.can_run(gate_up_E2FD, down_EDF) else products
    y_PD = multiply(x_PD, pairs, weights_TA, gate_up_E2FD, down_EDF)
    out_TD, next_TD = torch.empty_like(h_TD), torch.empty_like(h_TD)
    sum_norm_kernel[(num_tokens,)](
        h_TD, chosen_TA, y_PD, next_norm.weight, out_TD, next_TD, next_norm.eps, num_experts,
        WIDTH=triton.next_power_of_2(hidden), **options, num_warps=SUM_WARPS,
    )  # fmt: skip
    return out_TD, next_TD
