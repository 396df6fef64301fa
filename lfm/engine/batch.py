"""From what the scheduler chose to what the model reads: tensors in buffers whose addresses never change.

Legend: T tokens, S rows of the batch, N blocks of a row, W tail writes. "Device row" is a sequence's row for life.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lfm.engine.block_tables import BlockTables
from lfm.engine.sampling_rows import RowStart
from lfm.engine.sequence import Sequence
from lfm.engine.step import ScheduledBatch, ScheduledRow
from lfm.kernels.forward_batch import SCRATCH_BLOCK, ForwardBatch

Ints = NDArray[np.int64]
UNKNOWN_ID = -1  # the id is on the device only: the row's last sample


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """A forward's inputs, and what sampling needs beside the logits."""

    forward: ForwardBatch
    sampled_S: tuple[int, ...]  # indices into S of the rows that sample, in order
    sampled_rows_R: Tensor  # int64, their device rows
    sampled_positions_R: Tensor  # int64, positions of the ids to be sampled


class Buffer:
    """One static device tensor and its staging memory on the host, two of them in turn.

    A staging buffer is written again two steps later, when the step that copied from it has been read back.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._staging = [torch.zeros(size, dtype=torch.int64, pin_memory=is_cuda) for _ in range(2)]
        self._views = [staging.numpy() for staging in self._staging]
        self._device = torch.zeros(size, dtype=torch.int64, device=device) if is_cuda else None
        self._turn = 0

    def upload(self, values: Ints | list[int]) -> Tensor:
        """Copy `values` into the buffer; the result is the buffer's front. Never waits for the device."""
        self._turn ^= 1
        staging, size = self._staging[self._turn], len(values)
        self._views[self._turn][:size] = values
        if self._device is None:
            return staging[:size]
        return self._device[:size].copy_(staging[:size], non_blocking=True)


class BatchBuilder:
    """Builds the tensors of steps of any shape."""

    def __init__(
        self, *, max_running: int, step_tokens: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.tables = BlockTables(max_running=max_running, max_blocks=-(-max_model_len // block_size), device=device)
        max_tokens = max(step_tokens, max_running)
        max_writes = max_tokens // block_size + 2 * max_running

        def buffer(size: int) -> Buffer:
            return Buffer(size, device)

        self._ids, self._positions = buffer(max_tokens), buffer(max_tokens)
        self._rows_of_tokens, self._slots = buffer(max_tokens), buffer(max_tokens)
        self._starts, self._device_rows, self._tail_reads = (buffer(max_running) for _ in range(3))
        self._row_starts = buffer(max_running + 1)
        self._tail_blocks, self._tail_tokens = buffer(max_writes), buffer(max_writes)
        self._sample_tokens, self._sample_rows, self._sample_positions = (buffer(max_running) for _ in range(3))

    def build(self, batch: ScheduledBatch, last_ids_R: Tensor) -> StepTensors:
        """Upload one step whose tables were extended. `last_ids_R`: the last sampled id of every device row."""
        rows = batch.rows
        sizes = [row.end - row.start for row in rows]
        starts = [row.start for row in rows]
        device_rows = [row.sequence.row for row in rows]
        row_starts = np.concatenate(([0], np.cumsum(sizes)))
        rows_of_tokens = np.repeat(np.arange(len(rows)), sizes)
        positions = np.arange(row_starts[-1]) - np.repeat(row_starts[:-1] - starts, sizes)
        num_blocks = max(len(row.sequence.block_table) for row in rows)
        tables_SN = self.tables.host[device_rows, :num_blocks]
        blocks = tables_SN[rows_of_tokens, positions // self.block_size]
        tail_tokens = self._tail_tokens_of(positions, row_starts)
        sampled = [index for index, row in enumerate(rows) if row.samples]

        rows_T = self._rows_of_tokens.upload(rows_of_tokens)
        device_rows_S = self._device_rows.upload(device_rows)
        known_T = self._ids.upload(known_ids(rows))
        forward = ForwardBatch(
            ids_T=torch.where(known_T == UNKNOWN_ID, last_ids_R[device_rows_S][rows_T], known_T),
            positions_T=self._positions.upload(positions),
            rows_T=rows_T,
            slots_T=self._slots.upload(blocks * self.block_size + positions % self.block_size),
            starts_S=self._starts.upload(starts),
            row_starts_S1=self._row_starts.upload(row_starts),
            block_tables_SN=self.tables.device[device_rows_S, :num_blocks],
            tail_read_S=self._tail_reads.upload(self._tail_reads_of(tables_SN, starts)),
            tail_write_W=self._tail_blocks.upload(blocks[tail_tokens]),
            tail_token_W=self._tail_tokens.upload(tail_tokens),
            sample_T=self._sample_tokens.upload(row_starts[1:][sampled] - 1),
            row_starts=tuple(row_starts.tolist()),
            starts=tuple(starts),
            num_positions=self.max_model_len,
        )
        return StepTensors(
            forward=forward,
            sampled_S=tuple(sampled),
            sampled_rows_R=self._sample_rows.upload([device_rows[index] for index in sampled]),
            sampled_positions_R=self._sample_positions.upload([rows[index].end for index in sampled]),
        )

    def _tail_tokens_of(self, positions: Ints, row_starts: Ints) -> Ints:
        """Indices into T of the last token that a row computes in each block it touches."""
        is_last = (positions + 1) % self.block_size == 0
        is_last[row_starts[1:] - 1] = True
        return np.flatnonzero(is_last)

    def _tail_reads_of(self, tables_SN: Ints, starts: list[int]) -> Ints:
        """The block of position start - 1 of each row; the scratch block where a row starts at 0."""
        before = np.array(starts) - 1
        blocks = tables_SN[np.arange(len(starts)), np.maximum(before, 0) // self.block_size]
        return np.where(before >= 0, blocks, SCRATCH_BLOCK)


def known_ids(rows: list[ScheduledRow]) -> list[int]:
    """Input ids of the step; UNKNOWN_ID where the host has not read the sample yet."""
    ids: list[int] = []
    for row in rows:
        known = row.sequence.ids
        if row.end <= len(known):
            ids += known[row.start : row.end]
        else:
            ids += [*known[row.start :], UNKNOWN_ID]
    return ids


def row_start(sequence: Sequence) -> RowStart:
    """What the sampler needs to know of a sequence that begins or resumes."""
    request = sequence.request
    assert request.sampling.seed is not None, "the engine draws a seed at admission"
    return RowStart(
        row=sequence.row,
        params=request.sampling,
        seed=request.sampling.seed,
        ids=sequence.ids,
        num_prompt=sequence.num_prompt,
        mask_padded_ids=request.mask_padded_ids,
    )
