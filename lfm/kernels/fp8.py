"""Numbers of 8 bits, e4m3: 4 bits of exponent, 3 of mantissa, up to 448, and the scales that go with them.

Weights: one scale in fp32 per output row, the largest magnitude of the row over 448. A product's scale is then one
factor per output, applied once to a sum that is made of exact bf16 values: e4m3 is a subset of bf16.
Activations, where both operands are in fp8: the same per token. K and V: kv_fp8.py.
Within 2^-6 .. 448 of its scale a value is off by 2^-4 of itself at most; below, by 2^-10 of the scale.
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def quantise_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [..., in] of any float dtype as e4m3 with a scale per row [...] in fp32. A row of zeros has scale 1."""
    wide = values.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale[..., 0]
