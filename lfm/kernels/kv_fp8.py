"""K and V in fp8: e4m3 with a power of two per token and head, in the layout of kv_layout.py, in plain torch.

    e = ceil(log2(max |k| / 448)) + 127;   k8 = e4m3(k 2^(127 - e));   k is then k8 2^(e - 127), exact in bf16

Legend: T tokens, G kv heads, K head dim, N blocks, B block size, R rows of a block.
"""

import torch
from torch import Tensor

from lfm.kernels import kv_layout
from lfm.kernels.fp8 import FP8, FP8_MAX
from lfm.kernels.kv_layout import EXPONENT_BIAS, MIN_EXPONENT
from lfm.kernels.triton_guard import tl, triton


def block_size_of(k_NGRK: Tensor) -> int:
    """Tokens per block of a layer's K or V."""
    rows, head_dim = k_NGRK.shape[2:]
    return kv_layout.num_tokens(rows, head_dim, is_fp8=k_NGRK.dtype == FP8)


def as_bytes(k_NGRK: Tensor) -> Tensor:
    """The same memory as bytes, for kernels that read scales; K itself where it is not in fp8."""
    return k_NGRK.view(torch.uint8) if k_NGRK.dtype == FP8 else k_NGRK


def quantise_kv(k_TGK: Tensor) -> tuple[Tensor, Tensor]:
    """Values in fp8 [..., K] and the bytes of their scales [...]."""
    wide = k_TGK.float()
    bits = (wide.abs().amax(-1) / FP8_MAX).view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) > 0).int()
    exponent = exponent.clamp(MIN_EXPONENT, 254)
    inverse = ((254 - exponent) << 23).view(torch.float32)
    return (wide * inverse[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), exponent.to(torch.uint8)


def dequantise_kv(values: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise_kv` made, in another dtype."""
    return values.to(dtype) * torch.exp2(exponent.to(dtype) - EXPONENT_BIAS)[..., None]


def write_rows(k_TGK: Tensor, blocks_T: Tensor, offsets_T: Tensor, k_NGRK: Tensor) -> None:
    """Store K or V of tokens in their blocks."""
    if k_NGRK.dtype != FP8:
        k_NGRK[blocks_T, :, offsets_T] = k_TGK.to(k_NGRK.dtype)
        return
    values, exponent = quantise_kv(k_TGK)
    bytes_NGRK, block_size = as_bytes(k_NGRK), block_size_of(k_NGRK)
    bytes_NGRK[blocks_T, :, offsets_T] = values.view(torch.uint8)
    bytes_NGRK.flatten(2)[blocks_T, :, block_size * k_NGRK.shape[3] + offsets_T] = exponent


def read_blocks(k_NGRK: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """K or V [..., G, B, K] of blocks [...]; garbage, NaN even, where nothing was written."""
    if k_NGRK.dtype != FP8:
        return k_NGRK[blocks]
    block_size, head_dim = block_size_of(k_NGRK), k_NGRK.shape[3]
    read = as_bytes(k_NGRK)[blocks]
    exponent = read.flatten(-2)[..., block_size * head_dim : block_size * (head_dim + 1)]
    return dequantise_kv(read[..., :block_size, :].contiguous().view(FP8), exponent, dtype)


@triton.jit
def scale_bytes(largest, MAX: tl.constexpr, LEAST: tl.constexpr):
    """The bytes of the scales of vectors whose largest magnitudes these are, and the scales' inverses."""
    bits = (largest / MAX).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) > 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, LEAST), 254)
    return exponent.to(tl.uint8), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(exponent):
    """2^(byte - 127)."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
