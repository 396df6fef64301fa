"""CUDA graphs of decode steps: every row computes one token, so a step's shape is its number of rows.

A graph serves up to `bucket` rows; padding rows name the scratch block, the scratch row and no expert. Graphs are
captured by the engine thread, between steps, for the buckets that steps asked for; until then the eager path serves.
Warm-up and capture use scratch inputs: a tail write is not idempotent, so nothing may run twice on live blocks.
All inputs of a step travel in one copy. Legend: B rows of the bucket, V vocabulary.
"""

import logging
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lfm.engine.batch import UNKNOWN_ID, BatchBuilder
from lfm.engine.block_tables import BlockTables
from lfm.engine.sampler import sample
from lfm.engine.sampling_rows import SampleFlags, SamplingRows
from lfm.engine.step import ScheduledBatch
from lfm.kernels.forward_batch import SCRATCH_BLOCK, CacheTensors, ForwardBatch
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import Ops

logger = logging.getLogger(__name__)

# A step pads by a quarter at most; up to 8 rows, where each padding row would cost most, not at all.
BUCKETS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
BUCKETS += (320, 384, 448, 512, 640, 768, 896, 1024)
# Steps of a bucket before it is captured: a capture takes about as long as this many eager steps.
CAPTURE_DEMAND = 2
FIELDS = ("ids", "positions", "slots", "device_rows", "tail_reads", "tail_writes", "next_positions", "is_real")


@dataclass(slots=True)
class DecodeGraph:
    """One captured bucket: its input buffer, its outputs, and the sampling graphs captured on top of it."""

    bucket: int
    inputs: Tensor  # int64 [len(FIELDS), B] on the device
    staging: list[Tensor]  # two of the same, pinned
    graph: torch.cuda.CUDAGraph
    logits_BV: Tensor
    is_finite_B: Tensor
    samples: dict[SampleFlags, tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=dict)
    turn: int = 0

    @property
    def device_rows_B(self) -> Tensor:
        return self.inputs[3]

    @property
    def next_positions_B(self) -> Tensor:
        """Positions of the ids to be sampled."""
        return self.inputs[6]


