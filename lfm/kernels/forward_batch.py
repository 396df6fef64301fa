"""What one forward needs besides weights: tensors only, all of them in buffers whose addresses never change.

Legend: T tokens of the step, S rows (one per scheduled sequence), W tail writes, R rows that need a token,
        N blocks, B block size, L conv window, D hidden, G kv heads, K head dim.

The cache has one index space (design section 4): block b holds the K and V of its tokens and a conv tail, the last
L-1 columns of u after the last token written to it. Block 0 is the scratch block: padding and absent reads name it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lfm.config import ModelConfig
from lfm.kernels.fp8 import FP8
from lfm.kernels.kv_layout import num_rows

SCRATCH_BLOCK = 0


class SharedPrefix(NamedTuple):
    """Which rows of a single token share leading blocks, and are to be attended together over those.

    A tile names up to 16 rows, -1 where there are fewer (the first is a row, unless the tile is empty), and all of them
    have the same count of shared blocks, all whole and before the row's position. Each row is in one tile at most.
    """

    blocks_S: Tensor  # int64, shared leading blocks of the row: 0 where it is in no tile
    tiles_YX: Tensor  # int64 [tiles, 16]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One step's tokens, packed row after row. Row r owns tokens [row_starts[r], row_starts[r + 1]).

    The tuples are the host's copies of what it scheduled, so that plain torch can loop over rows without a device sync.
    """

    ids_T: Tensor  # int64
    positions_T: Tensor  # int64, position in the sequence
    rows_T: Tensor  # int64, row of the token
    slots_T: Tensor  # int64, block * B + offset: where the token's K and V go
    starts_S: Tensor  # int64, first position of the row's chunk
    row_starts_S1: Tensor  # int64 [S + 1], `row_starts` on the device
    block_tables_SN: Tensor  # int64, blocks of the row in order, padded with the scratch block
    tail_read_S: Tensor  # int64, block of position start - 1 (scratch where start is 0)
    tail_write_W: Tensor  # int64, block whose tail is written
    tail_token_W: Tensor  # int64, index into T of the last token that this tail covers
    sample_T: Tensor  # int64 [R], index into T of the tokens whose logits are wanted
    row_starts: tuple[int, ...]  # S + 1 entries
    starts: tuple[int, ...]  # S entries

    num_positions: int  # an upper bound of every position + 1
    is_real_T: Tensor | None = None  # int64, 0 for padding tokens; None where there are none
    shared: SharedPrefix | None = None

    @property
    def num_rows(self) -> int:
        return len(self.starts)


@dataclass(frozen=True, slots=True)
class CacheTensors:
    """The pool: one block id indexes every tensor of it."""

    k: list[Tensor]  # per attention layer [N, G, B, K]; in fp8 [N, G, R, K] with more rows, see kv_layout.py
    v: list[Tensor]  # per attention layer, as k
    tails: list[Tensor]  # per conv layer [N, L - 1, D]
    block_size: int

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> "CacheTensors":
        """Reserve the pool, uninitialised: nothing may depend on what a fresh block contains.

        K and V get `kv_dtype`, or `dtype` like all else.
        """
        kv_dtype = kv_dtype or dtype
        rows = num_rows(block_size, config.head_dim, is_fp8=kv_dtype == FP8)
        kv_shape = (num_blocks, config.num_key_value_heads, rows, config.head_dim)
        tail_shape = (num_blocks, config.conv_L_cache - 1, config.hidden_size)

        def empty(shape: tuple[int, ...], dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        num_attention, num_conv = len(config.attention_layers), len(config.conv_layers)
        return cls(
            k=[empty(kv_shape, kv_dtype) for _ in range(num_attention)],
            v=[empty(kv_shape, kv_dtype) for _ in range(num_attention)],
            tails=[empty(tail_shape) for _ in range(num_conv)],
            block_size=block_size,
        )

    def fill(self, value: float) -> None:
        """Overwrite the whole pool (tests fill it with NaN)."""
        for tensor in (*self.k, *self.v, *self.tails):
            tensor.fill_(value)
