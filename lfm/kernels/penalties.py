"""Penalties on tokens that a sequence has seen: a bitmap of all its ids, and counts of its output ids.

The bitmap holds bit id % 8 of byte id // 8: 8 KB a row at 65,536 ids. Cost per step is O(V), whatever the length.

R rows, V vocabulary, B bytes = ceil(V / 8).
"""

import numpy as np
import torch
from torch import Tensor


def pack_bits(is_set_RV: Tensor) -> Tensor:
    """Bitmap [R, B] uint8 of booleans [R, V] in host memory."""
    return torch.from_numpy(np.packbits(is_set_RV.numpy(), axis=1, bitorder="little"))


def bits_of_bytes(device: torch.device) -> Tensor:
    """For each of the 256 bytes its 8 bits as 8 bytes, in one int64 [256]: the table of `unpack_bits`."""
    is_set = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return is_set.to(torch.uint8).view(torch.int64).flatten()


def unpack_bits(bitmap_RB: Tensor, table: Tensor, size: int) -> Tensor:
    """0 or 1 as uint8 [R, size] of a bitmap, through the table of `bits_of_bytes`."""
    return table[bitmap_RB.to(torch.int32)].view(torch.uint8)[:, :size]


def repetition_penalty(x_RV: Tensor, seen_RV: Tensor, penalty_R1: Tensor) -> Tensor:
    """Where seen: positive logits divided by the penalty, others multiplied (transformers, vLLM; CTRL, 1909.05858).

    Written with clamps because torch.where costs 3 ns an element on a CPU: 0.41 ms a row at V = 65,536 against 0.08.
    Every value is the exact quotient or product, plus 0.
    """
    seen_RV = seen_RV.to(x_RV.dtype)
    factor_RV = (seen_RV * penalty_R1).add_(1 - seen_RV)
    return (x_RV.clamp(min=0) / factor_RV).add_(x_RV.clamp(max=0).mul_(factor_RV))


def count_penalties(x_RV: Tensor, counts_RV: Tensor, presence_R1: Tensor, frequency_R1: Tensor) -> Tensor:
    """Minus `frequency` for every time that an id was put out, and `presence` once if it was (OpenAI)."""
    counts_RV = counts_RV.to(x_RV.dtype)
    return (x_RV - counts_RV * frequency_R1).sub_(counts_RV.clamp_(max=1).mul_(presence_R1))
