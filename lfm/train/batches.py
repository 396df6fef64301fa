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
    """A packed batch. A token that predicts nothing is not in `predicting_R`; padding in there is T, with NO_TARGET."""

    forward: ForwardBatch
    predicting_R: Tensor  # int64, the tokens whose successors are to be predicted
    targets_R: Tensor  # int64, those successors
    num_tokens: int  # without padding
    num_targets: int


@dataclass(frozen=True, slots=True)
class BatchSize:
    """One size for all batches, so that their work can be recorded once: fewer tokens or rows are filled up.

    `positions` bounds the length of a row; the number of predictions is rounded up to a multiple of `predictions`.
    """

    tokens: int
    rows: int
    positions: int
    predictions: int


def collate(rows: Sequence[Row], *, size: BatchSize | None = None) -> TrainBatch:
    """Pack rows of at least two ids each, in order, into one batch on the CPU."""
    ids, is_target = (np.concatenate(parts) for parts in zip(*((r.ids, r.is_target) for r in rows), strict=True))
    return collate_ids(ids.astype(np.int64), is_target, [len(row.ids) for row in rows], size=size)


def collate_ids(
    ids: np.ndarray, is_target: np.ndarray, id_counts: Sequence[int], *, size: BatchSize | None
) -> TrainBatch:
    """The same for rows one after the other in `ids`, `id_counts` ids each. No loop over rows: a step has hundreds."""
    num_rows = len(id_counts)
    assert min(id_counts, default=0) >= 2, "there are no rows, or one without an input and a target"
    ends = np.cumsum(id_counts)
    is_input, is_successor = np.ones(len(ids), bool), np.ones(len(ids), bool)
    is_input[ends - 1] = False
    is_successor[ends[:-1]] = False
    is_successor[0] = False
    successors, predicting = ids[is_successor], np.flatnonzero(is_target[is_successor])
    ids, lengths = ids[is_input], np.asarray(id_counts) - 1
    num_tokens, num_targets, targets = len(ids), len(predicting), successors[predicting]
    if size is not None:
        padding = _padding(size.tokens - num_tokens, size.positions)
        ids, lengths = np.pad(ids, (0, size.tokens - num_tokens)), np.concatenate((lengths, padding))
    row_starts = np.concatenate(([0], np.cumsum(lengths)))
    rows_T = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(row_starts[-1]) - row_starts[rows_T]
    starts = row_starts
    if size is not None:
        assert len(lengths) <= size.rows, f"{len(lengths)} rows do not fit into {size.rows}"
        starts = np.pad(row_starts, (0, size.rows - len(lengths)), mode="edge")  # rows of no tokens
        rest = -num_targets % size.predictions
        predicting = np.pad(predicting, (0, rest), constant_values=len(ids))
        targets = np.pad(targets, (0, rest), constant_values=NO_TARGET)
    nothing = torch.empty(0, dtype=torch.int64)
    forward = ForwardBatch(
        ids_T=torch.from_numpy(ids),
        positions_T=torch.from_numpy(positions),
        rows_T=torch.from_numpy(rows_T),
        slots_T=nothing,
        starts_S=torch.zeros(num_rows, dtype=torch.int64),
        row_starts_S1=torch.from_numpy(starts),
        block_tables_SN=nothing,
        tail_read_S=nothing,
        tail_write_W=nothing,
        tail_token_W=nothing,
        sample_T=nothing,
        row_starts=tuple(row_starts.tolist()),
        starts=(0,) * len(lengths),
        num_positions=int(lengths.max()) if size is None else size.positions,
    )
    return TrainBatch(forward, torch.from_numpy(predicting), torch.from_numpy(targets), num_tokens, num_targets)


def _padding(num_tokens: int, longest: int) -> np.ndarray:
    """Lengths of rows of `num_tokens` inputs in all."""
    return np.asarray([min(longest, num_tokens - begin) for begin in range(0, num_tokens, longest)], np.int64)


def tensors_of(batch: TrainBatch) -> tuple[Tensor, ...]:
    """What of a batch its work depends on; `with_tensors` puts it back."""
    forward = batch.forward
    return forward.ids_T, forward.positions_T, forward.row_starts_S1, batch.predicting_R, batch.targets_R


def with_tensors(batch: TrainBatch, tensors: Sequence[Tensor]) -> TrainBatch:
    ids_T, positions_T, row_starts_S1, predicting_R, targets_R = tensors
    forward = replace(batch.forward, ids_T=ids_T, positions_T=positions_T, row_starts_S1=row_starts_S1)
    return replace(batch, forward=forward, predicting_R=predicting_R, targets_R=targets_R)


def to_device(batch: TrainBatch, device: torch.device) -> TrainBatch:
    """The same batch with its tensors on `device`; the copies need not have arrived yet."""

    return with_tensors(batch, [tensor.to(device, non_blocking=True) for tensor in tensors_of(batch)])


def pinned(batch: TrainBatch) -> TrainBatch:
    """The same batch in memory that a GPU can read by itself."""
    return with_tensors(batch, [tensor.pin_memory() for tensor in tensors_of(batch)])
