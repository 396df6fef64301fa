"""CUDA graphs of steps with chunks of prompts, whose 600 kernels take longer to launch one by one than to run.

A graph has room for so many tokens and rows; what a step leaves of it is padding, which names the scratch block and no
expert. Behind the layers all is launched as usual: the head takes the rows that sample, whatever their number.

Beyond SMALL_TOKENS the device is busy for longer than launching takes, and a graph saves no more than the pauses
between kernels: so little that padding must stay below a 32nd. Steps of a full queue fill their budget to the token;
they have such a graph where there is memory to spare.

Captured as the graphs of decode steps are: by the engine thread, between steps, once a step has asked for a size, on
padding alone. Legend: T tokens, S rows, D hidden.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lfm.engine.batch import BatchBuilder, Sizes
from lfm.engine.sampling_rows import SamplingRows
from lfm.engine.step import ScheduledBatch
from lfm.kernels.forward_batch import CacheTensors
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import Ops

logger = logging.getLogger(__name__)

# Few sizes, since each costs a capture and memory: padding tokens cost dense products, padding rows almost nothing.
TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 4096, 8192)
SMALL_TOKENS = 2048
MAX_PADDED_SHARE = 1 / 32
SPARE_BYTES = 4 * 2**30  # so much of the GPU's memory stays free of large graphs, and of those nobody has asked for
ROWS = (8, 32, 128, 256, 512, 1024)  # and one of padding, which owns the padding tokens


@dataclass(slots=True)
class ChunkGraph:
    """One captured size: its input buffer and its outputs."""

    sizes: Sizes
    inputs: Tensor  # int64 [sizes.num_ints] on the device
    graph: torch.cuda.CUDAGraph
    hidden_TD: Tensor
    is_finite_S: Tensor
    num_replayed: int = 0

    def replay(self) -> tuple[Tensor, Tensor]:
        """Hidden states [T, D], and whether those of each row are finite [S]. Overwritten by the next replay."""
        self.graph.replay()
        self.num_replayed += 1
        return self.hidden_TD, self.is_finite_S


class ChunkGraphs:
    """All captured sizes of one runner. They share one memory pool."""

    def __init__(self, model: Lfm2, cache: CacheTensors, rows: SamplingRows, builder: BatchBuilder, ops: Ops) -> None:
        self._model, self._cache, self._rows, self._builder, self._ops = model, cache, rows, builder, ops
        self._graphs: dict[Sizes, ChunkGraph] = {}
        self._wanted: dict[Sizes, None] = {}
        self._refused: set[Sizes] = set()  # there was no memory for them
        self._memory_pool = torch.cuda.graph_pool_handle() if rows.device.type == "cuda" else None
        self._is_broken = False

    @property
    def num_replayed(self) -> int:
        return sum(graph.num_replayed for graph in self._graphs.values())

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def find(self, batch: ScheduledBatch) -> ChunkGraph | None:
        """The graph for a step; None if it is too large, would be padding for too much, or has no graph yet."""
        num_tokens = batch.num_tokens
        if num_tokens > TOKENS[-1] or len(batch.rows) > ROWS[-1] or self._is_broken:
            return None
        sizes = self._sizes(num_tokens, len(batch.rows))
        if num_tokens < _fewest_tokens(sizes.tokens):
            return None
        graph = self._graphs.get(sizes)
        if graph is None and sizes not in self._refused:
            self._wanted[sizes] = None
        return graph

    def want_next(self) -> bool:
        """Ask for the smallest size without a graph, as a step would; False if there is none."""
        known = self._graphs.keys() | self._refused
        missing = next((sizes for sizes in self._possible() if sizes not in known), None)
        if missing is None or self._is_broken:
            return False
        self._wanted[missing] = None
        return True

    def run_every_size(self) -> None:
        """Run each size that steps may ask for once, on padding alone."""
        for sizes in self._possible():
            self._run_padding(sizes)

    def _possible(self) -> Iterator[Sizes]:
        return (self._sizes(tokens, rows) for tokens in TOKENS for rows in ROWS if self._can_occur(tokens, rows))

    def _can_occur(self, tokens: int, rows: int) -> bool:
        """Whether a step may need room for so many tokens and rows: it has fewer rows than tokens."""
        fewest = (0, *ROWS)[ROWS.index(rows)] + 1
        return fewest < tokens and fewest <= self._rows.num_rows and _fewest_tokens(tokens) <= self._builder.max_tokens

    def capture_wanted(self) -> bool:
        """Capture one graph that steps have asked for, if any. Called between steps; True if there was one.

        If that fails, steps go on without these graphs: slower, and said in the log.
        """
        if not self._wanted:
            return False
        wanted = next(iter(self._wanted))
        del self._wanted[wanted]
        if wanted.tokens > SMALL_TOKENS and self._free_bytes() < SPARE_BYTES:
            logger.info("no graph for steps of %d tokens: too little memory is free", wanted.tokens)
            self._refused.add(wanted)
            return True
        try:
            self._graphs[wanted] = self._capture(wanted)
        except RuntimeError:
            logger.exception("a CUDA graph of chunks cannot be captured; going on without")
            self._is_broken, self._graphs = True, {}
        return True

    def _free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._rows.device)[0])

    def _sizes(self, num_tokens: int, num_rows: int) -> Sizes:
        tokens = TOKENS[bisect_left(TOKENS, num_tokens)]
        rows = min(ROWS[bisect_left(ROWS, num_rows)], self._rows.num_rows) + 1
        rows += rows == tokens  # as many tokens as rows would look like a decode step
        return Sizes(tokens, rows, self._builder.max_writes(tokens, rows))

    @torch.inference_mode()
    def _run_padding(self, sizes: Sizes) -> Tensor:
        """Run a size's padding; returns the inputs."""
        inputs = torch.from_numpy(self._builder.padding(sizes)).to(self._rows.device)
        self._forward(inputs, sizes)
        return inputs

    @torch.inference_mode()
    def _capture(self, sizes: Sizes) -> ChunkGraph:
        inputs = self._run_padding(sizes)  # compiles kernels, makes the libraries' handles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            hidden_TD, is_finite_S = self._forward(inputs, sizes)
        return ChunkGraph(sizes, inputs, graph, hidden_TD, is_finite_S)

    def _forward(self, inputs: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
        batch = self._builder.forward_batch(inputs, sizes, self._rows.last_ids_R)
        hidden_TD = self._model(batch, self._cache, self._ops)
        return hidden_TD, finite_rows(hidden_TD, batch.rows_T, sizes.rows)


def _fewest_tokens(tokens: int) -> int:
    """The smallest step that a graph with room for `tokens` serves."""
    if tokens > SMALL_TOKENS:
        return math.ceil(tokens / (1 + MAX_PADDED_SHARE))
    return (0, *TOKENS)[TOKENS.index(tokens)] + 1


def finite_rows(hidden_TD: Tensor, rows_T: Tensor, num_rows: int) -> Tensor:
    """Whether every hidden state of a row is finite [S]: what a NaN anywhere in its chunk would show in."""
    is_bad_T = (~hidden_TD.isfinite().all(dim=1)).to(torch.int32)
    num_bad_S = torch.zeros(num_rows, dtype=torch.int32, device=hidden_TD.device)
    return num_bad_S.index_add_(0, rows_T, is_bad_T) == 0
