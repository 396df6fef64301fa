"""The batched sampler against the naive one, and what each parameter means."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.engine.sampling_rows import SampleFlags, flags_of
from tests.sampler.batch import Case, ids_of, params, run
from tests.sampler.naive import naive_sample
from tests.sampler.strategies import batches

NAN, INF = math.nan, math.inf
# The default of the 24B model, and one parameter set for each way through the sampler.
DEFAULT = params(temperature=0.1, top_k=50, repetition_penalty=1.05)
WAYS = [
    params(temperature=0.0),
    DEFAULT,
    params(temperature=1.0),
    params(temperature=0.3, min_p=0.15, repetition_penalty=1.05),
    params(temperature=0.7, top_p=0.9),
    params(temperature=0.7, top_k=1500),
    params(temperature=1.0, presence_penalty=1.0, frequency_penalty=0.5),
    params(temperature=1.0, logit_bias={3: 5.0}, min_tokens=2, stop_token_ids=(1,)),
]


def random_case(number: int, way: int, *, size: int = 3000) -> Case:
    random = torch.Generator().manual_seed(number)
    logits = torch.randn(size, generator=random, dtype=torch.float64) * 3
    ids = torch.randint(0, size, (20 + number,), generator=random).tolist()
    return Case(logits=logits.tolist(), params=WAYS[way % len(WAYS)], seed=number, ids=ids, num_prompt=10)


def naive_of(case: Case, num_ids: int, logits: list[float] | None = None):
    return naive_sample(
        logits or case.logits,
        case.params,
        seed=case.seed,
        ids=case.ids,
        num_prompt=case.num_prompt,
        num_ids=num_ids,
    )


@settings(max_examples=4 * settings.default.max_examples)
@given(batches(), st.randoms(use_true_random=False), st.integers(0, 2))
def test_a_batch_samples_what_the_naive_loop_samples_for_each_row(batch, random, num_padding) -> None:
    cases, num_ids = batch
    expected = [naive_of(case, num_ids) for case in cases]
    at = random.sample(range(8), len(cases))
    found = ids_of(cases, num_ids=num_ids, num_rows=8, at=at, num_padding=num_padding)
    for case, token, naive in zip(cases, found, expected, strict=True):
        assert token == naive.id or naive.margin < 1e-9, (case, naive)


def test_float32_logits_sample_the_same_ids_unless_a_decision_is_close() -> None:
    cases = [random_case(number, number) for number in range(64)]
    logits = [torch.tensor(case.logits, dtype=torch.float32).tolist() for case in cases]
    expected = [naive_of(case, 2900, float32) for case, float32 in zip(cases, logits, strict=True)]
    found = ids_of(cases, num_ids=2900, dtype=torch.float32)
    clear = [i for i, naive in enumerate(expected) if naive.margin > 1e-5]
    assert len(clear) > 40
    assert [found[i] for i in clear] == [expected[i].id for i in clear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours_its_row_or_padding(dtype: torch.dtype) -> None:
    cases = [random_case(number, number) for number in range(24)]
    together = ids_of(cases, dtype=dtype)
    alone = [ids_of([case], dtype=dtype, num_rows=30, at=[29 - i])[0] for i, case in enumerate(cases)]
    assert alone == together
    backwards = ids_of(cases[::-1], dtype=dtype, num_padding=5)
    assert backwards[::-1] == together


def test_flags_of_more_than_a_batch_needs_change_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [random_case(number, way) for way in range(len(WAYS)) for number in range(3)]
    everything = run(cases)[0].ids_R.tolist()
    assert everything == [ids_of([case])[0] for case in cases]
    for k in (256, 1024):
        monkeypatch.setattr("lfm.engine.sampling_rows.NARROW_BUCKETS", (k, 1024))
        assert ids_of(cases) == everything


def test_passes_over_few_rows_give_what_one_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [random_case(number, number) for number in range(16)]
    for case in cases:
        case.params = params(temperature=1.0, logprobs=3)
    whole = run(cases)[0]
    monkeypatch.setattr("lfm.engine.sampler.CPU_PASS", 3 * 3000)
    parts = run(cases)[0]
    assert parts.ids_R.equal(whole.ids_R)
    assert parts.logprobs is not None
    assert whole.logprobs is not None
    assert all(part.equal(one) for part, one in zip(parts.logprobs, whole.logprobs, strict=True))


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_logits_are_left_as_they_were(way: int) -> None:
    case = random_case(1, way)
    _, rows = run([case])
    logits = torch.tensor([case.logits], dtype=torch.float32)
    before = logits.clone()
    from lfm.engine.sampler import sample

    one = torch.zeros(1, dtype=torch.int64)
    sample(rows, logits, row_R=one, position_R=one + 9, flags=rows.flags([0])._replace(num_logprobs=2))
    assert logits.equal(before)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_a_row_with_nan_or_inf_fails_alone(bad: float, way: int) -> None:
    cases = [random_case(number, way) for number in range(3)]
    healthy = ids_of(cases)
    cases[1].logits[1234] = bad
    assert ids_of(cases) == [healthy[0], -1, healthy[2]]
    cases[1].logits = [NAN] * 3000
    assert ids_of(cases) == [healthy[0], -1, healthy[2]]


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_a_row_without_any_allowed_id_fails_alone(way: int) -> None:
    cases = [random_case(number, way) for number in range(3)]
    healthy = ids_of(cases, num_ids=2000)
    cases[1].logits[:2000] = [-INF] * 2000  # what is left has no text
    assert ids_of(cases, num_ids=2000) == [healthy[0], -1, healthy[2]]


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_the_only_allowed_id_is_sampled(way: int) -> None:
    case = random_case(0, way)
    case.logits = [-INF] * 3000
    case.logits[777] = -1e30
    assert ids_of([case], dtype=torch.float32) == [777]


def test_a_row_that_is_not_ok_fails_and_is_marked_nowhere() -> None:
    cases = [Case(logits=[0.0, 5.0, 0.0], params=params(temperature=0.0), ids=[2, 2]) for _ in range(2)]
    output, rows = run(cases, ok=[False, True])
    assert output.ids_R.tolist() == [-1, 1]
    assert rows.last_ids_R[:2].tolist() == [0, 1]
    assert rows.positions_R[:2].tolist() == [2, 2]
    assert rows.seen_RB[:2, 0].tolist() == [0b100, 0b110]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_takes_the_lowest_of_equal_ids(dtype: torch.dtype) -> None:
    logits = [0.0] * 5000
    for i in (4999, 77, 1500):
        logits[i] = 3.0
    greedy = Case(logits=logits, params=params(temperature=0.0))
    assert ids_of([greedy], dtype=dtype) == [77]
    assert ids_of([greedy, Case(logits=logits, params=DEFAULT)], dtype=dtype)[0] == 77


def test_a_tiny_temperature_is_greedy() -> None:
    assert ids_of([Case(logits=[0.0, 1.0, 1.0], params=params(temperature=1e-30))], dtype=torch.float32) == [1]


def test_top_k_1_is_greedy_whatever_the_temperature() -> None:
    cases = [Case(logits=[0.0, 1.0, 1.0], params=params(temperature=2.0, top_k=1), seed=seed) for seed in range(32)]
    assert ids_of(cases) == [1] * 32


@pytest.mark.parametrize("top_k", [100, 101, 1024, 1025, 2**31])
def test_a_top_k_of_the_whole_vocabulary_keeps_everything(top_k: int) -> None:
    logits = torch.linspace(0, 1, 100).tolist()
    cases = [Case(logits=logits, params=params(temperature=1.0, top_k=top_k), seed=seed) for seed in range(64)]
    off = [Case(logits=logits, params=params(temperature=1.0), seed=seed) for seed in range(64)]
    assert ids_of(cases) == ids_of(off)


@pytest.mark.parametrize(
    ("given", "num_kept"),
    [
        (params(temperature=1.0, top_k=3), 3),
        (params(temperature=1.0, top_k=1500), 1500),
        (params(temperature=1.0, top_k=1000, top_p=0.0035), 4),
        (params(temperature=1.0, top_p=3.5 / 2000), 4),  # the crossing token is kept
        (params(temperature=1.0, top_p=1e-9), 1),
        (params(temperature=1.0, top_p=1e-9, min_p=1.0), 1),
    ],
)
def test_of_equal_ids_the_filters_keep_the_lowest(given, num_kept: int) -> None:
    cases = [Case(logits=[1.0] * 2000, params=given, seed=seed) for seed in range(100)]
    found = set(ids_of(cases, dtype=torch.float32))
    assert max(found) < num_kept
    assert len(found) >= min(num_kept, 80)


def test_padded_ids_are_never_sampled_unless_the_row_lets_them_through() -> None:
    logits = [0.0, 1.0, 9.0]
    cases = [Case(logits=logits, params=params(temperature=t, logit_bias={2: 100.0})) for t in (0.0, 1.0)]
    assert 2 not in ids_of(cases, num_ids=2)
    for case in cases:
        case.mask_padded_ids = False
    assert ids_of(cases, num_ids=2) == [2, 2]


def test_logit_bias_of_100_forces_and_bans() -> None:
    logits = [0.0, 5.0, -5.0, 4.0]
    forced = Case(logits=logits, params=params(temperature=1.0, logit_bias={2: 100.0}))
    banned = Case(logits=logits, params=params(temperature=1.0, logit_bias={0: -100.0, 1: -100.0, 3: -100.0}))
    neither = Case(logits=logits, params=params(temperature=0.0))
    assert ids_of([forced, banned, neither]) == [2, 2, 1]


def test_min_tokens_masks_stop_ids_until_the_output_is_long_enough() -> None:
    held_back = params(temperature=0.0, min_tokens=2, stop_token_ids=(1, 3, 99))  # 99 is beyond the vocabulary
    short = Case(logits=[0.0, 5.0, 1.0, 5.0], params=held_back, ids=[0, 0, 0], num_prompt=2)
    long = Case(logits=[0.0, 5.0, 1.0, 5.0], params=held_back, ids=[0, 0, 0, 0], num_prompt=2)
    assert ids_of([short, long]) == [2, 1]


def test_min_tokens_gives_way_where_only_stop_ids_are_left() -> None:
    held_back = params(temperature=0.0, min_tokens=2, stop_token_ids=(1, 2))
    assert ids_of([Case(logits=[-INF, 1.0, 2.0], params=held_back)]) == [2]


def test_repetition_penalty_counts_prompt_and_output_and_depends_on_the_sign() -> None:
    penalised = params(temperature=0.0, repetition_penalty=2.0)
    positive = Case(logits=[6.0, 5.0, 4.0], params=penalised, ids=[0, 1], num_prompt=1)  # 3, 2.5, 4
    negative = Case(logits=[-1.0, -1.5, -1.9], params=penalised, ids=[0, 2], num_prompt=2)  # -2, -1.5, -3.8
    assert ids_of([positive, negative]) == [2, 1]


def test_presence_and_frequency_penalties_count_output_only() -> None:
    often = params(temperature=0.0, frequency_penalty=1.0)
    once = params(temperature=0.0, presence_penalty=1.0)
    logits = [2.5, 0.0, 1.0]
    prompt_only = Case(logits=logits, params=often, ids=[0, 0, 0], num_prompt=3)
    output_twice = Case(logits=logits, params=often, ids=[0, 0, 0], num_prompt=1)  # 2.5 - 2
    present = Case(logits=logits, params=once, ids=[0, 0, 0], num_prompt=1)  # 2.5 - 1
    neutral = Case(logits=logits, params=params(temperature=0.0), ids=[0, 0, 0], num_prompt=1)
    assert ids_of([prompt_only, output_twice, present, neutral]) == [0, 2, 0, 0]


def test_choices_with_different_seeds_differ_and_the_same_seed_repeats() -> None:
    cases = [Case(logits=[0.0] * 4096, params=params(temperature=1.0), seed=seed) for seed in [*range(100), 5]]
    ids = ids_of(cases)
    assert len(set(ids[:100])) > 95
    assert ids[100] == ids[5]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (params(temperature=0.0, top_k=50, top_p=0.5), SampleFlags()),
        (DEFAULT, SampleFlags(repetition=True, narrow_k=64)),
        (params(temperature=1.0, top_k=65), SampleFlags(narrow_k=256)),
        (params(temperature=1.0, min_p=0.1), SampleFlags(wide=True)),
        (params(temperature=1.0, top_p=0.9, top_k=2000), SampleFlags(wide=True, wide_prefix=True)),
        (params(temperature=0.0, frequency_penalty=-1.0, logprobs=0), SampleFlags(counts=True, num_logprobs=0)),
        (params(temperature=0.0, min_tokens=3), SampleFlags()),
        (params(temperature=0.0, min_tokens=3, stop_token_ids=(7,)), SampleFlags(min_tokens=True)),
        (params(temperature=0.0, logit_bias={1: 1.0}), SampleFlags(bias=True)),
    ],
)
def test_flags_name_the_parts_that_a_row_needs(given, expected: SampleFlags) -> None:
    assert flags_of(given) == expected
