"""The sampler as loops over Python numbers, one row at a time: the oracle of the tests. Shares no code with lfm."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from lfm.protocol import SamplingParams

MASK = 2**64 - 1


class Naive(NamedTuple):
    """The id (-1: failed), the ids that the filters kept, and how far the closest decision was from going the other
    way: exact ties have a rule and do not count."""

    id: int
    kept: list[int]
    margin: float


def splitmix64(state: int) -> int:
    """Output function of Vigna's splitmix64.c."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def bits(seed: int, position: int, token: int) -> int:
    state = seed & MASK
    for index in (0, position, token):
        state = splitmix64(state + (index + 1) * 0x9E3779B97F4A7C15)
    return state >> 32


def adjusted(
    logits: Sequence[float], params: SamplingParams, ids: Sequence[int], num_prompt: int, num_ids: int
) -> list[float]:
    x = [value if i < num_ids else -math.inf for i, value in enumerate(logits)]
    for i, bias in params.logit_bias.items():
        x[i] += bias
    for i in set(ids):
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    outputs = list(ids[num_prompt:])
    for i in set(outputs):
        x[i] = x[i] - outputs.count(i) * params.frequency_penalty - params.presence_penalty
    if len(outputs) < params.min_tokens:
        masked = [-math.inf if i in params.stop_token_ids else value for i, value in enumerate(x)]
        x = masked if max(masked) > -math.inf else x
    return x


def naive_sample(
    logits: Sequence[float],
    params: SamplingParams,
    *,
    seed: int,
    ids: Sequence[int],
    num_prompt: int,
    num_ids: int,
) -> Naive:
    if any(math.isnan(value) or value == math.inf for value in logits[:num_ids]):
        return Naive(-1, [], math.inf)
    x = adjusted(logits, params, ids, num_prompt, num_ids)
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    top = x[order[0]]
    if top == -math.inf:
        return Naive(-1, [], math.inf)
    if params.temperature == 0:
        return Naive(order[0], [order[0]], gap(x, order, 1))
    margins = []
    if 0 < params.top_k < len(x):
        margins.append(gap(x, order, params.top_k))
        order = order[: params.top_k]
    weight = {i: math.exp((x[i] - top) / params.temperature) for i in order}
    if params.top_p < 1:
        wanted = params.top_p * math.fsum(weight.values())
        kept, held = [], 0.0
        for i in order:
            if kept and held >= wanted:
                break
            kept.append(i)
            held += weight[i]
            margins.append(abs(held - wanted) / wanted)
        order = kept
    if params.min_p > 0:
        margins += [abs(weight[i] - params.min_p) for i in order if weight[i] < 1]
        order = [i for i in order if weight[i] >= params.min_p]
    position = len(ids)
    score = {i: weight[i] / -math.log1p(-(bits(seed, position, i) + 0.5) * 2.0**-32) for i in order}
    ranked = sorted(order, key=lambda i: (-score[i], i))
    if len(ranked) > 1:
        margins.append((score[ranked[0]] - score[ranked[1]]) / score[ranked[0]])
    return Naive(ranked[0], order, min(margins, default=math.inf))


def gap(x: Sequence[float], order: Sequence[int], k: int) -> float:
    """Distance between the k-th value and the next; infinite for an exact tie, which the order of ids settles."""
    if k >= len(order) or x[order[k - 1]] == x[order[k]]:
        return math.inf
    return x[order[k - 1]] - x[order[k]]
