"""The order in which training reads a dataset, and how rows become the micro-batches of a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lfm.errors import UsageError
from lfm.train.batches import BatchSize, TrainBatch, collate_ids, pinned
from lfm.train.dataset import Dataset, num_targets_in, unpack
from lfm.train.recipe import TrainRecipe

_MEAN_LENGTH = 128  # of rows, at least: where they are shorter, batches of one size are not full


def fixed_size(recipe: TrainRecipe) -> BatchSize:
    """The size of all micro-batches of a recipe, for work that is recorded once."""
    tokens, longest = recipe.batch.tokens, recipe.data.max_length - 1
    most_padding = -(-tokens // longest)
    return BatchSize(tokens, tokens // _MEAN_LENGTH + 1 + most_padding, longest, recipe.loss.chunk_tokens)


@dataclass(frozen=True, slots=True)
class Position:
    """How far training has read: `row` rows of the order of `epoch`."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class StepData:
    """This process's micro-batches of one optimizer step, and where the next step goes on.

    `num_tokens` and `num_targets` are those of the whole step, whichever process has them.
    """

    batches: tuple[TrainBatch, ...]
    next_position: Position
    num_tokens: int
    num_targets: int


class StepReader:
    """Cuts a dataset into steps. Stateless but for a kept permutation: a position alone says what comes next.

    Every epoch has an order of its own, drawn from the seed and the epoch's number. Rows go into a micro-batch in that
    order until the next one does not fit. With a `size`, as on a GPU, all micro-batches have that size, in pinned
    memory. Of `num_ranks` processes, each reads `accumulation` of a step's micro-batches in turn: together they do the
    step that one process would do with an accumulation of `num_ranks` times as many.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_tokens: int,
        accumulation: int,
        seed: int,
        size: BatchSize | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        num_held_back: int = 0,
    ) -> None:
        """`num_held_back`: rows at the end of the dataset that are never trained on, but validated with."""
        self.num_rows = dataset.num_rows - num_held_back
        if self.num_rows < 1:
            raise UsageError(
                f"data.validation_rows={num_held_back} leaves none of the {dataset.num_rows} rows to train on. "
                "Hold back fewer."
            )
        self._rank, self._num_ranks = rank, num_ranks
        self._size = size
        self._max_rows = batch_tokens if size is None else size.rows - -(-size.tokens // size.positions)
        self._dataset, self._batch_tokens, self._accumulation, self._seed = dataset, batch_tokens, accumulation, seed
        self._epoch = -1
        self._order: list[int] = []

    def read(self, position: Position) -> StepData:
        """The step that begins at `position`."""
        batches = []
        num_tokens = num_targets = 0
        for number in range(self._accumulation * self._num_ranks):
            rows, position = self._fill(position)
            num_tokens += sum(len(row) - 1 for row in rows)
            if number % self._num_ranks != self._rank:
                num_targets += sum(num_targets_in(row) for row in rows)
                continue
            batches.append(self._packed(rows))
            num_targets += batches[-1].num_targets
        return StepData(tuple(batches), position, num_tokens, num_targets)

    def validation_batches(self) -> Iterator[TrainBatch]:
        """What is held back, in its order."""
        rows: list[np.ndarray] = []
        num_tokens = 0
        for index in range(self.num_rows, self._dataset.num_rows):
            row = self._dataset.packed(index)
            num_tokens += len(row) - 1
            if rows and (num_tokens > self._batch_tokens or len(rows) == self._max_rows):
                yield self._packed(rows)
                rows, num_tokens = [], len(row) - 1
            rows.append(row)
        if rows:
            yield self._packed(rows)

    def _packed(self, rows: Sequence[np.ndarray]) -> TrainBatch:
        ids, is_target = unpack(np.concatenate(rows))
        batch = collate_ids(ids, is_target, [len(row) for row in rows], size=self._size)
        return batch if self._size is None else pinned(batch)

    def _fill(self, position: Position) -> tuple[list[np.ndarray], Position]:
        rows: list[np.ndarray] = []
        num_tokens = 0
        while True:
            row = self._row(position)
            num_tokens += len(row) - 1
            if num_tokens > self._batch_tokens or len(rows) == self._max_rows:
                return rows, position
            rows.append(row)
            is_last = position.row + 1 == self.num_rows
            position = Position(position.epoch + 1, 0) if is_last else Position(position.epoch, position.row + 1)

    def _row(self, position: Position) -> np.ndarray:
        if position.epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, position.epoch]))
            self._epoch, self._order = position.epoch, generator.permutation(self.num_rows).tolist()
        return self._dataset.packed(self._order[position.row])
