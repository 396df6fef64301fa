"""The engine's manners: refusals, aborts, log-probabilities, numbers that are not finite, many streams at once."""

import random
from dataclasses import replace

import msgspec
import pytest
import torch

from lfm.engine.engine import Engine
from lfm.errors import OverloadedError, RequestError
from lfm.model.full_forward import full_logits
from lfm.protocol import EngineRequest, SamplingParams, TokenEvent
from tests.engine.models import (
    DEVICES,
    EOS,
    NUM_IDS,
    VOCAB,
    make_engine,
    make_plan,
    make_request,
    naive_loop,
    random_model,
    run_all,
    tiny_config,
)

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, seed=0)


def engine_with(*, overlap: bool = True, device: str = "cpu", **changes: int | bool) -> Engine:
    return make_engine(random_model(tiny_config(), device=device), make_plan(**changes), overlap=overlap)


def with_sampling(**changes: object) -> SamplingParams:
    return msgspec.structs.replace(GREEDY, **changes)


def events_of(engine: Engine) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while engine.has_work():
        events += engine.step()
    return events


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.01}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": VOCAB + 1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty"),  # logits divided by it were infinite: a 500
        ({"repetition_penalty": 10.5}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"min_tokens": 7}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
    ],
)
def test_values_outside_their_bounds_are_refused_by_name(changes: dict[str, object], param: str) -> None:
    engine = engine_with()
    with pytest.raises(RequestError, match=r"llowed|exceeds") as refused:
        engine.add(make_request("r", [1, 9], with_sampling(**changes)))
    assert refused.value.param == param
    assert not engine.has_work()


@pytest.mark.parametrize("prompt", [[], [-1], [1, NUM_IDS], [1, VOCAB], [1] * 64, [1] * 1000])
def test_prompts_that_cannot_run_are_refused(prompt: list[int]) -> None:
    engine = engine_with()
    with pytest.raises(RequestError):
        engine.add(make_request("r", prompt, GREEDY))
    assert not engine.has_work()


def test_a_context_overflow_names_the_numbers() -> None:
    with pytest.raises(RequestError, match=r"max_tokens=60 exceeds the 54 left after a 10-token prompt \(context 64\)"):
        engine_with().add(make_request("r", [9] * 10, with_sampling(max_tokens=60)))


def test_a_request_larger_than_the_pool_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match="cache"):
        engine_with(num_blocks=4).add(make_request("r", [9] * 10, with_sampling(max_tokens=8)))


def test_the_largest_request_that_the_pool_holds_runs() -> None:
    engine = engine_with(num_blocks=4)
    outputs = run_all(engine, [make_request("r", [9] * 10, with_sampling(max_tokens=7))])
    assert len(outputs["r"]) == 7


def test_a_full_queue_is_refused_with_a_time() -> None:
    engine = engine_with(max_running=1, max_queue=2)
    for index in range(3):
        engine.add(make_request(str(index), [9, 10], GREEDY))
    with pytest.raises(OverloadedError) as refused:
        engine.add(make_request("3", [9, 10], GREEDY))
    assert refused.value.retry_after_s >= 1
    assert {event.request_id for event in events_of(engine)} == {"0", "1", "2"}


def test_an_id_in_use_is_refused() -> None:
    engine = engine_with()
    engine.add(make_request("r", [9], GREEDY))
    with pytest.raises(RequestError, match="in use"):
        engine.add(make_request("r", [9], GREEDY))


@pytest.mark.parametrize("overlap", [False, True])
def test_an_abort_ends_a_request_within_one_step(overlap: bool) -> None:
    engine = engine_with(overlap=overlap)
    engine.add(make_request("r", [9, 10], with_sampling(max_tokens=50)))
    for _ in range(4):
        engine.step()
    engine.abort("r")
    engine.abort("r")
    assert [event.finish_reason for event in engine.step()] == ["abort"]
    assert events_of(engine) == []
    assert engine.scheduler.pool.num_used == 0


