"""CUDA graphs of decode steps: every row computes one token, so a step's shape is its number of rows.

A graph serves up to `bucket` rows; padding rows name the scratch block, the scratch row and no expert. Graphs are
captured by the engine thread, between steps, for the buckets that steps asked for; until then the eager path serves.
Warm-up and capture use scratch inputs: a tail write is not idempotent, so nothing may run twice on live blocks.
All inputs of a step travel in one copy. Legend: B rows of the bucket, V vocabulary, W columns of the inputs: B, or one
more where that is odd, so that every line begins at a multiple of 16 bytes, as kernels want their pointers.
"""

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lfm.engine.batch import ALIGNED_INTS, UNKNOWN_ID, BatchBuilder, Ints
from lfm.engine.block_tables import BlockTables
from lfm.engine.prefix_groups import MIN_ROWS, TILE_ROWS, PrefixGroups, group_by_prefix
from lfm.engine.sampler import sample
from lfm.engine.sampling_rows import SampleFlags, SamplingRows
from lfm.engine.step import ScheduledBatch
from lfm.kernels.forward_batch import SCRATCH_BLOCK, CacheTensors, ForwardBatch, SharedPrefix
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import Ops

logger = logging.getLogger(__name__)

# A step pads by a quarter at most; up to 8 rows, where each padding row would cost most, not at all.
BUCKETS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
BUCKETS += (320, 384, 448, 512, 640, 768, 896, 1024)
# Steps of a bucket before it is captured: a capture takes about as long as this many eager steps.
CAPTURE_DEMAND = 2
FIELDS = ("ids", "positions", "slots", "device_rows", "tail_reads", "tail_writes", "next_positions", "is_real")
# Behind the fields, for graphs with shared prefixes: blocks that each row shares [B], and tiles [B // 8, 16] as 2 B.
NUM_LINES = len(FIELDS) + 3
NUM_EXACT_BUCKETS = 8  # up to here a bucket is always full
MIN_SHARED_BUCKET = 32  # fewer rows gain nothing from reading a shared block together


class Shape(NamedTuple):
    """What a graph is captured for."""

    bucket: int
    has_shared: bool


@dataclass(slots=True)
class DecodeGraph:
    """One captured shape: its input buffer, its outputs, and the sampling graphs captured on top of it."""

    shape: Shape
    inputs: Tensor  # int64 [NUM_LINES, W] on the device
    staging: list[Tensor]  # two of the same, pinned
    graph: torch.cuda.CUDAGraph | None  # None where it only runs once, to have kernels compiled
    logits_BV: Tensor
    is_finite_B: Tensor
    samples: dict[SampleFlags, tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=dict)
    turn: int = 0

    @property
    def device_rows_B(self) -> Tensor:
        return self.inputs[3, : self.shape.bucket]

    @property
    def next_positions_B(self) -> Tensor:
        """Positions of the ids to be sampled."""
        return self.inputs[6, : self.shape.bucket]


