"""Rows of token ids, packed one after the other, as a training batch.

A row is one document or conversation: the short convolution and attention start afresh at its first token. Its last id
is never an input, its first never a target.
Legend: T tokens, S rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch
from lfm.train.dataset import Row

NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A packed batch. `targets_T` is NO_TARGET where a token's successor is not to be predicted."""

    forward: ForwardBatch
    targets_T: Tensor  # int64
    num_targets: int

    @property
    def num_tokens(self) -> int:
        return self.forward.row_starts[-1]


def collate(rows: Sequence[Row]) -> TrainBatch:
    """Pack rows of at least two ids each, in order, into one batch on the CPU."""
    lengths = [len(row.ids) - 1 for row in rows]
    assert min(lengths, default=0) >= 1, "there are no rows, or one without an input and a target"
    row_starts = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.concatenate([row.ids[:-1] for row in rows]).astype(np.int64)
    targets = np.concatenate(
        [np.where(row.is_target[1:], row.ids[1:].astype(np.int64), NO_TARGET) for row in rows]
    ).astype(np.int64)
    rows_T = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(row_starts[-1]) - row_starts[rows_T]
    nothing = torch.empty(0, dtype=torch.int64)
    forward = ForwardBatch(
        ids_T=torch.from_numpy(ids),
        positions_T=torch.from_numpy(positions),
        rows_T=torch.from_numpy(rows_T),
        slots_T=nothing,
        starts_S=torch.zeros(len(rows), dtype=torch.int64),
        row_starts_S1=torch.from_numpy(row_starts),
        block_tables_SN=nothing,
        tail_read_S=nothing,
        tail_write_W=nothing,
        tail_token_W=nothing,
        sample_T=nothing,
        row_starts=tuple(row_starts.tolist()),
        starts=(0,) * len(rows),
        num_positions=max(lengths),
    )
    return TrainBatch(forward, torch.from_numpy(targets), int((targets != NO_TARGET).sum()))


def to_device(batch: TrainBatch, device: torch.device) -> TrainBatch:
    """The same batch with its tensors on `device`; the copies need not have arrived yet."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    forward = replace(
        batch.forward,
        ids_T=move(batch.forward.ids_T),
        positions_T=move(batch.forward.positions_T),
        rows_T=move(batch.forward.rows_T),
        starts_S=move(batch.forward.starts_S),
        row_starts_S1=move(batch.forward.row_starts_S1),
    )
    return replace(batch, forward=forward, targets_T=move(batch.targets_T))
