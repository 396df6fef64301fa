"""Random bits without state: a number for every (seed, position, token id), whoever else is in the batch.

The generator is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014; the
constants are Stafford's variant 13, as in Vigna's splitmix64.c). Its i-th output is a pure function of its start, so
streams nest: stream(seed)[0] starts the positions, stream(..)[position] the ids, and stream(..)[id] is the number.

Int64 arithmetic wraps, and a shift to the right keeps the sign: the masks make it logical. Only integers are involved
until `uniform`, and that one rounds as IEEE says: a CPU and a GPU make the same bits and the same uniforms.

R rows, N ids per row.
"""

import torch
from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def stream_at(start: Tensor, index: Tensor) -> Tensor:
    """Output number `index` (from 0) of the SplitMix64 stream that begins at `start`; int64, broadcast together."""
    z = start + (index + 1) * GOLDEN_GAMMA
    z ^= (z >> 30).bitwise_and_(2**34 - 1)
    z *= MIX_1
    z ^= (z >> 27).bitwise_and_(2**37 - 1)
    z *= MIX_2
    z ^= (z >> 31).bitwise_and_(2**33 - 1)
    return z


def random_bits(seed_R: Tensor, position_R: Tensor, ids: Tensor) -> Tensor:
    """32 random bits [R, N] (int64 in 0 .. 2^32 - 1) for `ids`: [R, N], or [N] for the same ids in every row."""
    positions_R = stream_at(seed_R, torch.zeros_like(seed_R))
    start_R = stream_at(positions_R, position_R)
    return (stream_at(start_R[:, None], ids) >> 32).bitwise_and_(2**32 - 1)


def uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The middle of one of 2^32 equal parts of (0, 1), rounded to `dtype` and kept below 1."""
    return bits.to(dtype).mul_(2.0**-32).add_(2.0**-33).clamp_(max=1 - torch.finfo(dtype).eps / 2)


def exponential(seed_R: Tensor, position_R: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard exponential numbers [R, N], finest near 0, where a race is won."""
    return uniform(random_bits(seed_R, position_R, ids), dtype).neg_().log1p_().neg_()
