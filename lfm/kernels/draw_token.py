"""Draw one token per row: greedy, or by temperature, top_k, top_p, min_p and a race of exponentials.

    z = (x - max x) / temperature
    top_k   the k largest; equal values: lower ids first
    top_p   of those, the shortest prefix in falling order that holds at least top_p of their weight; never empty
    min_p   of those, z >= log(min_p), that is p >= min_p * the largest p
    id      argmax over what is left of exp(z) / E, E from `random_bits` by (seed, position, id): the Gumbel-max trick,
            since -log(E) is a Gumbel number. Equal scores: the more likely id, then the lower one.

Order and meaning are those of transformers' and vLLM's samplers. Temperature 0 is the largest x, lowest id first.
Weights are summed as integers, which no order of summation can change: neither the neighbours in a batch nor the
device's way to sum decides what top_p keeps.

Two ways to draw, chosen per row by its own parameters alone: narrow rows (0 < top_k <= MAX_NARROW_K) look at their
largest few logits, wide rows at all of them. A plain composition of torch operations; the seam for a fused kernel.

R rows, V vocabulary, K candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lfm.kernels.random_bits import exponential
from lfm.kernels.top_k import top_k

MAX_NARROW_K = 1024
# Weights relative to the largest are integers in units of 2^-44: 2^18 of them fit into an int64 sum.
WEIGHT_UNITS = 2.0**44


class DrawParams(NamedTuple):
    """Parameters of each row, all [R, 1]; those of the first kind in the dtype of the logits, but top_p in float64."""

    temperature_R1: Tensor
    min_p_R1: Tensor
    top_p_R1: Tensor
    top_k_R1: Tensor  # int64; 0 is off
    seed_R1: Tensor  # int64
    position_R1: Tensor  # int64, of the token being drawn


class Draws(NamedTuple):
    """The drawn ids [R] and the largest logit of each row [R], which is not finite where no id is worth anything."""

    ids_R: Tensor
    max_R: Tensor


def draw_tokens(x_RV: Tensor, params: DrawParams, *, narrow_k: int, wide: bool, wide_prefix: bool) -> Draws:
    """Draw from logits `x_RV` (float32 or float64), in which -inf excludes an id.

    `narrow_k` is at least the largest top_k of the batch's narrow rows (0: there are none), `wide` whether there are
    wide rows, `wide_prefix` whether any of those has a top_p or a top_k. More of them than needed changes no id.
    """
    if not narrow_k and not wide:  # every row is greedy
        max_R, ids_R = x_RV.max(dim=1)
        return Draws(ids_R, max_R)
    is_random_R = params.temperature_R1[:, 0] > 0
    is_narrow_R = (params.top_k_R1[:, 0] > 0) & (params.top_k_R1[:, 0] <= MAX_NARROW_K)
    # Some value that is not 0 for greedy rows, whose draws are dropped below.
    temperature_R1 = params.temperature_R1.masked_fill(~is_random_R[:, None], 1.0)
    params = params._replace(temperature_R1=temperature_R1)
    if narrow_k:
        top_RK, ids_RK = top_k(x_RV, min(narrow_k, x_RV.shape[1]))
        ids_R, max_R = ids_RK[:, 0], top_RK[:, 0]
        ids_R = torch.where(is_random_R & is_narrow_R, _draw_narrow(top_RK, ids_RK, params), ids_R)
    else:
        max_R, ids_R = x_RV.max(dim=1)
    if wide:
        drawn_R = _draw_wide(x_RV, max_R, params, filter_prefix=wide_prefix)
        ids_R = torch.where(is_random_R & ~is_narrow_R, drawn_R, ids_R)
    return Draws(ids_R, max_R)


def _draw_narrow(top_RK: Tensor, ids_RK: Tensor, params: DrawParams) -> Tensor:
    weights_RK = ((top_RK - top_RK[:, :1]) / params.temperature_R1).exp_()
    keep_RK = _prefix(weights_RK, params) & (weights_RK >= params.min_p_R1)
    winner_R1 = _race(weights_RK, ids_RK, params).masked_fill_(~keep_RK, -1.0).argmax(dim=1, keepdim=True)
    return ids_RK.gather(1, winner_R1)[:, 0]


def _draw_wide(x_RV: Tensor, max_R: Tensor, params: DrawParams, *, filter_prefix: bool) -> Tensor:
    ids_V = torch.arange(x_RV.shape[1], device=x_RV.device)
    z_RV = (x_RV - max_R[:, None]).div_(params.temperature_R1)
    weights_RV = z_RV.exp()
    # A score of 0 never wins: the largest weight is 1, and E is below 23.
    keep_RV = weights_RV >= params.min_p_R1
    if filter_prefix:
        last_z_R1, last_id_R1 = _last_kept(z_RV, params)
        keep_RV &= (z_RV > last_z_R1) | ((z_RV == last_z_R1) & (ids_V <= last_id_R1))
    return _race(weights_RV, ids_V, params).mul_(keep_RV.to(x_RV.dtype)).argmax(dim=1)


def _race(weights: Tensor, ids: Tensor, params: DrawParams) -> Tensor:
    return weights / exponential(params.seed_R1[:, 0], params.position_R1[:, 0], ids, weights.dtype)


def _last_kept(z_RV: Tensor, params: DrawParams) -> tuple[Tensor, Tensor]:
    """Value and id [R, 1] of the last token that top_k and top_p keep."""
    sorted_RV, ids_RV = z_RV.sort(dim=1, descending=True, stable=True)
    last_R1 = _prefix(sorted_RV.exp(), params).sum(dim=1, keepdim=True).sub_(1).clamp_(min=0)
    return sorted_RV.gather(1, last_R1), ids_RV.gather(1, last_R1)


def _prefix(weights_RK: Tensor, params: DrawParams) -> Tensor:
    """Which weights (in falling order, the first is 1) top_k and then top_p keep: the first few, at least one."""
    rank_K = torch.arange(weights_RK.shape[1], device=weights_RK.device)
    keep_RK = (rank_K < params.top_k_R1) | (params.top_k_R1 == 0)
    units_RK = (weights_RK * WEIGHT_UNITS).to(torch.int64).mul_(keep_RK)
    sums_RK = units_RK.cumsum(dim=1)
    wanted_R1 = (sums_RK[:, -1:] * params.top_p_R1).masked_fill_(params.top_p_R1 >= 1, torch.inf)
    return keep_RK & (sums_RK.sub_(units_RK) < wanted_R1)