def test_an_abort_before_its_add_ends_the_request() -> None:
    engine = engine_with()
    engine.abort("r")
    engine.add(make_request("r", [9], GREEDY))
    assert [(event.request_id, event.finish_reason) for event in events_of(engine)] == [("r", "abort")]


def test_aborts_of_unknown_requests_are_remembered_only_so_far() -> None:
    engine = engine_with()
    for index in range(10_000):
        engine.abort(str(index))
    assert len(engine._early_aborts) <= 4096
    assert not engine.has_work()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap", [False, True])
def test_log_probabilities_are_those_of_the_raw_logits(device: str, overlap: bool) -> None:
    """Chosen token and alternatives, of the prompt and of the answer, against a full recompute."""
    engine = engine_with(overlap=overlap, device=device, step_tokens=5)
    model = engine.runner.model
    prompt = [1, *range(8, 21)]
    warm = make_request("warm", prompt, GREEDY)
    run_all(engine, [warm])  # its blocks are cached; prompt log-probabilities must bypass them
    sampling = with_sampling(temperature=0.9, repetition_penalty=1.3, logprobs=3, prompt_logprobs=2)
    engine.add(make_request("r", prompt, sampling))
    events = [event for event in events_of(engine) if event.request_id == "r"]
    ids = prompt + [token_id for event in events for token_id in event.token_ids]
    expected = full_logits(model, [ids])[0].float().log_softmax(-1).cpu()
    for event, position in zip(events, range(len(prompt), len(ids)), strict=True):
        (entry,) = event.logprobs
        assert entry.token_id == ids[position]
        assert entry.logprob == pytest.approx(float(expected[position - 1, ids[position]]), abs=1e-5)
        top = expected[position - 1, :NUM_IDS].topk(3)
        assert [token_id for token_id, _ in entry.top] == top.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    prompt_entries = events[0].prompt_logprobs
    assert prompt_entries is not None
    assert prompt_entries[0] is None
    assert [entry.token_id for entry in prompt_entries[1:] if entry] == prompt[1:]
    for position, entry in enumerate(prompt_entries[1:], start=1):
        assert entry is not None
        assert entry.logprob == pytest.approx(float(expected[position - 1, prompt[position]]), abs=1e-5)
        assert len(entry.top) == 2
    assert all(event.prompt_logprobs is None for event in events[1:])


def test_prompt_log_probabilities_survive_preemption() -> None:
    engine = engine_with(num_blocks=8, step_tokens=3, max_running=3)
    sampling = with_sampling(max_tokens=16, prompt_logprobs=0)
    requests = [make_request(str(i), [8 + i] * 9, sampling) for i in range(3)]
    for request in requests:
        engine.add(request)
    for event in events_of(engine):
        if event.prompt_logprobs is not None:
            assert len(event.prompt_logprobs) == 9
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_whose_numbers_break_fails_alone_and_leaves_no_trace(overlap: bool) -> None:
    """One id's embedding is NaN: its request ends in `error`, its neighbour and the cache do not notice."""
    model = random_model(replace(tiny_config(), tie_word_embeddings=False))
    engine = make_engine(model, make_plan(), overlap=overlap)
    model.model.embed_tokens.weight[30] = float("nan")
    neighbour = [1, 9, 10, 11, 12, 13]
    sampling = with_sampling(max_tokens=8, logit_bias={30: -100.0})
    engine.add(make_request("broken", [8, 8, 8, 8, 30, 9, 9, 9, 9, 9], sampling))
    engine.add(make_request("fine", neighbour, sampling))
    outcomes: dict[str, TokenEvent] = {}
    ids: list[int] = []
    expected = naive_loop(model, neighbour, sampling)
    for event in events_of(engine):
        outcomes[event.request_id] = event
        ids += event.token_ids if event.request_id == "fine" else []
    assert outcomes["broken"].finish_reason == "error"
    assert outcomes["broken"].error is not None
    assert outcomes["broken"].error.code == "model_error"
    assert engine.stats().corrupted_requests == 1
    assert engine.stats().num_blocks_used == 0
    assert ids == expected


