"""RequestStream: joining of unread events, acceptance, ends."""

import asyncio

from lfm.engine.stream import RequestStream
from lfm.protocol import ErrorInfo, TokenEvent, TokenLogprob
from tests.engine_process.support import request, run


def a_stream(*names: str, aborted: list[str] | None = None) -> RequestStream:
    return RequestStream(
        [request(name) for name in names], send_aborts=[].extend if aborted is None else aborted.extend
    )


def test_unread_events_are_joined_per_request_in_order() -> None:
    async def scenario() -> None:
        stream = a_stream("a", "b")
        stream.feed(TokenEvent(request_id="b", is_accepted=True))
        stream.feed(TokenEvent(request_id="b", token_ids=[1], logprobs=[TokenLogprob(1, -1.0)], num_cached_tokens=16))
        stream.feed(TokenEvent(request_id="a", token_ids=[7], prompt_logprobs=[None]))
        stream.feed(TokenEvent(request_id="b", token_ids=[2], logprobs=[TokenLogprob(2, -2.0)]))
        stream.feed(TokenEvent(request_id="b", token_ids=[3], finish_reason="stop"))
        assert await stream.next_events() == [
            TokenEvent(
                request_id="b",
                token_ids=[1, 2, 3],
                logprobs=[TokenLogprob(1, -1.0), TokenLogprob(2, -2.0)],
                num_cached_tokens=16,
                finish_reason="stop",
            ),
            TokenEvent(request_id="a", token_ids=[7], prompt_logprobs=[None]),
        ]
        stream.feed(TokenEvent(request_id="a", finish_reason="length"))
        assert [event.finish_reason for event in await stream.next_events()] == ["length"]
        assert await stream.next_events() == []

    run(scenario())


def test_an_unread_request_of_90000_tokens_is_one_event() -> None:
    async def scenario() -> None:
        stream = a_stream("a")
        for token in range(90_000):
            stream.feed(TokenEvent(request_id="a", token_ids=[token]))
        [event] = await stream.next_events()
        assert event.token_ids == list(range(90_000))

    run(scenario())


def test_events_after_the_end_or_of_strangers_are_dropped() -> None:
    async def scenario() -> None:
        stream = a_stream("a")
        stream.feed(TokenEvent(request_id="stranger", token_ids=[1]))
        stream.feed(TokenEvent(request_id="a", finish_reason="stop"))
        stream.feed(TokenEvent(request_id="a", token_ids=[1], finish_reason="length"))
        assert await stream.next_events() == [TokenEvent(request_id="a", finish_reason="stop")]
        assert await stream.next_events() == []

    run(scenario())


def test_acceptance_is_waited_for_and_not_handed_on() -> None:
    async def scenario() -> None:
        stream = a_stream("a", "b")
        waiting = asyncio.create_task(stream.wait_accepted())
        stream.feed(TokenEvent(request_id="a", is_accepted=True))
        await asyncio.sleep(0)
        assert not waiting.done()
        stream.feed(TokenEvent(request_id="b", is_accepted=True))
        assert await waiting is None
        reading = asyncio.create_task(stream.next_events())
        await asyncio.sleep(0)
        assert not reading.done()
        stream.feed(TokenEvent(request_id="b", token_ids=[4]))
        assert await reading == [TokenEvent(request_id="b", token_ids=[4])]

    run(scenario())


def test_a_refusal_is_the_error_of_a_request_that_was_not_accepted() -> None:
    async def scenario() -> None:
        error = ErrorInfo(message="too long", status=400)
        stream = a_stream("a", "b")
        stream.feed(TokenEvent(request_id="a", is_accepted=True))
        stream.feed(TokenEvent(request_id="b", finish_reason="error", error=error))
        assert await stream.wait_accepted() == error

    run(scenario())


def test_an_abort_while_someone_reads_wakes_the_reader() -> None:
    async def scenario() -> None:
        aborted: list[str] = []
        stream = a_stream("a", "b", aborted=aborted)
        reading = asyncio.create_task(stream.next_events())
        await asyncio.sleep(0)
        await stream.abort("a")
        await stream.abort("b")
        assert await reading == []
        assert aborted == ["a", "b"]
        await stream.aclose()
        assert aborted == ["a", "b"]

    run(scenario())
