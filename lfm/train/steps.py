"""The order in which training reads a dataset, and how rows become the micro-batches of a step."""

from dataclasses import dataclass

import numpy as np

from lfm.train.batches import TrainBatch, collate
from lfm.train.dataset import Dataset, Row


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
    order until the next one does not fit.
    """

    def __init__(self, dataset: Dataset, *, batch_tokens: int, accumulation: int, seed: int) -> None:
        self._dataset, self._batch_tokens, self._accumulation, self._seed = dataset, batch_tokens, accumulation, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def read(self, position: Position) -> StepData:
        """The step that begins at `position`."""
        batches = []
        for _ in range(self._accumulation):
            rows, position = self._fill(position)
            batches.append(collate(rows))
        return StepData(tuple(batches), position)

    def _fill(self, position: Position) -> tuple[list[Row], Position]:
        rows: list[Row] = []
        num_tokens = 0
        while True:
            row = self._row(position)
            num_tokens += len(row.ids) - 1
            if num_tokens > self._batch_tokens:
                return rows, position
            rows.append(row)
            is_last = position.row + 1 == self._dataset.num_rows
            position = Position(position.epoch + 1, 0) if is_last else Position(position.epoch, position.row + 1)

    def _row(self, position: Position) -> Row:
        if position.epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, position.epoch]))
            self._epoch, self._order = position.epoch, generator.permutation(self._dataset.num_rows)
        return self._dataset[int(self._order[position.row])]