def test_the_sampled_end_token_is_the_last_of_its_answer() -> None:
    engine = engine_with()
    sampling = with_sampling(max_tokens=40, stop_token_ids=(EOS,), logit_bias={EOS: 100.0}, min_tokens=3)
    events = []
    engine.add(make_request("r", [9], sampling))
    events = events_of(engine)
    ids = [token_id for event in events for token_id in event.token_ids]
    assert ids[-1] == EOS
    assert EOS not in ids[:-1]
    assert len(ids) == 4  # three that the end token was masked for, then it
    assert events[-1].finish_reason == "stop"


def test_seeds_are_drawn_when_none_is_given_and_differ() -> None:
    engine = engine_with(max_running=4)
    sampling = with_sampling(temperature=1.5, max_tokens=12, seed=None)
    outputs = run_all(engine, [make_request(str(i), [9, 10], sampling) for i in range(4)])
    assert len({tuple(ids) for ids in outputs.values()}) > 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap", [False, True])
def test_64_streams_with_a_third_cut_off_leave_the_others_unchanged(device: str, overlap: bool) -> None:
    engine = engine_with(overlap=overlap, device=device, max_running=64, num_blocks=220, step_tokens=48, max_queue=64)
    model = random_model(tiny_config())
    chance = random.Random(5)
    stem = list(range(8, 20))
    requests: dict[str, EngineRequest] = {}
    for index in range(64):
        prompt = stem[: chance.choice([0, 8, 12])] + [chance.randrange(8, NUM_IDS) for _ in range(chance.randint(1, 6))]
        sampling = SamplingParams(max_tokens=12, temperature=chance.choice([0.0, 0.9]), seed=index, top_k=12)
        requests[str(index)] = make_request(str(index), prompt, sampling)
    victims = set(chance.sample(sorted(requests), 21))
    received: dict[str, list[int]] = {request_id: [] for request_id in requests}
    ended: dict[str, str] = {}
    for request in requests.values():
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            received[event.request_id] += event.token_ids
            if event.finish_reason:
                ended[event.request_id] = event.finish_reason
        for victim in sorted(victims):
            if victim not in ended and chance.random() < 0.15:
                engine.abort(victim)
        engine.scheduler.check()
    assert engine.scheduler.pool.num_used == 0
    assert set(ended) == set(requests)
    assert "abort" in ended.values()
    for request_id, request in requests.items():
        expected = naive_loop(model, request.prompt_ids, request.sampling)
        got = received[request_id]
        assert got == expected if ended[request_id] == "length" else got == expected[: len(got)]
    assert all(reason == "length" for request_id, reason in ended.items() if request_id not in victims)


def test_steps_do_not_grow_with_what_was_generated() -> None:
    """The host's part of a step is measured, one entry per step."""
    engine = engine_with()
    run_all(engine, [make_request("r", [9], with_sampling(max_tokens=20))])
    assert len(engine.host_ms) >= 20
    assert all(value >= 0 for value in engine.host_ms)


def test_float32_serves_too() -> None:
    model = random_model(tiny_config(), dtype=torch.float32)
    engine = make_engine(model, make_plan(dtype="float32"), overlap=True)
    outputs = run_all(engine, [make_request("r", [9, 10, 11], GREEDY)])
    assert outputs["r"] == naive_loop(model, [9, 10, 11], GREEDY)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_may_begin_before_all_are_added_once_it_is_full(overlap: bool) -> None:
    """But only where launching it waits for nothing, and nothing else runs."""
    engine = engine_with(overlap=overlap, step_tokens=16)
    engine.add(make_request("a", list(range(10)), GREEDY))
    assert not engine.would_start_full, "the next request belongs into the same step"
    engine.add(make_request("b", list(range(10)), GREEDY))
    assert engine.would_start_full is overlap
    engine.step()
    engine.add(make_request("c", list(range(20)), GREEDY))
    assert not engine.would_start_full
    while engine.has_work():
        engine.step()
