"""Masks of ids: a masked id is as good as one without a logit, and a mask is one row's for as long as it runs."""

import pytest
import torch
from torch import Tensor

from lfm.engine.sampler import sample
from lfm.engine.sampling_rows import RowStart, SamplingRows
from lfm.kernels.penalties import pack_bits
from tests.sampler.batch import CPU, params

VOCAB = 200
WAYS = [
    params(temperature=0.0),
    params(temperature=0.7, top_k=20, min_p=0.05, repetition_penalty=1.3),
    params(temperature=1.0, top_p=0.8, presence_penalty=0.5, frequency_penalty=0.2),
    params(temperature=1.5, logit_bias={3: 5.0, 4: -100.0}),
    params(temperature=1.0, min_tokens=5, stop_token_ids=(7, 9)),
]


def started(way: int, count: int) -> SamplingRows:
    rows = SamplingRows(count, VOCAB, num_ids=VOCAB - 5, device=CPU)
    rows.start_many(
        [RowStart(row=row, params=WAYS[way], seed=row, ids=[1, 2, 3, 3], num_prompt=2) for row in range(count)]
    )
    return rows


def draw(rows: SamplingRows, logits: Tensor) -> list[int]:
    row_R = torch.arange(len(logits))
    flags = rows.flags(range(len(logits)))
    return sample(rows, logits, row_R=row_R, position_R=torch.full_like(row_R, 4), flags=flags).ids_R.tolist()


def packed(allowed_RV: Tensor) -> Tensor:
    return pack_bits(torch.nn.functional.pad(allowed_RV, (0, -allowed_RV.shape[1] % 32))).view(torch.int32)


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_masked_ids_are_as_good_as_ids_without_a_logit(way: int) -> None:
    random = torch.Generator().manual_seed(way)
    logits = torch.randn(24, VOCAB, generator=random) * 3
    allowed = torch.rand(24, VOCAB, generator=random) < 0.1
    allowed[:, 11] = True
    allowed[12:] = True  # half of the rows have no mask of their own
    rows = started(way, 24)
    rows.write_masks(list(range(12)), packed(allowed[:12]))
    assert rows.flags(range(24)).mask
    assert not rows.flags(range(12, 24)).mask
    ids = draw(rows, logits)
    assert ids == draw(started(way, 24), logits.masked_fill(~allowed, -torch.inf))
    assert all(allowed[row, token_id] for row, token_id in enumerate(ids))


def test_min_tokens_leaves_a_stop_id_that_alone_is_allowed() -> None:
    rows = started(4, 2)
    allowed = torch.zeros(2, VOCAB, dtype=torch.bool)
    allowed[0, 9] = allowed[1, 9] = allowed[1, 30] = True
    rows.write_masks([0, 1], packed(allowed))
    assert draw(rows, torch.zeros(2, VOCAB)) == [9, 30]


def test_a_row_that_allows_nothing_fails_alone() -> None:
    rows = started(0, 2)
    rows.write_masks([0], torch.zeros((1, 7), dtype=torch.int32))
    ids = draw(rows, torch.zeros(2, VOCAB))
    assert ids[0] == -1
    assert ids[1] >= 0


def test_a_row_that_starts_again_has_the_mask_of_its_own_sequence() -> None:
    rows = started(0, 2)
    rows.write_masks([0, 1], torch.zeros((2, 7), dtype=torch.int32))
    rows.start(RowStart(row=1, params=params(temperature=0.0, banned_ids=(0, 1)), seed=0, ids=[5], num_prompt=1))
    assert rows.flags([1]).mask
    assert draw(rows, torch.zeros(2, VOCAB))[1] == 2
    rows.start(RowStart(row=1, params=WAYS[0], seed=0, ids=[5], num_prompt=1))
    assert not rows.flags([1]).mask
    assert draw(rows, torch.zeros(2, VOCAB)) == [-1, 0]  # in one batch with a masked row


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_ids_that_were_not_sampled_are_marked_like_those_that_were(way: int) -> None:
    """Several ids share a byte of the bitmap, and some come more than once."""
    outputs = [[8, 9, 15, 9, 100], [], [3]]
    marked = started(way, 3)
    marked.mark([(row, ids) for row, ids in enumerate(outputs) if ids])
    anew = SamplingRows(3, VOCAB, num_ids=VOCAB - 5, device=CPU)
    anew.start_many(
        [RowStart(row=r, params=WAYS[way], seed=r, ids=[1, 2, 3, 3, *outputs[r]], num_prompt=2) for r in range(3)]
    )
    if WAYS[way].repetition_penalty != 1 or WAYS[way].frequency_penalty:
        assert marked.seen_RB.equal(anew.seen_RB)
    if WAYS[way].frequency_penalty:
        assert marked.counts_RV is not None
        assert anew.counts_RV is not None
        assert marked.counts_RV.equal(anew.counts_RV)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    assert draw(marked, logits) == draw(anew, logits)
