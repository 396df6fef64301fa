"""Full recompute without a cache: the oracle that the engine is held against, and the forward of evaluation.

Rows are packed one after the other; every row starts at position 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import PACKED, Ops


def packed_batch(rows: Sequence[Sequence[int]], device: torch.device) -> ForwardBatch:
    """A batch of whole sequences, for ops that keep no cache; logits are wanted for every token."""
    lengths = [len(row) for row in rows]
    row_starts = [0]
    for length in lengths:
        row_starts.append(row_starts[-1] + length)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    nothing = tensor([])
    return ForwardBatch(
        ids_T=tensor([token for row in rows for token in row]),
        positions_T=tensor([position for length in lengths for position in range(length)]),
        rows_T=tensor([row for row, length in enumerate(lengths) for _ in range(length)]),
        slots_T=nothing,
        starts_S=tensor([0] * len(rows)),
        row_starts_S1=tensor(row_starts),
        block_tables_SN=nothing,
        tail_read_S=nothing,
        tail_write_W=nothing,
        tail_token_W=nothing,
        sample_T=tensor(list(range(row_starts[-1]))),
        row_starts=tuple(row_starts),
        starts=(0,) * len(rows),
        num_positions=max(lengths),
    )


def full_logits(model: Lfm2, rows: Sequence[Sequence[int]], ops: Ops = PACKED) -> list[Tensor]:
    """Logits [length, V] of each row, recomputed from its first token."""
    device = model.model.embed_tokens.weight.device
    batch = packed_batch(rows, device)
    logits = model.head(model(batch, None, ops), ops)
    return list(torch.split(logits, [len(row) for row in rows]))
