"""Rows on disk come back as they were, in an order that a position alone determines."""

from pathlib import Path

import numpy as np
import pytest

from lfm.errors import UsageError
from lfm.train.dataset import Dataset, Row, write_manifest, write_shard
from lfm.train.steps import Position, StepReader
from tests.train.models import random_rows

LENGTHS = [5, 2, 9, 30, 3, 4, 17, 2, 6]


def stored(folder: Path, rows: list[Row], *, max_length: int = 100) -> Dataset:
    half = len(rows) // 2
    shards = [
        write_shard(folder, "a", rows[:half], max_length=max_length),
        write_shard(folder, "b", rows[half:], max_length=max_length),
    ]
    write_manifest(folder, shards, key={})
    return Dataset(folder)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = random_rows(LENGTHS, vocab=2**31 - 1, share=1.0)
    dataset = stored(tmp_path, rows)
    assert dataset.num_rows == len(rows)
    assert dataset.num_tokens == sum(LENGTHS)
    for index, row in enumerate(rows):
        assert dataset[index].ids.tolist() == row.ids.tolist()
        assert dataset[index].is_target.tolist() == row.is_target.tolist()


def test_rows_are_cut_and_those_without_a_target_left_out(tmp_path: Path) -> None:
    ids = np.arange(10)
    late, early = (np.isin(ids, [place]) for place in (8, 2))
    dataset = stored(tmp_path, [Row(ids, late), Row(ids, early), Row(ids, ids == 0)], max_length=5)
    assert dataset.num_rows == 1
    assert dataset[0].ids.tolist() == [0, 1, 2, 3, 4]
    assert sum(shard.num_dropped for shard in dataset.shards) == 2


def test_every_row_is_read_once_an_epoch_and_each_epoch_has_its_order(tmp_path: Path) -> None:
    rows = random_rows(LENGTHS, share=1.0)
    reader = StepReader(stored(tmp_path, rows), batch_tokens=40, accumulation=2, seed=3)
    position, seen = Position(), []
    while position.epoch < 2:
        step = reader.read(position)
        assert all(batch.num_tokens <= 40 for batch in step.batches)
        for batch in step.batches:
            seen += [
                tuple(part.tolist()) for part in batch.forward.ids_T.split(np.diff(batch.forward.row_starts).tolist())
            ]
        position = step.next_position
    expected = sorted(tuple(row.ids[:-1].tolist()) for row in rows)
    first, second = seen[: len(rows)], seen[len(rows) : 2 * len(rows)]
    assert sorted(first) == sorted(second) == expected
    assert first != second


def test_a_position_alone_says_what_comes_next(tmp_path: Path) -> None:
    dataset = stored(tmp_path, random_rows(LENGTHS))
    reader = StepReader(dataset, batch_tokens=40, accumulation=1, seed=3)
    position = Position()
    for _ in range(5):
        step = reader.read(position)
        position = step.next_position
    fresh = StepReader(dataset, batch_tokens=40, accumulation=1, seed=3).read(position)
    again = reader.read(position)
    assert fresh.next_position == again.next_position
    assert fresh.batches[0].forward.ids_T.tolist() == again.batches[0].forward.ids_T.tolist()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_processes_share_the_micro_batches_of_one_without_overlap(tmp_path: Path, num_ranks: int) -> None:
    dataset = stored(tmp_path, random_rows(LENGTHS))
    alone = StepReader(dataset, batch_tokens=40, accumulation=2 * num_ranks, seed=3)
    readers = [
        StepReader(dataset, batch_tokens=40, accumulation=2, seed=3, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    position = Position()
    for _ in range(4):
        whole, parts = alone.read(position), [reader.read(position) for reader in readers]
        expected = [batch.forward.ids_T.tolist() for batch in whole.batches]
        dealt = [part.batches[turn].forward.ids_T.tolist() for turn in range(2) for part in parts]
        assert dealt == expected
        for part in parts:
            assert (part.num_tokens, part.num_targets) == (whole.num_tokens, whole.num_targets)
            assert part.next_position == whole.next_position
        position = whole.next_position


def test_targets_are_counted_without_the_first_id_of_a_row(tmp_path: Path) -> None:
    rows = random_rows(LENGTHS)
    dataset = stored(tmp_path, rows)
    step = StepReader(dataset, batch_tokens=1000, accumulation=1, seed=0).read(Position(0, 0))
    count = len(step.batches[0].predicting_R)
    assert step.num_targets == count
    assert dataset.num_targets == sum(int(row.is_target[1:].sum()) for row in rows)


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    stored(tmp_path, random_rows(LENGTHS, share=1.0))
    path = tmp_path / "a.tokens"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(UsageError, match=r"a.tokens has \d+ bytes instead of \d+: it is truncated"):
        Dataset(tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match=r"a.tokens is missing"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UsageError, match="preparation did not end"):
        Dataset(tmp_path)


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no examples to learn from"):
        stored(tmp_path, [])
