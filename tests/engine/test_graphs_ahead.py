"""Which graphs are captured before steps ask for them. What is captured is faked: that needs a GPU."""

import torch

from lfm.engine.batch import MAX_PADDING, BatchBuilder, Sizes
from lfm.engine.chunk_graphs import (
    MAX_PADDED_SHARE,
    ROWS,
    SMALL_TOKENS,
    SPARE_BYTES,
    TOKENS,
    ChunkGraph,
    ChunkGraphs,
)
from lfm.engine.graphs import BUCKETS, DecodeGraph, DecodeGraphs, Shape
from lfm.engine.sampling_rows import SamplingRows
from lfm.engine.sequence import Sequence
from lfm.engine.step import ScheduledBatch, ScheduledRow
from lfm.kernels.forward_batch import CacheTensors
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import REFERENCE
from lfm.model.presets import PRESETS
from lfm.protocol import EngineRequest, SamplingParams
from tests.engine.models import random_model

MAX_RUNNING = 40
NO_CACHE = CacheTensors([], [], [], 64)


class FakeGraph:
    def replay(self) -> None:
        pass


class FakeChunkGraphs(ChunkGraphs):
    fails = False
    free_bytes = 2 * SPARE_BYTES

    def _free_bytes(self) -> int:
        return self.free_bytes

    def _capture(self, sizes: Sizes) -> ChunkGraph:
        if self.fails:
            raise RuntimeError("out of memory")
        empty = torch.zeros(0)
        return ChunkGraph(sizes, empty, FakeGraph(), empty, empty)  # type: ignore[arg-type]


class FakeDecodeGraphs(DecodeGraphs):
    def _capture(self, shape: Shape) -> DecodeGraph:
        empty = torch.zeros(0)
        return DecodeGraph(shape, empty, [], FakeGraph(), empty, empty)  # type: ignore[arg-type]


def parts() -> tuple[Lfm2, SamplingRows, BatchBuilder]:
    device = torch.device("cpu")
    model = random_model(PRESETS["tiny"])
    rows = SamplingRows(MAX_RUNNING, model.config.vocab_size, num_ids=100, device=device)
    builder = BatchBuilder(max_running=MAX_RUNNING, step_tokens=4096, max_model_len=4096, block_size=64, device=device)
    return model, rows, builder


def step(num_tokens: int, num_rows: int) -> ScheduledBatch:
    """`num_rows` rows, all but the last of one token."""
    request = EngineRequest(request_id="r", prompt_ids=[1] * 4000, sampling=SamplingParams(max_tokens=1))
    sequence = Sequence(request, arrival=0, root_hash=b"")
    singles = [ScheduledRow(sequence, 5, 6, True)] * (num_rows - 1)
    last = ScheduledRow(sequence, 0, num_tokens - len(singles), False)
    return ScheduledBatch(rows=[*singles, last], started=[], num_single=len(singles))


def test_every_step_with_few_enough_tokens_finds_a_graph_once_all_are_there() -> None:
    model, rows, builder = parts()
    graphs = FakeChunkGraphs(model, NO_CACHE, rows, builder, REFERENCE)
    num_captured = 0
    while graphs.want_next():
        assert graphs.capture_wanted()
        num_captured += 1
    assert 0 < num_captured <= len(TOKENS) * len(ROWS)
    for num_tokens in (2, 3, 63, 64, 65, 300, 2047, 2048):
        for num_rows in (1, 2, 8, 9, 32, 33, MAX_RUNNING):
            if num_rows < num_tokens:
                graph = graphs.find(step(num_tokens, num_rows))
                assert graph is not None, (num_tokens, num_rows)
                assert graph.sizes.tokens >= num_tokens
                assert graph.sizes.rows > num_rows, "one row is padding"
                assert graph.sizes.rows != graph.sizes.tokens, "it would look like a decode step"
    assert graphs.find(step(2049, 1)) is None
    assert not graphs.capture_wanted(), "nothing was asked for in vain"


def test_a_step_without_a_graph_asks_for_one() -> None:
    model, rows, builder = parts()
    graphs = FakeChunkGraphs(model, NO_CACHE, rows, builder, REFERENCE)
    assert graphs.find(step(100, 3)) is None
    assert graphs.capture_wanted()
    assert graphs.find(step(120, 5)) is not None


def test_without_memory_for_graphs_steps_go_on_without() -> None:
    model, rows, builder = parts()
    graphs = FakeChunkGraphs(model, NO_CACHE, rows, builder, REFERENCE)
    graphs.fails = True
    assert graphs.want_next()
    assert graphs.capture_wanted()
    assert not graphs.want_next()
    assert graphs.find(step(100, 3)) is None
    assert not graphs.capture_wanted()


def test_decode_graphs_are_made_ahead_for_every_number_of_rows() -> None:
    model, rows, builder = parts()
    graphs = FakeDecodeGraphs(model, NO_CACHE, rows, builder, REFERENCE)
    while graphs.want_next():
        assert graphs.capture_wanted()
    assert graphs.shapes == [Shape(bucket, False) for bucket in BUCKETS if bucket <= MAX_RUNNING]


def test_a_large_step_has_a_graph_only_if_it_nearly_fills_it() -> None:
    model, rows, builder = parts()
    graphs = FakeChunkGraphs(model, NO_CACHE, rows, builder, REFERENCE)
    while graphs.want_next():
        graphs.capture_wanted()
    for num_tokens in (3972, 4000, 4095, 4096):
        graph = graphs.find(step(num_tokens, 3))
        assert graph is not None
        assert graph.sizes.tokens == 4096
    for num_tokens in (2049, 3000, 3971):
        assert graphs.find(step(num_tokens, 3)) is None, "padding would cost more than launches"
    assert not graphs.capture_wanted()


def test_no_graph_is_made_for_steps_that_cannot_occur() -> None:
    """The builder has room for steps of 4,096 tokens."""
    model, rows, builder = parts()
    graphs = FakeChunkGraphs(model, NO_CACHE, rows, builder, REFERENCE)
    while graphs.want_next():
        graphs.capture_wanted()
    assert {sizes.tokens for sizes in graphs._graphs} == {tokens for tokens in TOKENS if tokens <= 4096}


def test_large_graphs_leave_memory_free() -> None:
    model, rows, builder = parts()
    graphs = FakeChunkGraphs(model, NO_CACHE, rows, builder, REFERENCE)
    graphs.free_bytes = SPARE_BYTES - 1
    assert graphs.find(step(4096, 3)) is None
    assert graphs.capture_wanted()
    assert graphs.find(step(4096, 3)) is None
    assert not graphs.capture_wanted(), "it is not tried at every step"
    while graphs.want_next():
        graphs.capture_wanted()
    assert graphs.find(step(2048, 3)) is not None


def test_the_longest_padded_step_fits_the_upload_buffer() -> None:
    """Its inputs are padded on the host: as many tokens as the graph has room for."""
    for tokens in TOKENS:
        if tokens > SMALL_TOKENS:
            assert tokens - tokens / (1 + MAX_PADDED_SHARE) <= MAX_PADDING
