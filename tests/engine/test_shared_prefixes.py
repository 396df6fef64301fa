"""Which rows of decode steps are attended together over shared blocks, as sequences come, grow and are preempted."""

import numpy as np
import torch

from lfm.engine.batch import BatchBuilder, Ints, device_rows_of, ends_of
from lfm.engine.graphs import SharedPrefixes
from lfm.engine.sequence import Sequence
from lfm.engine.step import ScheduledBatch, ScheduledRow
from lfm.protocol import EngineRequest, SamplingParams

BLOCK, ROWS, SHARED = 4, 32, 40


def make() -> tuple[BatchBuilder, SharedPrefixes, list[Sequence]]:
    """32 sequences whose first 40 blocks are the same."""
    builder = BatchBuilder(
        max_running=ROWS, step_tokens=64, max_model_len=400, block_size=BLOCK, device=torch.device("cpu")
    )
    sequences = []
    for row in range(ROWS):
        request = EngineRequest(request_id=str(row), prompt_ids=[1], sampling=SamplingParams(max_tokens=1))
        sequence = Sequence(request, arrival=row, root_hash=b"")
        sequence.row = row
        sequence.block_table = [*range(1, SHARED + 1), 1000 + row]
        sequences.append(sequence)
    return builder, SharedPrefixes(builder), sequences


def step(
    builder: BatchBuilder, sequences: list[Sequence], *, started: list[Sequence] | None = None
) -> tuple[Ints, Ints]:
    """A decode step of these sequences, as device rows and positions."""
    rows = [
        ScheduledRow(sequence, len(sequence.block_table) * BLOCK - 1, len(sequence.block_table) * BLOCK, True)
        for sequence in sequences
    ]
    batch = ScheduledBatch(rows=rows, started=started or [], num_single=len(rows))
    device_rows, ends = device_rows_of(rows), ends_of(rows)
    builder.tables.extend(batch, device_rows, ends)
    return device_rows, ends - 1


def test_rows_with_equal_leading_blocks_are_grouped_once() -> None:
    builder, prefixes, sequences = make()
    groups = prefixes.of(*step(builder, sequences, started=sequences))
    assert groups is not None
    assert (groups.blocks_S == SHARED).all()
    rows = groups.tiles_YX[groups.tiles_YX >= 0]
    assert sorted(rows.tolist()) == list(range(ROWS))
    for sequence in sequences:
        sequence.block_table += [2000 + sequence.row]  # a table that grows is the same table
    assert prefixes.of(*step(builder, sequences)) is groups


def test_a_preempted_sequence_that_came_back_elsewhere_is_looked_at_again() -> None:
    """Between two decode steps of the same rows it may have been computed anew, in blocks of its own."""
    builder, prefixes, sequences = make()
    before = prefixes.of(*step(builder, sequences, started=sequences))
    sequences[5].block_table = [*range(3000, 3000 + SHARED + 1)]
    after = prefixes.of(*step(builder, sequences, started=[sequences[5]]))
    assert after is not before
    assert after is not None
    assert after.blocks_S[5] == 0
    assert 5 not in after.tiles_YX
    assert (np.delete(after.blocks_S, 5) == SHARED).all()


def test_rows_that_share_nothing_are_not_grouped() -> None:
    builder, prefixes, sequences = make()
    for sequence in sequences:
        sequence.block_table = [100 * sequence.row + i for i in range(SHARED)]
    assert prefixes.of(*step(builder, sequences, started=sequences)) is None
