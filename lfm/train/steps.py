"""The order in which training reads a dataset, and how rows become the micro-batches of a step."""

from dataclasses import dataclass

import numpy as np

from lfm.train.batches import BatchSize, TrainBatch, collate_ids, pinned
from lfm.train.dataset import Dataset, unpack
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
    """The micro-batches of one optimizer step, and where the next step goes on."""

    batches: tuple[TrainBatch, ...]
    next_position: Position

    @property
    def num_targets(self) -> int:
        return sum(batch.num_targets for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)


class StepReader:
    """Cuts a dataset into steps. Stateless but for a kept permutation: a position alone says what comes next.

    Every epoch has an order of its own, drawn from the seed and the epoch's number. Rows go into a micro-batch in that
    order until the next one does not fit. With a `size`, as on a GPU, all micro-batches
    have that size, in pinned memory.
    """

    def __init__(
        self, dataset: Dataset, *, batch_tokens: int, accumulation: int, seed: int, size: BatchSize | None = None
    ) -> None:
        self._size = size
        self._max_rows = batch_tokens if size is None else size.rows - -(-size.tokens // size.positions)
        self._dataset, self._batch_tokens, self._accumulation, self._seed = dataset, batch_tokens, accumulation, seed
        self._epoch = -1
        self._order: list[int] = []

    def read(self, position: Position) -> StepData:
        """The step that begins at `position`."""
        batches = []
        for _ in range(self._accumulation):
            rows, position = self._fill(position)
            ids, is_target = unpack(np.concatenate(rows))
            batch = collate_ids(ids, is_target, [len(row) for row in rows], size=self._size)
            batches.append(batch if self._size is None else pinned(batch))
        return StepData(tuple(batches), position)

    def _fill(self, position: Position) -> tuple[list[np.ndarray], Position]:
        rows: list[np.ndarray] = []
        num_tokens = 0
        while True:
            row = self._row(position)
            num_tokens += len(row) - 1
            if num_tokens > self._batch_tokens or len(rows) == self._max_rows:
                return rows, position
            rows.append(row)
            is_last = position.row + 1 == self._dataset.num_rows
            position = Position(position.epoch + 1, 0) if is_last else Position(position.epoch, position.row + 1)

    def _row(self, position: Position) -> np.ndarray:
        if position.epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, position.epoch]))
            self._epoch, self._order = position.epoch, generator.permutation(self._dataset.num_rows).tolist()
        return self._dataset.packed(self._order[position.row])
