"""`lfm.LLM`: the engine in the caller's own process."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import lfm
from lfm.chat.defaults import RequestedSampling
from lfm.chat.messages import Message
from lfm.config import EngineConfig
from lfm.errors import InternalError, RequestError
from lfm.llm import LLM
from lfm.protocol import EngineRequest, SamplingParams, TokenEvent

CONFIG = EngineConfig(model="random:tiny", device="cpu", max_model_len=512, max_running=8)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    torch.set_num_threads(1)
    with LLM(CONFIG) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left_behind(llm: LLM) -> Iterator[None]:
    """After every test the engine is idle and every block is free or cached."""
    yield
    stats = llm.engine.stats()
    assert not llm.engine.has_work()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)


def greedy(max_tokens: int, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)  # type: ignore[arg-type]


def test_the_package_offers_it_without_loading_it() -> None:
    assert lfm.LLM is LLM


def test_text_and_ids_of_the_same_prompt_give_the_same_output(llm: LLM) -> None:
    ids = llm.tokenizer.encode_raw("Hello")
    from_text, from_ids = llm.generate(["Hello"], sampling=greedy(12)), llm.generate([ids], sampling=greedy(12))
    assert from_text[0].token_ids == from_ids[0].token_ids
    assert len(from_text[0].token_ids) == 12
    assert from_text[0].finish_reason == "length"
    assert from_text[0].num_prompt_tokens == len(ids)
    assert from_text[0].text == llm.tokenizer.decode(from_text[0].token_ids)


def test_prompts_of_one_call_are_answered_in_order_as_if_alone(llm: LLM) -> None:
    prompts = ["one", "two two", "three three three"]
    together = llm.generate(prompts, sampling=greedy(10))
    alone = [llm.generate([prompt], sampling=greedy(10))[0] for prompt in prompts]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    outputs = llm.generate(["a", "a"], sampling=[greedy(3), greedy(7)])
    assert [len(output.token_ids) for output in outputs] == [3, 7]
    with pytest.raises(RequestError, match="1 sampling settings for 2 prompts"):
        llm.generate(["a", "b"], sampling=[greedy(3)])


def test_a_stream_joined_is_the_output(llm: LLM) -> None:
    whole = llm.generate(["Hello"], sampling=greedy(20))[0]
    stream = llm.stream("Hello", sampling=greedy(20))
    deltas = list(stream)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert tuple(id_ for delta in deltas for id_ in delta.token_ids) == whole.token_ids
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert (stream.num_prompt_tokens, stream.num_output_tokens) == (6, 20)


def test_a_stop_string_ends_the_output_before_it(llm: LLM) -> None:
    whole = llm.generate(["Hello"], sampling=greedy(30))[0]
    readable = next(char for char in whole.text if char.isascii() and char.isprintable() and not char.isspace())
    output = llm.generate(["Hello"], sampling=greedy(30), stop=[readable])[0]
    assert output.finish_reason == "stop"
    assert output.text == whole.text.partition(readable)[0]
    assert len(output.token_ids) < 30


def test_a_chat_is_a_prompt_of_messages(llm: LLM) -> None:
    messages = [Message(role="user", content="Hello")]
    output = llm.chat(messages, sampling=greedy(5))
    assert output.token_ids == llm.generate([llm.chat_prompt(messages)], sampling=greedy(5))[0].token_ids


def test_a_later_turn_finds_the_earlier_ones_in_the_cache(llm: LLM) -> None:
    first = [Message(role="user", content="A question that is longer than a block of the cache")]
    answer = llm.chat(first, sampling=greedy(8))
    second = [*first, Message(role="assistant", content=answer.text), Message(role="user", content="And?")]
    assert llm.chat(second, sampling=greedy(8)).num_cached_tokens >= 16


def test_logprobs_come_with_every_token(llm: LLM) -> None:
    output = llm.generate(["Hello"], sampling=greedy(4, logprobs=2))[0]
    assert [score.token_id for score in output.logprobs] == list(output.token_ids)
    assert all(len(score.top) == 2 and score.top[0].token_id == score.token_id for score in output.logprobs)


def test_closing_a_stream_frees_its_blocks_at_once(llm: LLM) -> None:
    stream = llm.stream("Hello", sampling=greedy(400))
    for _ in range(5):
        next(stream)
    assert llm.engine.stats().num_running == 1
    stream.close()
    assert llm.engine.stats().num_running == 0
    stream.close()


def test_streams_may_be_read_in_turns(llm: LLM) -> None:
    alone = [llm.generate([prompt], sampling=greedy(10))[0].text for prompt in ("one", "two")]
    first, second = llm.stream("one", sampling=greedy(10)), llm.stream("two", sampling=greedy(10))
    texts = ["", ""]
    for deltas in zip(first, second, strict=False):
        texts = [text + delta.text for text, delta in zip(texts, deltas, strict=True)]
    texts[0] += "".join(delta.text for delta in first)
    texts[1] += "".join(delta.text for delta in second)
    assert texts == alone


def test_a_refused_prompt_refuses_the_whole_call_and_harms_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError, match="512"):
        llm.generate([[1, 20], [1, *[20] * 600]], sampling=greedy(5))
    assert len(llm.generate(["a"], sampling=greedy(5))[0].token_ids) == 5


def test_requests_run_as_they_are_with_ids_beyond_the_tokenizer(llm: LLM) -> None:
    last = llm.engine.info.vocab_size - 1
    request = EngineRequest(request_id="x", prompt_ids=[last] * 20, sampling=greedy(6), mask_padded_ids=False)
    ids = [id_ for events in llm.run([request]) for event in events for id_ in event.token_ids]
    assert len(ids) == 6
    with pytest.raises(RequestError, match=str(last)):
        llm.generate([[last]], sampling=greedy(5))


def test_omitted_sampling_is_the_models_own_and_fills_the_context(llm: LLM) -> None:
    sampling = llm.sampling(RequestedSampling(temperature=0.5), num_prompt_tokens=12)
    assert sampling.max_tokens == 500
    assert sampling.temperature == 0.5
    assert sampling.top_k == llm.defaults.top_k
    assert set(sampling.stop_token_ids) == set(llm.tokenizer.stop_token_ids)
    assert llm.sampling(max_tokens=3).max_tokens == 3


def test_after_an_interrupted_step_it_says_so_instead_of_going_on() -> None:
    with LLM(CONFIG) as llm:
        step = llm.engine.step

        def interrupted() -> list[object]:
            step()
            raise KeyboardInterrupt

        llm.engine.step = interrupted  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a"], sampling=greedy(5))
        with pytest.raises(InternalError, match="stopped in the middle"):
            llm.generate(["a"], sampling=greedy(5))


def test_closing_twice_is_closing_once() -> None:
    llm = LLM(CONFIG)
    llm.close()
    llm.close()


def test_the_first_step_begins_while_later_prompts_are_added() -> None:
    with LLM(replace(CONFIG, step_tokens=32)) as llm:
        prompts = [[1, *range(20 + i, 40 + i)] for i in range(6)]
        expected = [output.token_ids for output in llm.generate(prompts, sampling=greedy(4))]
        llm.engine._num_in_flight_kept = 1  # as on a GPU: launching does not wait
        step, present = llm.engine.step, []

        def noted() -> list[TokenEvent]:
            present.append(llm.engine.scheduler.num_waiting + llm.engine.scheduler.num_running)
            return step()

        llm.engine.step = noted  # type: ignore[method-assign]
        assert [output.token_ids for output in llm.generate(prompts, sampling=greedy(4))] == expected
        assert present[:2] == [2, 6], "two prompts fill the first step"
