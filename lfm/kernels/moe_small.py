"""The experts of a step of 1 to 4 tokens: one program per (token, choice) pair, no sorting, two launches.

    act[p] = w[p] * silu(gate[e] x[t]) * (up[e] x[t]),   p = (t, a),  e = chosen[t, a]
    out[t] = h[t] + sum_a down[e] act[p]                 in the order of choices, so neighbours change nothing

Bytes: the chosen experts' weights, 18.9 MB an expert of the 24B; x and act come from L2. No matrix unit: a warp holds
whole rows of weights, 16 bytes a lane and load, and a window of loads stays in flight. `down` has half of its weights
on the way before `up` has ended (programmatic dependent launch): `chosen` is known by then, only `act` is not. Weights
are the first to leave L2, so that the router, the norms and the hidden states of the next layer stay.
Rounding: act to the activation dtype, with its router weight in it; the rest in fp32. Weights in fp8: half the bytes; a
row's scale multiplies its sum over one expert.
Ids outside 0..E-1 mean "no expert": nothing is read for them, and the row of h comes back as it was.

Legend: T tokens, D hidden, E experts, A experts per token, F expert width, P = T * A pairs, K columns of a load.
"""

import torch
from torch import Tensor

from lfm.kernels.fp8 import FP8
from lfm.kernels.triton_guard import has_dependent_launch, tl, triton
from lfm.kernels.tuned import tuned_for
from lfm.kernels.weights import ExpertScales

MAX_TOKENS = 4  # from here on so many experts are chosen twice that reading each once is worth a sort


