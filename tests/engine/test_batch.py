"""A step's inputs, exact and padded to the room of a graph, and block tables that grow."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from lfm.engine.batch import BatchBuilder, Sizes, device_rows_of, ends_of
from lfm.engine.sequence import Sequence
from lfm.engine.step import ScheduledBatch, ScheduledRow
from lfm.kernels.forward_batch import SCRATCH_BLOCK, ForwardBatch
from lfm.protocol import EngineRequest, SamplingParams

BLOCK, MAX_RUNNING = 4, 6


class Row(NamedTuple):
    """A chunk of a sequence that has `num_ids` ids."""

    num_ids: int
    start: int
    end: int


# A decode row whose id only the device knows, one whose id is known, a whole prompt, a chunk in the middle of one.
ROWS = (Row(9, 9, 10), Row(5, 4, 5), Row(7, 0, 7), Row(30, 5, 18))


def make_batch(rows: tuple[Row, ...] = ROWS) -> ScheduledBatch:
    scheduled = []
    for index, row in enumerate(rows):
        request = EngineRequest(
            request_id=str(index), prompt_ids=list(range(100, 100 + row.num_ids)), sampling=SamplingParams(max_tokens=9)
        )
        sequence = Sequence(request, arrival=index, root_hash=b"")
        sequence.row = MAX_RUNNING - 1 - index
        sequence.block_table = [10 * index + i + 1 for i in range(-(-row.num_ids // BLOCK) + 1)]
        scheduled.append(ScheduledRow(sequence, row.start, row.end, row.end >= row.num_ids))
    return ScheduledBatch(rows=scheduled, started=[row.sequence for row in scheduled], num_single=2)


def make_builder(batch: ScheduledBatch) -> BatchBuilder:
    builder = BatchBuilder(
        max_running=MAX_RUNNING, step_tokens=64, max_model_len=64, block_size=BLOCK, device=torch.device("cpu")
    )
    builder.tables.extend(batch, device_rows_of(batch.rows), ends_of(batch.rows))
    return builder


def last_ids() -> torch.Tensor:
    return torch.arange(500, 501 + MAX_RUNNING)


@pytest.mark.parametrize("room", [Sizes(22, 5, 12), Sizes(32, 7, 20), Sizes(64, 6, 40)], ids=str)
def test_padded_inputs_are_the_exact_ones_and_scratch(room: Sizes) -> None:
    batch = make_batch()
    builder = make_builder(batch)
    exact_step = builder.build(batch, last_ids())
    exact = exact_step.forward
    assert exact is not None
    inputs = torch.full((room.num_ints,), -7)
    step = builder.build(batch, last_ids(), room=room, into=inputs)
    assert step.forward is None
    padded = builder.forward_batch(inputs, room, last_ids())
    used = Sizes(len(exact.ids_T), len(ROWS), len(exact.tail_write_W))
    for name, count in fields_of(used).items():
        assert torch.equal(getattr(padded, name)[:count], getattr(exact, name)[:count]), name
    num_blocks = exact.block_tables_SN.shape[1]
    assert torch.equal(padded.block_tables_SN[: used.rows, :num_blocks], exact.block_tables_SN)
    check_padding(padded, room, used)
    for name in ("sample_T", "sampled_rows_R", "sampled_positions_R"):
        assert torch.equal(getattr(step, name), getattr(exact_step, name)), name
    assert (step.row_starts, step.sampled_S) == (exact_step.row_starts, exact_step.sampled_S)
    assert exact.ids_T[0] == 500 + MAX_RUNNING - 1  # the device's own last sample


def fields_of(used: Sizes) -> dict[str, int]:
    tokens = dict.fromkeys(("ids_T", "positions_T", "rows_T", "slots_T"), used.tokens)
    rows = dict.fromkeys(("starts_S", "tail_read_S"), used.rows) | {"row_starts_S1": used.rows + 1}
    return tokens | rows | dict.fromkeys(("tail_write_W", "tail_token_W"), used.writes)


def check_padding(padded: ForwardBatch, room: Sizes, used: Sizes) -> None:
    assert padded.is_real_T is not None
    assert padded.is_real_T.tolist() == [1] * used.tokens + [0] * (room.tokens - used.tokens)
    assert (padded.rows_T[used.tokens :] == room.rows - 1).all()
    assert (padded.positions_T[used.tokens :] == 0).all()
    assert (padded.slots_T[used.tokens :] // BLOCK == SCRATCH_BLOCK).all()
    assert (padded.row_starts_S1[used.rows :] == used.tokens).all(), "padding rows have no tokens"
    assert (padded.block_tables_SN[used.rows :] == SCRATCH_BLOCK).all()
    assert (padded.tail_read_S[used.rows :] == SCRATCH_BLOCK).all()
    assert (padded.tail_write_W[used.writes :] == SCRATCH_BLOCK).all()
    assert (padded.tail_token_W < room.tokens).all()


def test_nothing_but_padding_names_nothing_but_scratch() -> None:
    room = Sizes(16, 3, 7)
    builder = make_builder(make_batch())
    padded = builder.forward_batch(torch.from_numpy(builder.padding(room)), room, last_ids())
    check_padding(padded, room, Sizes(0, 0, 0))


def test_the_largest_step_has_room_for_its_inputs() -> None:
    rows = (*[Row(4, 3, 4)] * 5, Row(60, 0, 59))
    batch = make_batch(rows)
    step = make_builder(batch).build(batch, last_ids())
    assert step.forward is not None
    assert len(step.forward.ids_T) == 64


def test_tables_take_in_what_a_row_got_since_its_last_step() -> None:
    batch = make_batch()
    builder = make_builder(batch)
    sequence = batch.rows[0].sequence
    sequence.block_table += [41, 42]
    later = ScheduledBatch(rows=[ScheduledRow(sequence, 16, 17, True)], started=[], num_single=1)
    builder.tables.extend(later, device_rows_of(later.rows), ends_of(later.rows))
    table = sequence.block_table
    assert builder.tables.host[sequence.row, : len(table)].tolist() == table
    assert builder.tables.device[sequence.row, : len(table)].tolist() == table


def test_a_row_that_begins_anew_gets_its_new_blocks() -> None:
    batch = make_batch()
    builder = make_builder(batch)
    starts = builder.tables.num_starts
    sequence = batch.rows[2].sequence
    sequence.block_table = [51, 52, 53]
    again = ScheduledBatch(rows=[ScheduledRow(sequence, 0, 7, True)], started=[sequence])
    builder.tables.extend(again, device_rows_of(again.rows), ends_of(again.rows))
    assert builder.tables.num_starts == starts + 1
    assert builder.tables.host[sequence.row, :3].tolist() == [51, 52, 53]
    assert np.array_equal(builder.tables.host[:-1], builder.tables.device[:-1].numpy())