class DecodeGraphs:
    """All captured buckets of one runner. They share one memory pool."""

    def __init__(self, model: Lfm2, cache: CacheTensors, rows: SamplingRows, builder: BatchBuilder, ops: Ops) -> None:
        self._model, self._cache, self._rows, self._builder, self._ops = model, cache, rows, builder, ops
        self._buckets = [bucket for bucket in BUCKETS if bucket <= rows.num_rows]
        self._graphs: dict[int, DecodeGraph] = {}
        self._demand: Counter[int] = Counter()
        self._sample_demand: Counter[tuple[int, SampleFlags]] = Counter()
        self._memory_pool = torch.cuda.graph_pool_handle()
        self.num_replayed = 0

    def launch(self, batch: ScheduledBatch) -> DecodeGraph | None:
        """Replay a decode step whose tables were extended; None if it has another shape or no graph yet."""
        num_rows = len(batch.rows)
        index = bisect_left(self._buckets, num_rows)
        if index == len(self._buckets) or any(row.end - row.start != 1 for row in batch.rows):
            return None
        bucket = self._buckets[index]
        graph = self._graphs.get(bucket)
        if graph is None:
            self._demand[bucket] += 1
            return None
        graph.turn ^= 1
        staging = graph.staging[graph.turn]
        self._fill(staging.numpy(), batch)
        graph.inputs.copy_(staging, non_blocking=True)
        graph.graph.replay()
        self.num_replayed += 1
        return graph

    def sample(self, graph: DecodeGraph, flags: SampleFlags) -> Tensor | None:
        """Replay sampling of the bucket's rows: ids [B]; None if these flags have no graph (yet)."""
        if flags.counts or flags.bias or flags.min_tokens or flags.num_logprobs >= 0:
            return None  # these parts of the sampler may move their buffers when they grow
        captured = graph.samples.get(flags)
        if captured is None:
            self._sample_demand[(graph.bucket, flags)] += 1
            return None
        captured[0].replay()
        return captured[1]

    def capture_wanted(self) -> None:
        """Capture one graph that steps have asked for, if any. Called between steps.

        If that fails, steps go on without graphs: slower, and said in the log.
        """
        try:
            self._capture_next()
        except RuntimeError:
            logger.exception("a CUDA graph cannot be captured; going on without graphs")
            self._buckets, self._graphs = [], {}

    def _capture_next(self) -> None:
        wanted = next((bucket for bucket, count in self._demand.items() if count >= CAPTURE_DEMAND), None)
        if wanted is not None:
            del self._demand[wanted]
            self._graphs[wanted] = self._capture(wanted)
            return
        wanted_sample = next((key for key, count in self._sample_demand.items() if count >= CAPTURE_DEMAND), None)
        if wanted_sample is not None:
            del self._sample_demand[wanted_sample]
            self._capture_sample(self._graphs[wanted_sample[0]], wanted_sample[1])

    def _fill(self, fields: np.ndarray, batch: ScheduledBatch) -> None:
        """Write the step's inputs [len(FIELDS), B]; columns beyond the batch's rows are padding."""
        rows, size = batch.rows, self._builder.block_size
        num_rows = len(rows)
        starts = np.array([row.start for row in rows], dtype=np.int64)
        device_rows = np.array([row.sequence.row for row in rows], dtype=np.int64)
        tables = self._builder.tables.host
        blocks = tables[device_rows, starts // size]
        fields[:, num_rows:] = np.array(self._padding())[:, None]
        fields[0, :num_rows] = [
            row.sequence.ids[row.start] if row.end <= len(row.sequence.ids) else UNKNOWN_ID for row in rows
        ]
        fields[1, :num_rows] = starts
        fields[2, :num_rows] = blocks * size + starts % size
        fields[3, :num_rows] = device_rows
        fields[4, :num_rows] = np.where(starts > 0, tables[device_rows, np.maximum(starts - 1, 0) // size], 0)
        fields[5, :num_rows] = blocks
        fields[6, :num_rows] = starts + 1
        fields[7, :num_rows] = 1

    def _padding(self) -> tuple[int, ...]:
        """One padding row's inputs: id 0 at position 0 of the scratch block."""
        slot = SCRATCH_BLOCK * self._builder.block_size
        return (0, 0, slot, self._rows.scratch_row, SCRATCH_BLOCK, SCRATCH_BLOCK, 1, 0)

    @torch.inference_mode()
    def _capture(self, bucket: int) -> DecodeGraph:
        inputs = torch.tensor(self._padding(), dtype=torch.int64, device=self._rows.device)
        inputs = inputs[:, None].expand(-1, bucket).contiguous()
        staging = [torch.zeros(inputs.shape, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._forward(inputs)  # compiles kernels, makes the libraries' handles, grows the rope tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            logits_BV, is_finite_B = self._forward(inputs)
        return DecodeGraph(bucket, inputs, staging, graph, logits_BV, is_finite_B)

    @torch.inference_mode()
    def _capture_sample(self, decode: DecodeGraph, flags: SampleFlags) -> None:
        decode.inputs.copy_(torch.tensor(self._padding(), device=decode.inputs.device)[:, None])
        self._sample(decode, flags)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            ids_B = self._sample(decode, flags)
        decode.samples[flags] = (graph, ids_B)

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        batch = _decode_batch(inputs, self._builder.tables, self._rows.last_ids_R, self._builder.max_model_len)
        hidden_BD = self._model(batch, self._cache, self._ops)
        return self._model.head(hidden_BD, self._ops), hidden_BD.isfinite().all(dim=1)

    def _sample(self, decode: DecodeGraph, flags: SampleFlags) -> Tensor:
        rows, positions = decode.device_rows_B, decode.next_positions_B
        return sample(self._rows, decode.logits_BV, row_R=rows, position_R=positions, flags=flags).ids_R


def _decode_batch(inputs: Tensor, tables: BlockTables, last_ids_R: Tensor, max_model_len: int) -> ForwardBatch:
    """The bucket's forward inputs, as views of its buffer and of what is derived from it on the device."""
    ids, positions, slots, device_rows, tail_reads, tail_writes, _, is_real = inputs.unbind()
    bucket = inputs.shape[1]
    rows = torch.arange(bucket + 1, device=inputs.device)
    return ForwardBatch(
        ids_T=torch.where(ids == UNKNOWN_ID, last_ids_R[device_rows], ids),
        positions_T=positions,
        rows_T=rows[:-1],
        slots_T=slots,
        starts_S=positions,
        row_starts_S1=rows,
        block_tables_SN=tables.device[device_rows],
        tail_read_S=tail_reads,
        tail_write_W=tail_writes,
        tail_token_W=rows[:-1],
        sample_T=rows[:-1],
        row_starts=(),
        starts=(),
        num_positions=max_model_len,
        is_real_T=is_real if bucket > NUM_EXACT_BUCKETS else None,
    )


NUM_EXACT_BUCKETS = 8  # up to here a bucket is always full
