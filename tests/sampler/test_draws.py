"""Sampled frequencies, over many seeds, against the distribution that the filters leave; the filters against HF's."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lfm.engine.sampler import sample
from lfm.engine.sampling_rows import RowStart, SamplingRows
from lfm.protocol import SamplingParams
from tests.sampler.batch import CPU, params
from tests.sampler.statistics import chi_square_limit

FILTERS = [
    params(temperature=1.0),
    params(temperature=0.8),
    params(temperature=2.0, top_k=7),
    params(temperature=1.3, top_p=0.8),
    params(temperature=1.0, min_p=0.2),
    params(temperature=1.5, top_k=12, top_p=0.9, min_p=0.1),
    params(temperature=1.5, top_k=12, min_p=0.4),
    params(temperature=1.0, repetition_penalty=1.6, top_k=9),
    params(temperature=1.7, repetition_penalty=0.5, top_p=0.95),
]
PROMPT = [0, 3, 3, 8]


def frequencies(
    logits: list[float], given: SamplingParams, *, num_seeds: int, num_positions: int, first_seed: int = 0
) -> torch.Tensor:
    """How often each id is drawn at positions 4 .. by sequences that differ in their seed alone."""
    size = len(logits)
    rows = SamplingRows(num_seeds, size, num_ids=size, device=CPU)
    starts = [
        RowStart(row=row, params=given, seed=first_seed + row, ids=PROMPT, num_prompt=4) for row in range(num_seeds)
    ]
    counts = torch.zeros(size, dtype=torch.int64)
    row_R = torch.arange(num_seeds)
    for position in range(4, 4 + num_positions):
        rows.start_many(starts)  # forget what was drawn at the last position
        batch = torch.tensor([logits]).repeat(num_seeds, 1)
        flags = rows.flags([0])
        ids = sample(rows, batch, row_R=row_R, position_R=torch.full_like(row_R, position), flags=flags).ids_R
        counts += torch.bincount(ids, minlength=size)
    return counts.double()


def expected_by_transformers(logits: list[float], given: SamplingParams) -> torch.Tensor:
    """Probabilities after transformers' own processors, in its order."""
    scores = torch.tensor([logits], dtype=torch.float64)
    ids = torch.tensor([PROMPT])
    chain = [RepetitionPenaltyLogitsProcessor(given.repetition_penalty), TemperatureLogitsWarper(given.temperature)]
    chain += [TopKLogitsWarper(given.top_k)] if given.top_k else []
    chain += [TopPLogitsWarper(given.top_p)] if given.top_p < 1 else []
    chain += [MinPLogitsWarper(given.min_p)] if given.min_p else []
    for processor in chain:
        scores = processor(ids, scores)
    return scores[0].softmax(dim=0)


def assert_drawn_from(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * counts.sum()
    assert expected.min() > 5, expected
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic < chi_square_limit(max(1, int(possible.sum()) - 1))


@pytest.mark.parametrize("given", FILTERS, ids=range(len(FILTERS)))
def test_drawn_ids_follow_the_distribution_that_transformers_would_draw_from(given: SamplingParams) -> None:
    logits = (torch.randn(16, generator=torch.Generator().manual_seed(5)) * 1.5).tolist()
    counts = frequencies(logits, given, num_seeds=500, num_positions=40)
    assert_drawn_from(counts, expected_by_transformers(logits, given))


@pytest.mark.parametrize(("num_seeds", "num_positions"), [(1000, 1), (1, 1000)])
@pytest.mark.parametrize("first_seed", [0, 2**62])
def test_neighbouring_seeds_and_neighbouring_positions_are_independent_draws(
    num_seeds: int, num_positions: int, first_seed: int
) -> None:
    logits = torch.linspace(0, 2, 10).tolist()
    given = params(temperature=1.0)
    counts = frequencies(logits, given, num_seeds=num_seeds, num_positions=num_positions, first_seed=first_seed)
    assert_drawn_from(counts, torch.tensor(logits, dtype=torch.float64).softmax(dim=0))


def test_all_ids_of_a_large_flat_vocabulary_are_equally_likely() -> None:
    counts = frequencies([0.0] * 65_536, params(temperature=1.0), num_seeds=40, num_positions=10)
    regions = counts.view(8, -1).sum(dim=1)
    assert_drawn_from(regions, torch.full((8,), 1 / 8, dtype=torch.float64))
