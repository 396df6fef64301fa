"""The device rows: built from ids or grown token by token, they are the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm.engine.sampler import sample
from lfm.engine.sampling_rows import MAX_COUNT, RowStart, SamplingRows
from lfm.kernels.penalties import bits_of_bytes, pack_bits, unpack_bits
from lfm.protocol import SamplingParams
from tests.sampler.batch import CPU, Case, params, run

EVERYTHING = params(
    temperature=0.8,
    top_k=20,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    logit_bias={4: 1.5},
    min_tokens=3,
    stop_token_ids=(2, 9),
)


def steps(rows: SamplingRows, row: int, *, first: int, last: int) -> list[int]:
    """Sample positions first .. last - 1 of one sequence; the logits depend on the position alone."""
    ids = []
    for position in range(first, last):
        logits = torch.randn(1, rows.vocab_size, generator=torch.Generator().manual_seed(position)) * 2
        row_R, position_R = torch.tensor([row]), torch.tensor([position])
        output = sample(rows, logits, row_R=row_R, position_R=position_R, flags=rows.flags([row]))
        ids += output.ids_R.tolist()
    return ids


@pytest.mark.parametrize("preempted_at", [6, 7, 20, 39])
def test_a_resumed_sequence_goes_on_as_if_it_had_never_stopped(preempted_at: int) -> None:
    prompt = [1, 2, 3, 2, 1]
    start = RowStart(row=1, params=EVERYTHING, seed=11, ids=prompt, num_prompt=5)
    rows = SamplingRows(3, 61, num_ids=60, device=CPU)
    rows.start(start)
    whole = prompt + steps(rows, 1, first=5, last=40)

    resumed = SamplingRows(3, 61, num_ids=60, device=CPU)
    resumed.start(RowStart(row=2, params=params(temperature=1.0), seed=3, ids=list(range(60)), num_prompt=1))
    resumed.start(RowStart(row=2, params=EVERYTHING, seed=11, ids=whole[:preempted_at], num_prompt=5))
    assert whole[preempted_at:] == steps(resumed, 2, first=preempted_at, last=40)
    assert resumed.seen_RB[2].equal(rows.seen_RB[1])
    assert resumed.counts_RV is not None
    assert rows.counts_RV is not None
    assert resumed.counts_RV[2].equal(rows.counts_RV[1])
    assert resumed.last_ids_R[2] == rows.last_ids_R[1] == whole[-1]
    assert resumed.positions_R[2] == rows.positions_R[1] == 39


def test_a_row_starts_anew_whatever_its_last_sequence_left() -> None:
    rows = SamplingRows(2, 61, num_ids=60, device=CPU)
    strong = params(temperature=1.0, logit_bias={4: 100.0}, frequency_penalty=2.0, repetition_penalty=5.0)
    rows.start(RowStart(row=0, params=strong, seed=1, ids=[7, 8, 9], num_prompt=2))
    steps(rows, 0, first=3, last=30)
    plain = RowStart(row=0, params=params(temperature=1.0, min_p=0.01), seed=5, ids=[3, 4], num_prompt=1)
    rows.start(plain)
    fresh = SamplingRows(2, 61, num_ids=60, device=CPU)
    fresh.start(plain)
    assert rows.flags([0]) == fresh.flags([0])
    # A neighbour that needs everything makes the row go through all of it.
    for each in (rows, fresh):
        each.start(RowStart(row=1, params=EVERYTHING, seed=1, ids=[7], num_prompt=1))
    logits = torch.randn(2, 61, generator=torch.Generator().manual_seed(0))
    row_R, position_R = torch.tensor([0, 1]), torch.tensor([2, 1])
    flags = rows.flags([0, 1])
    found = [sample(each, logits, row_R=row_R, position_R=position_R, flags=flags).ids_R for each in (rows, fresh)]
    assert found[0].equal(found[1])


def test_the_pools_grow_without_losing_what_running_rows_have() -> None:
    rows = SamplingRows(3, 2000, num_ids=2000, device=CPU)
    greedy = params(temperature=0.0, logit_bias={1500: 50.0}, min_tokens=5, stop_token_ids=(3,))
    rows.start(RowStart(row=0, params=greedy, seed=0, ids=[0], num_prompt=1))
    many = params(
        temperature=0.0,
        logit_bias=dict.fromkeys(range(1024), -100.0),
        min_tokens=5,
        stop_token_ids=tuple(range(1024, 1100)),
    )
    rows.start(RowStart(row=1, params=many, seed=0, ids=[0], num_prompt=1))
    logits = torch.zeros(2, 2000)
    logits[:, 3] = 99.0
    logits[:, 1024] = 98.0
    one = torch.ones(2, dtype=torch.int64)
    flags = rows.flags([0, 1])
    ids = sample(rows, logits, row_R=torch.tensor([0, 1]), position_R=one, flags=flags).ids_R
    assert ids.tolist() == [1024, 1100]
    assert rows.bias.ids.shape == (4, 1024)
    assert rows.stops.ids.shape == (4, 128)


def test_a_padding_row_marks_only_the_scratch_row() -> None:
    case = Case(logits=[0.0, 1.0, 0.0], params=SamplingParams(max_tokens=9, temperature=0.0), ids=[2])
    _, rows = run([case], num_rows=3, at=[1], num_padding=4)
    assert rows.seen_RB[:3, 0].tolist() == [0, 0b110, 0]
    assert rows.last_ids_R[:3].tolist() == [0, 1, 0]


def test_an_output_count_stays_at_its_maximum_instead_of_turning_negative() -> None:
    often = params(temperature=0.0, frequency_penalty=1.0)
    case = Case(logits=[0.0, 1e9], params=often, ids=[1] * (MAX_COUNT + 10), num_prompt=1)
    output, rows = run([case])
    assert output.ids_R.tolist() == [1]
    assert rows.counts_RV is not None
    assert rows.counts_RV[0].tolist() == [0, MAX_COUNT]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"row": 2}, "row=2"),
        ({"row": -1}, "row=-1"),
        ({"ids": [3, 10]}, "ids holds ids from 3 to 10"),
        ({"ids": [-1, 3]}, "ids holds ids from -1 to 3"),
        ({"ids": []}, "num_prompt=1"),
        ({"num_prompt": 0}, "num_prompt=0"),
        ({"num_prompt": 3}, "num_prompt=3"),
        ({"params": params(logit_bias={10: 1.0})}, "logit_bias holds ids from 10 to 10"),
    ],
)
def test_a_start_out_of_range_is_refused_and_changes_nothing(given: dict, named: str) -> None:
    rows = SamplingRows(2, 10, num_ids=10, device=CPU)
    good = {"row": 0, "params": SamplingParams(max_tokens=1), "seed": 0, "ids": [1, 2], "num_prompt": 1}
    with pytest.raises(ValueError, match=named):
        rows.start_many([RowStart(**good), RowStart(**{**good, "row": 1, **given})])
    assert not rows.seen_RB.any()


def test_no_start_is_nothing() -> None:
    SamplingRows(2, 10, num_ids=10, device=CPU).start_many([])


def test_more_ids_than_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_ids=11 must lie in 1\.\.vocab_size=10"):
        SamplingRows(2, 10, num_ids=11, device=CPU)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32))
def test_a_bitmap_unpacks_to_what_was_packed(size: int, num_rows: int, seed: int) -> None:
    is_set = torch.rand(num_rows, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    bitmap = pack_bits(is_set)
    assert bitmap.shape == (num_rows, -(-size // 8))
    assert unpack_bits(bitmap, bits_of_bytes(CPU), size).bool().equal(is_set)
    assert all(((int(bitmap[0, i // 8]) >> i % 8) & 1) == is_set[0, i] for i in range(size))