class DecodeGraphs:
    """All captured buckets of one runner. They share one memory pool."""

    def __init__(self, model: Lfm2, cache: CacheTensors, rows: SamplingRows, builder: BatchBuilder, ops: Ops) -> None:
        self._model, self._cache, self._rows, self._builder, self._ops = model, cache, rows, builder, ops
        self._buckets = [bucket for bucket in BUCKETS if bucket <= rows.num_rows]
        self._prefixes = SharedPrefixes(builder)
        self._graphs: dict[Shape, DecodeGraph] = {}
        self._demand: Counter[Shape] = Counter()
        self._sample_demand: Counter[tuple[Shape, SampleFlags]] = Counter()
        self._memory_pool = torch.cuda.graph_pool_handle() if rows.device.type == "cuda" else None
        self.num_replayed = 0

    @property
    def shapes(self) -> list[Shape]:
        return list(self._graphs)

    def launch(self, batch: ScheduledBatch, device_rows: Ints, starts: Ints) -> DecodeGraph | None:
        """Replay a decode step whose tables were extended; None if it has another shape or no graph yet."""
        index = bisect_left(self._buckets, len(batch.rows))
        if index == len(self._buckets):
            return None
        bucket = self._buckets[index]
        groups = self._prefixes.of(device_rows, starts) if bucket >= MIN_SHARED_BUCKET else None
        shape = Shape(bucket, groups is not None)
        graph = self._graphs.get(shape)
        if graph is None:
            self._demand[shape] += 1
            return None
        graph.turn ^= 1
        staging = graph.staging[graph.turn]
        self._fill(staging.numpy(), batch, device_rows, starts, groups)
        graph.inputs.copy_(staging, non_blocking=True)
        assert graph.graph is not None
        graph.graph.replay()
        self.num_replayed += 1
        return graph

    def sample(self, graph: DecodeGraph, flags: SampleFlags) -> Tensor | None:
        """Replay sampling of the bucket's rows: ids [B]; None if these flags have no graph (yet)."""
        if flags.counts or flags.bias or flags.min_tokens or flags.num_logprobs >= 0:
            return None  # these parts of the sampler may move their buffers when they grow
        captured = graph.samples.get(flags)
        if captured is None:
            self._sample_demand[(graph.shape, flags)] += 1
            return None
        captured[0].replay()
        return captured[1]

    def want_next(self) -> bool:
        """Ask for the smallest shape without a graph, as a step would; False if there is none."""
        missing = (bucket for bucket in self._buckets if Shape(bucket, False) not in self._graphs)
        bucket = next(missing, None)
        if bucket is not None:
            self._demand[Shape(bucket, False)] = CAPTURE_DEMAND
        return bucket is not None

    def capture_wanted(self) -> bool:
        """Capture one graph that steps have asked for, if any. Called between steps; True if there was one.

        If that fails, steps go on without graphs: slower, and said in the log.
        """
        try:
            return self._capture_next()
        except RuntimeError:
            logger.exception("a CUDA graph cannot be captured; going on without graphs")
            self._buckets, self._graphs = [], {}
            return False

    def _capture_next(self) -> bool:
        wanted = next((shape for shape, count in self._demand.items() if count >= CAPTURE_DEMAND), None)
        if wanted is not None:
            del self._demand[wanted]
            self._graphs[wanted] = self._capture(wanted)
            return True
        wanted_sample = next((key for key, count in self._sample_demand.items() if count >= CAPTURE_DEMAND), None)
        if wanted_sample is not None:
            del self._sample_demand[wanted_sample]
            self._capture_sample(self._graphs[wanted_sample[0]], wanted_sample[1])
        return wanted_sample is not None

    def _fill(
        self, fields: Ints, batch: ScheduledBatch, device_rows: Ints, starts: Ints, groups: PrefixGroups | None
    ) -> None:
        """Write the step's inputs [NUM_LINES, W]; columns beyond the batch's rows are padding."""
        size, num_rows = self._builder.block_size, len(starts)
        tables = self._builder.tables.host
        blocks = tables[device_rows, starts // size]
        fields[:, num_rows:] = np.array(self._padding())[:, None]
        fields[0, :num_rows] = UNKNOWN_ID
        for index, known_id in batch.known_ids:
            fields[0, index] = known_id
        fields[1, :num_rows] = starts
        fields[2, :num_rows] = blocks * size + starts % size
        fields[3, :num_rows] = device_rows
        fields[4, :num_rows] = np.where(starts > 0, tables[device_rows, np.maximum(starts - 1, 0) // size], 0)
        fields[5, :num_rows] = blocks
        fields[6, :num_rows] = starts + 1
        fields[7, :num_rows] = 1
        if groups is not None:
            fields[len(FIELDS), :num_rows] = groups.blocks_S
            fields[len(FIELDS) + 1 :] = -1
            fields[len(FIELDS) + 1 :].reshape(-1)[: groups.tiles_YX.size] = groups.tiles_YX.ravel()

    def _padding(self) -> tuple[int, ...]:
        """One padding row's inputs: id 0 at position 0 of the scratch block."""
        slot = SCRATCH_BLOCK * self._builder.block_size
        return (0, 0, slot, self._rows.scratch_row, SCRATCH_BLOCK, SCRATCH_BLOCK, 1, 0, 0, -1, -1)

    @torch.inference_mode()
    def run_every_shape(self, every_flags: Sequence[SampleFlags]) -> None:
        """Run each shape that steps may ask for, and sampling with each of these flags, once and on padding alone."""
        for bucket in self._buckets:
            for has_shared in (False, True) if bucket >= MIN_SHARED_BUCKET else (False,):
                shape = Shape(bucket, has_shared)
                inputs = self._padded_inputs(bucket)
                decode = DecodeGraph(shape, inputs, [], None, *self._forward(inputs, shape))
                for flags in () if has_shared else every_flags:
                    self._sample(decode, flags)

    def _padded_inputs(self, bucket: int) -> Tensor:
        padding = torch.tensor(self._padding(), dtype=torch.int64, device=self._rows.device)
        return padding[:, None].expand(-1, bucket + bucket % ALIGNED_INTS).contiguous()

    @torch.inference_mode()
    def _capture(self, shape: Shape) -> DecodeGraph:
        inputs = self._padded_inputs(shape.bucket)
        staging = [torch.zeros(inputs.shape, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._forward(inputs, shape)  # compiles kernels, makes the libraries' handles, grows the rope tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            logits_BV, is_finite_B = self._forward(inputs, shape)
        return DecodeGraph(shape, inputs, staging, graph, logits_BV, is_finite_B)

    @torch.inference_mode()
    def _capture_sample(self, decode: DecodeGraph, flags: SampleFlags) -> None:
        decode.inputs.copy_(torch.tensor(self._padding(), device=decode.inputs.device)[:, None])
        self._sample(decode, flags)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            ids_B = self._sample(decode, flags)
        decode.samples[flags] = (graph, ids_B)

    def _forward(self, inputs: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        fields = inputs[: len(FIELDS), : shape.bucket]
        batch = _decode_batch(fields, self._builder.tables, self._rows.last_ids_R, self._builder.max_model_len)
        if shape.has_shared:
            tiles_YX = inputs[len(FIELDS) + 1 :].view(shape.bucket // MIN_ROWS, TILE_ROWS)
            batch = replace(batch, shared=SharedPrefix(inputs[len(FIELDS)], tiles_YX))
        hidden_BD = self._model(batch, self._cache, self._ops)
        return self._model.head(hidden_BD, self._ops), hidden_BD.isfinite().all(dim=1)

    def _sample(self, decode: DecodeGraph, flags: SampleFlags) -> Tensor:
        rows, positions = decode.device_rows_B, decode.next_positions_B
        return sample(self._rows, decode.logits_BV, row_R=rows, position_R=positions, flags=flags).ids_R


def _decode_batch(fields_FB: Tensor, tables: BlockTables, last_ids_R: Tensor, max_model_len: int) -> ForwardBatch:
    """The bucket's forward inputs, as views of its buffer's fields and of what is derived from them on the device."""
    ids, positions, slots, device_rows, tail_reads, tail_writes, _, is_real = fields_FB.unbind()
    bucket = fields_FB.shape[1]
    rows = torch.arange(bucket + 1, device=fields_FB.device)
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


class SharedPrefixes:
    """The prefix groups of the rows that decode together, found again only when other rows are among them.

    A sequence keeps its table, and appends to it, until it is preempted; then it begins anew. So the same device rows
    in the same order share the same leading blocks as before, as long as nothing has begun.
    """

    def __init__(self, builder: BatchBuilder) -> None:
        self._builder = builder
        self._num_starts = -1
        self._device_rows: Ints = np.zeros(0, dtype=np.int64)
        self._groups: PrefixGroups | None = None

    def of(self, device_rows: Ints, starts: Ints) -> PrefixGroups | None:
        """Groups of a decode step's rows, or None where sharing saves too little."""
        tables = self._builder.tables
        if self._num_starts != tables.num_starts or not np.array_equal(device_rows, self._device_rows):
            self._num_starts, self._device_rows = tables.num_starts, device_rows
            num_whole = starts // self._builder.block_size
            self._groups = group_by_prefix(tables.host[device_rows, : int(num_whole.max()) + 1], num_whole)
        return self._groups