@triton.jit
def up_pairs_kernel(
    x_TD, chosen_P, weights_P, gate_up_E2FD, scale_E2F, act_PF,
    E, A: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    ROWS: tl.constexpr, AHEAD: tl.constexpr, LANES: tl.constexpr, HAS_SCALE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (pair, tile of ROWS): act [P, F]. AHEAD steps of LANES columns are on their way while one is used."""
    pair = tl.program_id(0)
    f = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LANES)
    STEPS: tl.constexpr = D // LANES
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(chosen_P + pair).to(tl.int64)
    if (expert >= 0) & (expert < E):
        gate = gate_up_E2FD + expert * (2 * F * D) + f[:, None] * D + k[None, :]
        up = gate + F * D
        x = tl.broadcast_to(x_TD + (pair // A) * D + k[None, :], (ROWS, LANES))  # every warp has all of x
        gates: tl.tuple = ()
        ups: tl.tuple = ()
        for i in tl.static_range(AHEAD):
            gates += (tl.load(gate + i * LANES, eviction_policy="evict_first"),)
            ups += (tl.load(up + i * LANES, eviction_policy="evict_first"),)
        weight = tl.load(weights_P + pair)
        gate_sum = tl.zeros((ROWS, LANES), tl.float32)
        up_sum = tl.zeros((ROWS, LANES), tl.float32)
        for i in tl.static_range(STEPS):
            x_FK = tl.load(x + i * LANES).to(tl.float32)
            gate_sum += gates[i].to(tl.float32) * x_FK
            up_sum += ups[i].to(tl.float32) * x_FK
            if i + AHEAD < STEPS:
                gates += (tl.load(gate + (i + AHEAD) * LANES, eviction_policy="evict_first"),)
                ups += (tl.load(up + (i + AHEAD) * LANES, eviction_policy="evict_first"),)
        gate_F, up_F = tl.sum(gate_sum, 1), tl.sum(up_sum, 1)
        if HAS_SCALE:
            gate_F *= tl.load(scale_E2F + expert * (2 * F) + f)
            up_F *= tl.load(scale_E2F + expert * (2 * F) + F + f)
        act_F = gate_F / (1 + tl.exp(-gate_F)) * up_F * weight
        tl.store(act_PF + pair * F + f, act_F.to(act_PF.dtype.element_ty))


@triton.jit
def down_tokens_kernel(
    h_TD, chosen_TA, act_PF, down_EDF, scale_ED, out_TD,
    E, A: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    ROWS: tl.constexpr, AHEAD: tl.constexpr, LANES: tl.constexpr, HAS_SCALE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (token, tile of ROWS): out[t, d] = h[t, d] + sum over a, then f, of down[e, d, f] * act[p, f].

    `chosen` and `h` are read before the wait: `up` starts this launch only after its own wait for whoever wrote them.
    """
    STEPS: tl.constexpr = F // LANES
    token = tl.program_id(0)
    d = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, LANES)
    weight = down_EDF + d[:, None] * F + k[None, :]
    act = tl.broadcast_to(act_PF + token * A * F + k[None, :], (ROWS, LANES))
    h_D = tl.load(h_TD + token * D + d).to(tl.float32)
    experts: tl.tuple = ()
    for a in tl.static_range(A):
        experts += (tl.load(chosen_TA + token * A + a, cache_modifier=".cg").to(tl.int64),)
    blocks: tl.tuple = ()
    for i in tl.static_range(AHEAD):
        expert = experts[i // STEPS]
        is_expert = (expert >= 0) & (expert < E)
        offset = expert * (D * F) + (i % STEPS) * LANES
        blocks += (tl.load(weight + offset, mask=is_expert, other=0.0, eviction_policy="evict_first"),)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sum_DK = tl.zeros((ROWS, LANES), tl.float32)
    part_DK = tl.zeros((ROWS, LANES), tl.float32)  # with scales: of one expert
    for i in tl.static_range(A * STEPS):
        expert = experts[i // STEPS]
        is_expert = (expert >= 0) & (expert < E)
        if i < AHEAD:
            block = blocks[i]
        else:
            offset = expert * (D * F) + (i % STEPS) * LANES
            block = tl.load(weight + offset, mask=is_expert, other=0.0, eviction_policy="evict_first")
        act_DK = tl.load(act + i * LANES, mask=is_expert, other=0.0)
        if HAS_SCALE:
            part_DK += block.to(tl.float32) * act_DK.to(tl.float32)
            if i % STEPS == STEPS - 1:
                sum_DK += part_DK * tl.load(scale_ED + expert * D + d, mask=is_expert, other=0.0)[:, None]
                part_DK = tl.zeros((ROWS, LANES), tl.float32)
        else:
            sum_DK += block.to(tl.float32) * act_DK.to(tl.float32)
    tl.store(out_TD + token * D + d, (h_D + tl.sum(sum_DK, 1)).to(out_TD.dtype.element_ty))


def experts_small(
    h_TD: Tensor,
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    scales: ExpertScales | None = None,
) -> Tensor:
    """As `experts_ref`, for contiguous tensors with D and F multiples of 64."""
    num_experts, hidden, width = down_EDF.shape
    num_tokens, num_chosen = chosen_TA.shape
    act_PF = x_TD.new_empty(num_tokens * num_chosen, width)
    out_TD = torch.empty_like(h_TD)
    is_dependent = has_dependent_launch(x_TD.device)
    tiles = tuned_for(x_TD.device).pairs["fp8" if gate_up_E2FD.dtype == FP8 else "bf16"]
    gate_up_scale, down_scale = scales or (weights_TA, weights_TA)
    sizes = {
        "E": num_experts, "A": num_chosen, "D": hidden, "F": width,
        "HAS_SCALE": scales is not None, "DEPENDENT": is_dependent,
    }  # fmt: skip
    tile, lanes = tiles.up, largest_divisor(hidden, 256)
    up_pairs_kernel[(num_tokens * num_chosen, width // tile.rows)](
        x_TD, chosen_TA, weights_TA, gate_up_E2FD, gate_up_scale, act_PF,
        **sizes, ROWS=tile.rows, AHEAD=min(tile.ahead, hidden // lanes), LANES=lanes,
        num_warps=tile.warps, launch_pdl=is_dependent,
    )  # fmt: skip
    tile, lanes = tiles.down_one if num_tokens == 1 else tiles.down, largest_divisor(width, 256)
    down_tokens_kernel[(num_tokens, hidden // tile.rows)](
        h_TD, chosen_TA, act_PF, down_EDF, down_scale, out_TD,
        **sizes, ROWS=tile.rows, AHEAD=min(tile.ahead, num_chosen * width // lanes), LANES=lanes,
        num_warps=tile.warps, launch_pdl=is_dependent,
    )  # fmt: skip
    return out_TD


def largest_divisor(size: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `size`."""
    return min(size & -size, limit)
