"""The device side of a step: forward, then sampling, as two launches that never wait; and reading the answer.

Features go beside this file, not into it.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lfm.engine.answers import entries, logprobs_to_host, to_host
from lfm.engine.batch import BatchBuilder, Ints, StepTensors, device_rows_of, ends_of, row_start
from lfm.engine.chunk_graphs import SPARE_BYTES, ChunkGraphs, finite_rows
from lfm.engine.graphs import DecodeGraph, DecodeGraphs, Shape
from lfm.engine.sampler import Logprobs, SampleOutput, sample, token_logprobs
from lfm.engine.sampling_rows import SampleFlags, SamplingRows
from lfm.engine.step import ScheduledBatch, ScheduledRow, StepResult
from lfm.kernels.forward_batch import CacheTensors
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import Ops
from lfm.protocol import TokenLogprob

logger = logging.getLogger(__name__)

# Prompt tokens per pass over the head: bounds the logits of a prompt that asks for its log-probabilities.
PROMPT_LOGPROBS_PASS = 256
PromptLogprobs = dict[int, tuple[Tensor, Logprobs]]  # per row of the batch: target ids and their log-probabilities


@dataclass(slots=True)
class Forwarded:
    """A forward on its way: what sampling and reading need of it. Nothing here has been waited for.

    `graph` is the replayed decode graph, whose rows are the batch's rows and padding; else None.
    """

    batch: ScheduledBatch
    sampled_S: Sequence[int]
    sampled_rows_R: Tensor
    sampled_positions_R: Tensor
    logits_RV: Tensor
    is_finite_S: Tensor
    prompt_logprobs: PromptLogprobs
    graph: DecodeGraph | None = None


@dataclass(slots=True)
class Launched:
    """A step on its way, everything copied to the host. `done` is None where the device is the host."""

    batch: ScheduledBatch
    sampled_S: Sequence[int]
    ids_R: Tensor
    is_finite_S: Tensor
    logprobs: Logprobs | None
    prompt_logprobs: PromptLogprobs
    done: torch.cuda.Event | None


class Runner:
    """Executes steps of one model on one device, in order, on the current stream."""

    def __init__(
        self, model: Lfm2, cache: CacheTensors, rows: SamplingRows, builder: BatchBuilder, *, ops: Ops
    ) -> None:
        self.model = model
        self.cache = cache
        self.rows = rows
        self.ops = ops
        self._builder = builder
        self._graphs: DecodeGraphs | None = None
        self._chunk_graphs: ChunkGraphs | None = None
        self._prepares = True
        self._device_rows = self._ends = np.zeros(0, dtype=np.int64)  # of the last step's rows
        self._flags = SampleFlags()
        self._flags_of: tuple[int, Ints] | None = None  # changes until then, and the rows that `_flags` is of

    @property
    def num_replayed(self) -> int:
        """Decode steps that were replayed from a graph so far."""
        return self._graphs.num_replayed if self._graphs is not None else 0

    @property
    def num_replayed_chunks(self) -> int:
        """Steps with chunks that were replayed from a graph so far."""
        return self._chunk_graphs.num_replayed if self._chunk_graphs is not None else 0

    @property
    def captured_shapes(self) -> list[Shape]:
        """The shapes of decode steps that have a graph."""
        return self._graphs.shapes if self._graphs is not None else []

    @property
    def is_async(self) -> bool:
        """Whether launching returns before the step is computed, so that the host can work ahead."""
        return self.rows.device.type == "cuda"

    def enable_graphs(self) -> None:
        """Replay steps from CUDA graphs from now on. The cache and the ops must be the final ones."""
        self._graphs = DecodeGraphs(self.model, self.cache, self.rows, self._builder, self.ops)
        self._chunk_graphs = ChunkGraphs(self.model, self.cache, self.rows, self._builder, self.ops)

    def run_every_shape(self, every_flags: Sequence[SampleFlags]) -> None:
        """Run each shape that has a graph, or gets one when a step asks, once on padding; decode steps sample, too."""
        if self._graphs is not None and self._chunk_graphs is not None:
            self._graphs.run_every_shape(every_flags)
            self._chunk_graphs.run_every_size()

    @contextmanager
    def observed(self, ops: Ops) -> Iterator[None]:
        """Compute steps with `ops` and never from a graph, within the block: for measurements that look inside."""
        before = self.ops, self._graphs, self._chunk_graphs
        self.ops, self._graphs, self._chunk_graphs = ops, None, None
        try:
            yield
        finally:
            self.ops, self._graphs, self._chunk_graphs = before

    def between_steps(self) -> None:
        """Work that may delay a step a little: capture a graph that steps have asked for."""
        if self._graphs is not None and not self._graphs.capture_wanted() and self._chunk_graphs is not None:
            self._chunk_graphs.capture_wanted()

    def prepare(self) -> bool:
        """Use a moment without steps: capture a graph that some may ask for. False when there is none left."""
        if self._graphs is None or self._chunk_graphs is None or not self._prepares:
            return False
        self._prepares = self._capture_ahead(self._graphs, self._chunk_graphs)
        if not self._prepares:
            num_chunks = self._chunk_graphs.num_graphs
            logger.info(
                "graphs are captured: %d of decode steps, %d with chunks", len(self.captured_shapes), num_chunks
            )
        return self._prepares

    def _capture_ahead(self, graphs: DecodeGraphs, chunk_graphs: ChunkGraphs) -> bool:
        if torch.cuda.mem_get_info(self.rows.device)[0] < SPARE_BYTES:
            return False
        is_wanted = graphs.want_next() or chunk_graphs.want_next()
        try:
            self.between_steps()
        except Exception:  # a size that no step has asked for must not end the engine
            logger.exception("a graph could not be captured ahead; from now on only those that steps ask for")
            return False
        return is_wanted

    @torch.inference_mode()
    def forward(self, batch: ScheduledBatch) -> Forwarded:
        """Launch the model on a scheduled step."""
        if batch.repeats:
            device_rows, ends = self._device_rows, self._ends + 1
        else:
            device_rows, ends = device_rows_of(batch.rows), ends_of(batch.rows)
        self._device_rows, self._ends = device_rows, ends
        self._builder.tables.extend(batch, device_rows, ends)
        has_chunks = batch.num_single < len(batch.rows)
        if self._graphs is not None and not has_chunks:
            graph = self._graphs.launch(batch, device_rows, ends - 1)
            if graph is not None:
                self._start_rows(batch)
                return _replayed(batch, graph)
        chunks = self._chunk_graphs.find(batch) if self._chunk_graphs is not None and has_chunks else None
        if chunks is None:
            step = self._builder.build(batch, self.rows.last_ids_R)
            assert step.forward is not None, "no room was given"
            hidden_TD = self.model(step.forward, self.cache, self.ops)
            if has_chunks:
                is_finite_S = finite_rows(hidden_TD, step.forward.rows_T, len(batch.rows))
            else:
                is_finite_S = hidden_TD.isfinite().all(dim=1)
        else:
            step = self._builder.build(batch, self.rows.last_ids_R, room=chunks.sizes, into=chunks.inputs)
            hidden_TD, is_finite_S = chunks.replay()
        self._start_rows(batch)
        return Forwarded(
            batch=batch,
            sampled_S=step.sampled_S,
            sampled_rows_R=step.sampled_rows_R,
            sampled_positions_R=step.sampled_positions_R,
            logits_RV=self.model.head(hidden_TD[step.sample_T] if has_chunks else hidden_TD, self.ops),
            is_finite_S=is_finite_S[: len(batch.rows)],
            prompt_logprobs=self._prompt_logprobs(batch, step, hidden_TD),
        )

    def _start_rows(self, batch: ScheduledBatch) -> None:
        """What sampling needs of sequences that begin. The forward does not, and so the device works meanwhile."""
        if batch.started:
            self.rows.start_many([row_start(sequence) for sequence in batch.started])

    @torch.inference_mode()
    def sample(self, forwarded: Forwarded) -> Launched:
        """Launch sampling of the rows that need a token, and the copy of the answer to the host."""
        output = self._sample(forwarded)
        launched = Launched(
            batch=forwarded.batch,
            sampled_S=forwarded.sampled_S,
            ids_R=to_host(output.ids_R),
            is_finite_S=to_host(forwarded.is_finite_S),
            logprobs=logprobs_to_host(output.logprobs) if output.logprobs else None,
            prompt_logprobs={
                index: (to_host(targets), logprobs_to_host(logprobs))
                for index, (targets, logprobs) in forwarded.prompt_logprobs.items()
            },
            done=torch.cuda.Event() if self.is_async else None,  # type: ignore[no-untyped-call]
        )
        if launched.done is not None:
            launched.done.record()
        return launched

    def _sample(self, forwarded: Forwarded) -> SampleOutput:
        if not forwarded.sampled_S:
            return SampleOutput(forwarded.sampled_rows_R, None)
        flags = self._flags_of_rows(forwarded)
        if forwarded.graph is not None and self._graphs is not None:
            ids_B = self._graphs.sample(forwarded.graph, flags)
            if ids_B is not None:
                return SampleOutput(ids_B[: len(forwarded.sampled_S)], None)
        return sample(
            self.rows,
            forwarded.logits_RV,
            row_R=forwarded.sampled_rows_R,
            position_R=forwarded.sampled_positions_R,
            flags=flags,
        )

    def _flags_of_rows(self, forwarded: Forwarded) -> SampleFlags:
        """The flags of the rows that sample; those of the last step where they are the same sequences."""
        device_rows, known = self._device_rows, self._flags_of
        if len(forwarded.sampled_S) < len(device_rows):
            device_rows = device_rows[list(forwarded.sampled_S)]
        if known is None or known[0] != self.rows.num_changes or not np.array_equal(known[1], device_rows):
            self._flags = self.rows.flags(device_rows.tolist())
            self._flags_of = self.rows.num_changes, device_rows
        return self._flags

    def read(self, launched: Launched) -> StepResult:
        """Wait for a step (the only wait of the engine) and turn its answer into plain Python."""
        if launched.done is not None:
            launched.done.synchronize()
        token_ids = launched.ids_R.tolist()
        if len(token_ids) < len(launched.batch.rows):
            sampled, token_ids = token_ids, [-1] * len(launched.batch.rows)
            for index, token_id in zip(launched.sampled_S, sampled, strict=True):
                token_ids[index] = token_id
        return StepResult(
            token_ids=token_ids,
            is_finite=launched.is_finite_S.tolist(),
            logprobs=_read_logprobs(launched) if launched.logprobs is not None else None,
            prompt_logprobs={
                index: entries(targets.tolist(), logprobs, _prompt_top(launched.batch.rows[index]))
                for index, (targets, logprobs) in launched.prompt_logprobs.items()
            },
        )

    def _prompt_logprobs(self, batch: ScheduledBatch, step: StepTensors, hidden_TD: Tensor) -> PromptLogprobs:
        """Log-probabilities of the prompt tokens that follow each position of the chunks that ask for them."""
        found = {}
        for index, row in enumerate(batch.rows):
            sequence = row.sequence
            count = min(row.end, sequence.num_prompt - 1) - row.start
            if not sequence.wants_prompt_logprobs or count <= 0:
                continue
            begin = step.row_starts[index]
            targets = torch.tensor(sequence.ids[row.start + 1 : row.start + 1 + count])
            if self.is_async:
                targets = targets.pin_memory().to(hidden_TD.device, non_blocking=True)
            found[index] = (targets, self._head_logprobs(hidden_TD[begin : begin + count], targets, _prompt_top(row)))
        return found

    def _head_logprobs(self, hidden_MD: Tensor, targets_M: Tensor, num_top: int) -> Logprobs:
        size = PROMPT_LOGPROBS_PASS
        parts = [
            token_logprobs(self.model.head(hidden, self.ops), targets, num_top=num_top, num_ids=self.rows.num_ids)
            for hidden, targets in zip(torch.split(hidden_MD, size), torch.split(targets_M, size), strict=True)
        ]
        return Logprobs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _replayed(batch: ScheduledBatch, graph: DecodeGraph) -> Forwarded:
    """The outputs of a replayed decode graph, cut to the batch's rows; a decode row always samples."""
    num_rows = len(batch.rows)
    return Forwarded(
        batch=batch,
        sampled_S=range(num_rows),
        sampled_rows_R=graph.device_rows_B[:num_rows],
        sampled_positions_R=graph.next_positions_B[:num_rows],
        logits_RV=graph.logits_BV[:num_rows],
        is_finite_S=graph.is_finite_B[:num_rows],
        prompt_logprobs={},
        graph=graph,
    )


def _prompt_top(row: ScheduledRow) -> int:
    return row.sequence.request.sampling.prompt_logprobs or 0


def _read_logprobs(launched: Launched) -> list[TokenLogprob | None]:
    """Per row of the batch, the log-probability of its new id where the request asks for it."""
    assert launched.logprobs is not None
    found: list[TokenLogprob | None] = [None] * len(launched.batch.rows)
    read = entries(launched.ids_R.tolist(), launched.logprobs, launched.logprobs.top_RK.shape[1])
    for index, entry in zip(launched.sampled_S, read, strict=True):
        wanted = launched.batch.rows[index].sequence.request.sampling.logprobs
        if wanted is not None:
            found[index] = TokenLogprob(entry.token_id, entry.logprob, entry.top[:wanted])
    return found
