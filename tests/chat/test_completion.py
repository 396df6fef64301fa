"""A request of n choices as n engine requests: ids, seeds and bounds."""

import msgspec
import pytest

from lfm.chat.completion import requests_for
from lfm.errors import RequestError
from lfm.protocol import INT64_MAX, INT64_MIN, EngineRequest, GrammarSpec, SamplingParams

PARAMS = SamplingParams(max_tokens=5, temperature=0.7, stop_token_ids=(7,))


def seeds(requests: list[EngineRequest]) -> list[int | None]:
    return [request.sampling.seed for request in requests]


def test_choices_share_all_but_id_and_seed() -> None:
    sampling = msgspec.structs.replace(PARAMS, seed=100)
    requests = requests_for([1, 2], request_id="chatcmpl-a", sampling=sampling, n=3, tenant="t", priority=4)
    assert [request.request_id for request in requests] == ["chatcmpl-a-0", "chatcmpl-a-1", "chatcmpl-a-2"]
    assert seeds(requests) == [100, 101, 102]
    assert requests[2] == EngineRequest(
        request_id="chatcmpl-a-2",
        prompt_ids=[1, 2],
        sampling=msgspec.structs.replace(PARAMS, seed=102),
        tenant="t",
        priority=4,
    )


def test_several_prompts_number_their_choices_on_but_share_seeds() -> None:
    sampling = msgspec.structs.replace(PARAMS, seed=5)
    requests = requests_for([1], request_id="cmpl-a", sampling=sampling, n=2, first_choice=4)
    assert [request.request_id for request in requests] == ["cmpl-a-4", "cmpl-a-5"]
    assert seeds(requests) == [5, 6]


def test_without_a_seed_one_is_drawn_and_choices_differ() -> None:
    first, second = (seeds(requests_for([1], request_id="a", sampling=PARAMS, n=3)) for _ in range(2))
    assert len(set(first)) == 3
    assert first != second
    assert all(seed is not None and INT64_MIN <= seed <= INT64_MAX for seed in first + second)


def test_seeds_stay_within_64_bits() -> None:
    sampling = msgspec.structs.replace(PARAMS, seed=INT64_MAX)
    assert seeds(requests_for([1], request_id="a", sampling=sampling, n=2)) == [INT64_MAX, INT64_MIN]
    sampling = msgspec.structs.replace(PARAMS, seed=INT64_MIN)
    assert seeds(requests_for([1], request_id="a", sampling=sampling, n=2)) == [INT64_MIN, INT64_MIN + 1]


@pytest.mark.parametrize("n", [0, -1, 129, 10**9])
def test_n_outside_its_bounds_is_refused(n: int) -> None:
    with pytest.raises(RequestError, match=f"n={n} is out of range. Allowed: 1 to 128") as caught:
        requests_for([1], request_id="a", sampling=PARAMS, n=n)
    assert caught.value.param == "n"


@pytest.mark.parametrize("seed", [INT64_MAX + 1, INT64_MIN - 1])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(RequestError, match="out of range") as caught:
        requests_for([1], request_id="a", sampling=msgspec.structs.replace(PARAMS, seed=seed))
    assert caught.value.param == "seed"


def test_choices_share_one_grammar() -> None:
    grammar = GrammarSpec(text='start: "x"')
    requests = requests_for([1], request_id="a", sampling=PARAMS, n=2, grammar=grammar)
    assert [request.grammar is grammar for request in requests] == [True, True]
