"""What one step of the engine computes and what it answers: the hand-over objects of the scheduler. No torch here."""

from dataclasses import dataclass, field

import msgspec

from lfm.engine.sequence import Sequence
from lfm.protocol import TokenLogprob


class ScheduledRow(msgspec.Struct, frozen=True, gc=False):
    """One sequence's part of a step: positions [start, end), and whether the step samples its next id."""

    sequence: Sequence
    start: int
    end: int
    samples: bool


@dataclass(slots=True)
class ScheduledBatch:
    """What a step computes. Rows of one token come first. `started` names sequences whose device row begins anew.

    The first `num_single` rows compute the last token of their sequence and sample. That token was sampled last by the
    device row itself, but where `known_ids` has (index of the row, id).
    """

    rows: list[ScheduledRow]
    started: list[Sequence]
    num_single: int = 0
    repeats: bool = False  # the same sequences as in the step before, in order, each one token on
    known_ids: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.num_single + sum(row.end - row.start for row in self.rows[self.num_single :])

    @property
    def num_sampled(self) -> int:
        return self.num_single + sum(row.samples for row in self.rows[self.num_single :])


@dataclass(slots=True)
class StepResult:
    """A step's answer, on the host. All lists have one entry per row of the batch.

    `token_ids` is -1 where nothing was sampled. `is_finite` tells whether the row's hidden states and logits were.
    `prompt_logprobs`: per row index, the entries of positions start + 1 onwards that the chunk predicts.
    """

    token_ids: list[int]
    is_finite: list[bool]
    logprobs: list[TokenLogprob | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether every row is finite and none has log-probabilities of its new id."""
        return self.logprobs is None and all(self.is_finite)


@dataclass(slots=True)
class StepBudget:
    """The tokens that a step may still take. `reserve` is kept for `long`, the one prompt longer than a step that may
    advance, so that it and the short ones beside it each get half."""

    left: int
    longest: int  # a sequence with more positions to compute than this is long
    with_chunks: list[Sequence] = field(default_factory=list)  # running ones that need more than one position
    reserve: int = 0
    long: Sequence | None = None

    def reserve_for(self, long: Sequence) -> None:
        self.long = long
        self.reserve = (self.left + 1) // 2
        self.left -= self.reserve


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    corrupted_requests: int = 0
