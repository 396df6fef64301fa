"""From what the scheduler chose to what the model reads: all inputs of a step in one buffer, uploaded by one copy.

Legend: T tokens, S rows of the batch, N blocks of a row, W tail writes. "Device row" is a sequence's row for life.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

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

ALIGNED_INTS = 2  # int64 in 16 bytes
MAX_PADDING = 512  # tokens that a graph's room may be larger than the step

TOKEN_FIELDS = ("ids", "positions", "rows", "slots", "is_real")
ROW_FIELDS = ("starts", "device_rows", "tail_reads", "sample_tokens", "sample_rows", "sample_positions")
WRITE_FIELDS = ("tail_blocks", "tail_tokens")


class Sizes(NamedTuple):
    """What a step's inputs have room for."""

    tokens: int
    rows: int
    writes: int

    @property
    def num_ints(self) -> int:
        ends: list[int] = [where.stop for where in self.slices().values()]
        return max(ends)

    def slices(self) -> Mapping[str, slice]:
        """Where each field lies in a buffer of `num_ints`; `row_starts` has one entry more than rows.

        Fields begin at multiples of 16 bytes, whatever the sizes: kernels are compiled for pointers that do, and again
        for those that do not.
        """
        return _slices_of(self)


@lru_cache(maxsize=256)  # 10 us, twice a step
def _slices_of(sizes: Sizes) -> Mapping[str, slice]:
    widths = [(name, sizes.tokens) for name in TOKEN_FIELDS] + [(name, sizes.rows) for name in ROW_FIELDS]
    widths += [(name, sizes.writes) for name in WRITE_FIELDS] + [("row_starts", sizes.rows + 1)]
    found, begin = {}, 0
    for name, width in widths:
        found[name] = slice(begin, begin + width)
        begin += width + width % ALIGNED_INTS
    return MappingProxyType(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """A forward's inputs, and what sampling needs beside the logits.

    `forward` is None where the inputs went into a graph's own buffer.
    """

    forward: ForwardBatch | None
    row_starts: tuple[int, ...]  # S + 1 entries
    sampled_S: tuple[int, ...]  # indices into S of the rows that sample, in order
    sample_T: Tensor  # int64 [R], indices into T of their last tokens
    sampled_rows_R: Tensor  # int64, their device rows
    sampled_positions_R: Tensor  # int64, positions of the ids to be sampled


class Upload:
    """Staging memory on the host, two buffers in turn, and the device tensor that steps without a graph read.

    A staging buffer is written again two steps later, when the step that copied from it has been read back.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        is_cuda, is_host = device.type == "cuda", device.type == "cpu"
        self._staging = [torch.zeros(size, dtype=torch.int64, pin_memory=is_cuda) for _ in range(2)]
        self._views = [staging.numpy() for staging in self._staging]
        self._device = None if is_host else torch.zeros(size, dtype=torch.int64, device=device)
        self._turn = 0

    def next(self) -> Ints:
        """The buffer to write the next step's inputs to."""
        self._turn ^= 1
        return self._views[self._turn]

    def send(self, size: int, into: Tensor | None) -> Tensor:
        """Copy the front of what was written; never waits for the device. `into`: elsewhere than to the own tensor."""
        staging = self._staging[self._turn][:size]
        if into is None:
            if self._device is None:
                return staging
            into = self._device[:size]
        return into.copy_(staging, non_blocking=True)


class BatchBuilder:
    """Builds the tensors of steps of any shape."""

    def __init__(
        self, *, max_running: int, step_tokens: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.tables = BlockTables(
            max_running=max_running, max_blocks=-(-max_model_len // block_size), block_size=block_size, device=device
        )
        self.max_tokens = max(step_tokens, max_running)  # of a step, without padding
        room, max_rows = self.max_tokens + MAX_PADDING, max_running + 2
        most = Sizes(room, max_rows, self.max_writes(room, max_rows))
        self._upload = Upload(most.num_ints, device)

    def max_writes(self, num_tokens: int, num_rows: int) -> int:
        """Tails that a step writes at most: one per row, and one per end of a block."""
        return num_tokens // self.block_size + num_rows

    def build(
        self, batch: ScheduledBatch, last_ids_R: Tensor, *, room: Sizes | None = None, into: Tensor | None = None
    ) -> StepTensors:
        """Upload one step whose tables were extended. `last_ids_R`: the last sampled id of every device row.

        With `room`, the inputs are padded to it and go to the buffer `into`: padding tokens belong to the last row,
        which has to be padding too, and name the scratch block.
        """
        rows = batch.rows
        starts, device_rows = starts_of(rows), device_rows_of(rows)
        if batch.num_single == len(rows):  # one token and one sample each
            row_starts = np.arange(len(rows) + 1)
            rows_of_tokens = tail_tokens = row_starts[:-1]
            positions, sampled = starts, list(range(len(rows)))
        else:
            sizes = np.fromiter((row.end - row.start for row in rows), dtype=np.int64, count=len(rows))
            row_starts = np.concatenate(([0], np.cumsum(sizes)))
            rows_of_tokens = np.repeat(np.arange(len(rows)), sizes)
            positions = np.arange(row_starts[-1]) - np.repeat(row_starts[:-1] - starts, sizes)
            tail_tokens = self._tail_tokens_of(positions, row_starts)
            sampled = [index for index, row in enumerate(rows) if row.samples]
        num_blocks = max(len(row.sequence.block_table) for row in rows)
        tables_SN = self.tables.host[device_rows, :num_blocks]
        blocks = tables_SN[rows_of_tokens, positions // self.block_size]
        ids = known_ids(rows)

        exact = Sizes(len(positions), len(rows), len(tail_tokens))
        layout = exact if room is None else room
        slices, buffer = layout.slices(), self._upload.next()
        if room is not None:
            self._pad(buffer[: room.num_ints], slices, exact)

        def put(name: str, values: Ints | list[int] | int) -> None:
            begin = slices[name].start
            buffer[begin : begin + (len(values) if not isinstance(values, int) else exact.tokens)] = values

        put("ids", ids)
        put("positions", positions)
        put("rows", rows_of_tokens)
        put("slots", blocks * self.block_size + positions % self.block_size)
        put("is_real", 1)
        put("starts", starts)
        put("device_rows", device_rows)
        put("tail_reads", self._tail_reads_of(tables_SN, starts))
        put("tail_blocks", blocks[tail_tokens])
        put("tail_tokens", tail_tokens)
        put("row_starts", row_starts)
        put("sample_tokens", row_starts[1:][sampled] - 1)
        put("sample_rows", device_rows[sampled])
        put("sample_positions", [rows[index].end for index in sampled])
        inputs = self._upload.send(layout.num_ints, into)
        at = {name: inputs[slices[name]][: len(sampled)] for name in ROW_FIELDS[-3:]}
        host_starts = tuple(row_starts.tolist())
        forward = None
        if room is None:
            forward = self.forward_batch(
                inputs,
                exact,
                last_ids_R if UNKNOWN_ID in ids else None,
                num_blocks=num_blocks,
                row_starts=host_starts,
                starts=tuple(starts.tolist()),
            )
        return StepTensors(
            forward=forward,
            row_starts=host_starts,
            sampled_S=tuple(sampled),
            sample_T=at["sample_tokens"],
            sampled_rows_R=at["sample_rows"],
            sampled_positions_R=at["sample_positions"],
        )

    def forward_batch(
        self,
        inputs: Tensor,
        sizes: Sizes,
        last_ids_R: Tensor | None,
        *,
        num_blocks: int | None = None,
        row_starts: tuple[int, ...] = (),
        starts: tuple[int, ...] = (),
    ) -> ForwardBatch:
        """What the model reads, as views of a step's inputs and of what is derived from them on the device.

        Without `row_starts`, the inputs are a graph's, which is captured once: with padding, and whole tables.
        `last_ids_R` None: the host knows every id.
        """
        at = {name: inputs[where] for name, where in sizes.slices().items()}
        ids_T, rows_T, device_rows_S = at["ids"], at["rows"], at["device_rows"]
        if last_ids_R is not None:
            ids_T = torch.where(ids_T == UNKNOWN_ID, last_ids_R[device_rows_S][rows_T], ids_T)
        return ForwardBatch(
            ids_T=ids_T,
            positions_T=at["positions"],
            rows_T=rows_T,
            slots_T=at["slots"],
            starts_S=at["starts"],
            row_starts_S1=at["row_starts"],
            block_tables_SN=self.tables.device[:, :num_blocks].index_select(0, device_rows_S),
            tail_read_S=at["tail_reads"],
            tail_write_W=at["tail_blocks"],
            tail_token_W=at["tail_tokens"],
            sample_T=at["sample_tokens"],
            row_starts=row_starts,
            starts=starts,
            num_positions=self.max_model_len,
            is_real_T=None if row_starts else at["is_real"],
        )

    def padding(self, sizes: Sizes) -> Ints:
        """The inputs of a step of nothing but padding."""
        buffer = np.zeros(sizes.num_ints, dtype=np.int64)
        self._pad(buffer, sizes.slices(), Sizes(0, 0, 0))
        return buffer

    def _pad(self, buffer: Ints, slices: Mapping[str, slice], used: Sizes) -> None:
        """Padding behind what is used: ids and positions 0, in the scratch block; rows of no token, in the last row."""
        buffer[:] = 0  # the scratch block, its first slot, no real token
        num_rows = slices["starts"].stop - slices["starts"].start
        buffer[slices["rows"]] = num_rows - 1
        buffer[slices["device_rows"]] = self.tables.scratch_row
        buffer[slices["row_starts"]] = used.tokens

    def _tail_tokens_of(self, positions: Ints, row_starts: Ints) -> Ints:
        """Indices into T of the last token that a row computes in each block it touches."""
        is_last = (positions + 1) % self.block_size == 0
        is_last[row_starts[1:] - 1] = True
        return np.flatnonzero(is_last)

    def _tail_reads_of(self, tables_SN: Ints, starts: Ints) -> Ints:
        """The block of position start - 1 of each row; the scratch block where a row starts at 0."""
        blocks = tables_SN[np.arange(len(starts)), np.maximum(starts - 1, 0) // self.block_size]
        return np.where(starts > 0, blocks, SCRATCH_BLOCK)


def starts_of(rows: list[ScheduledRow]) -> Ints:
    """The first position of each row's chunk [S]."""
    return np.array([row.start for row in rows], dtype=np.int64)


def ends_of(rows: list[ScheduledRow]) -> Ints:
    """The end of each row's chunk [S]."""
    return np.array([row.end for row in rows], dtype=np.int64)


def device_rows_of(rows: Iterable[ScheduledRow]) -> Ints:
    """The device row of each row's sequence [S]."""
    return np.array([row.sequence.row for row in rows], dtype=np.int64)


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
