"""Clients that leave, and clients that do not read: their sequences end at once, and nobody else notices."""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
from starlette.applications import Starlette

from lfm.config import ServerConfig
from lfm.protocol import TokenEvent
from lfm.server.admission import LONG_BODY_BYTES
from tests.server.fakes import TOKENIZER, AsgiCall, FakeBackend, chat_body, make_app, state_of, until


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


async def start(call: AsgiCall) -> asyncio.Task[None]:
    return asyncio.create_task(call.run())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("is_held", [True, False], ids=["queued", "generating"])
def test_a_client_that_leaves_ends_its_sequences(stream: bool, is_held: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The fake engine makes a step per turn of the event loop; noticing takes three turns, some 50 us."""
    caplog.set_level(logging.INFO, logger="lfm")

    async def scenario() -> None:
        backend = FakeBackend("word " * 200)
        backend.is_held = is_held
        call = AsgiCall(make_app(backend), chat_body(stream=stream, n=2))
        task = await start(call)
        await until(lambda: backend.num_reads >= (1 if is_held else 5))
        call.disconnect()
        num_reads = backend.num_reads
        await task
        assert len(backend.aborted) == 2
        assert backend.num_reads <= num_reads + 3
        assert backend.streams[0].is_closed
        assert not call.is_complete

    run(scenario())
    assert "status=499" in caplog.text
    assert "finish=disconnect" in caplog.text


def test_a_client_that_leaves_during_submit_cancels_it() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        backend.is_submit_held = True
        call = AsgiCall(make_app(backend), chat_body())
        task = await start(call)
        await until(lambda: bool(backend.streams))
        call.disconnect()
        await task
        assert backend.num_cancelled_submits == 1
        assert call.sent == []

    run(scenario())


class BlockedTokenizer:
    """Stands in for the tokenizer of one app; `encode_raw` waits until it is released."""

    special_ids = TOKENIZER.special_ids
    stop_token_ids = TOKENIZER.stop_token_ids
    max_token_bytes = TOKENIZER.max_token_bytes

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.is_released = threading.Event()

    def encode_raw(self, text: str, *, param: str | None = None) -> list[int]:
        self.has_begun.set()
        assert self.is_released.wait(10)
        return [1]


def test_a_client_that_leaves_during_tokenizing_never_reaches_the_engine() -> None:
    """Also shows that long texts are tokenized in a thread: this event loop goes on meanwhile."""

    async def scenario() -> None:
        backend, tokenizer = FakeBackend(), BlockedTokenizer()
        app = make_app(backend)
        state_of(app).tokenizer = tokenizer  # type: ignore[assignment]
        body = {"model": chat_body()["model"], "prompt": "a" * (LONG_BODY_BYTES + 1)}
        call = AsgiCall(app, body, path="/v1/completions")
        task = await start(call)
        await until(tokenizer.has_begun.is_set)
        call.disconnect()
        await task
        tokenizer.is_released.set()
        await asyncio.sleep(0)
        assert backend.streams == []
        assert call.sent == []

    run(scenario())


def test_a_client_that_leaves_while_sending_its_body_is_forgotten() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        call = AsgiCall(make_app(backend))
        call.receive({"type": "http.request", "body": b'{"model":', "more_body": True})
        call.disconnect()
        await call.run()
        assert call.sent == []
        assert backend.streams == []

    run(scenario())


def test_a_client_that_closes_after_the_answer_is_no_disconnect(caplog: pytest.LogCaptureFixture) -> None:
    """Servers report the end of `receive` also when a response is complete."""
    caplog.set_level(logging.INFO, logger="lfm")

    class Closing(AsgiCall):
        async def _send(self, message: Any) -> None:
            await super()._send(message)
            if self.is_complete:
                self.disconnect()
                await asyncio.sleep(0)

    async def scenario() -> None:
        for stream in (True, False):
            backend = FakeBackend()
            call = Closing(make_app(backend), chat_body(stream=stream))
            await call.run()
            assert call.is_complete
            assert backend.aborted == []

    run(scenario())
    assert "status=499" not in caplog.text


def test_nothing_is_left_running_after_a_request() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        app = make_app(backend)
        before = asyncio.all_tasks()
        for stream in (True, False):
            await AsgiCall(app, chat_body(stream=stream)).run()
            leaving = AsgiCall(app, chat_body(stream=stream))
            leaving.disconnect()
            await leaving.run()
        assert asyncio.all_tasks() == before
        assert state_of(app).works == set()

    run(scenario())


def held_app(**settings: float) -> tuple[Starlette, FakeBackend]:
    backend = FakeBackend()
    backend.is_held = True
    return make_app(backend, ServerConfig(**settings)), backend  # type: ignore[arg-type]


def test_deltas_that_wait_for_a_slow_socket_leave_as_one_event() -> None:
    async def scenario() -> None:
        app, backend = held_app()
        call = AsgiCall(app, chat_body(stream=True))
        task = await start(call)
        await until(lambda: bool(backend.streams) and len(call.sent) == 1)
        (stream,) = backend.streams
        (request,) = stream.requests

        def push(text: str, *, ends: bool = False) -> None:
            for token_id in TOKENIZER.encode(text):
                stream.push(TokenEvent(request_id=request.request_id, token_ids=[token_id]))
            if ends:
                stream.push(TokenEvent(request_id=request.request_id, finish_reason="length"))

        push("a")
        await until(lambda: len(call.sent) == 2)
        call.is_writable.clear()
        push("b")
        await until(lambda: call.num_blocked_sends == 1)
        push("cdefgh")
        push("ij", ends=True)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(call.sent) == 2
        call.is_writable.set()
        await task
        num_events = [message["body"].count(b"data: ") for message in call.sent[1:]]
        assert num_events == [2, 1, 1, 1]  # the role and "a", "b", all that waited, [DONE]
        assert b'"content":"cdefghij"' in call.sent[3]["body"]

    run(scenario())


def test_a_reader_that_takes_nothing_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lfm")

    async def scenario() -> None:
        backend = FakeBackend("word " * 100)
        app = make_app(backend, ServerConfig(stalled_reader_seconds=0.02))
        call = AsgiCall(app, chat_body(stream=True))
        call.is_writable.clear()
        await call.run()
        assert len(backend.aborted) == 1
        assert state_of(app).works == set()

    run(scenario())
    assert "status=499" in caplog.text
    assert "finish=stalled" in caplog.text


def test_a_sender_that_stops_in_its_body_is_given_up() -> None:
    async def scenario() -> None:
        call = AsgiCall(make_app(FakeBackend(), ServerConfig(stalled_reader_seconds=0.02)))
        call.receive({"type": "http.request", "body": b'{"model":', "more_body": True})
        await call.run()
        assert call.sent == []

    run(scenario())


def test_keep_alive_comments_come_while_a_stream_waits() -> None:
    async def scenario() -> None:
        app, backend = held_app(keepalive_seconds=0.01)
        call = AsgiCall(app, chat_body(stream=True))
        task = await start(call)
        await until(lambda: call.body.count(b": keep-alive\n\n") >= 2)
        backend.release()
        await task
        assert call.body.endswith(b"data: [DONE]\n\n")
        assert b'"content":"H"' in call.body

    run(scenario())


def test_headers_of_a_stream_come_before_its_first_token() -> None:
    async def scenario() -> None:
        app, backend = held_app()
        call = AsgiCall(app, chat_body(stream=True))
        task = await start(call)
        await until(lambda: bool(call.sent))
        assert call.status == 200
        assert dict(call.sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
        backend.release()
        await task

    run(scenario())


def test_one_client_leaving_disturbs_no_other() -> None:
    async def scenario() -> None:
        backend = FakeBackend("the same words for all")
        backend.is_held = True
        app = make_app(backend)
        calls = [AsgiCall(app, chat_body(stream=index % 2 == 0)) for index in range(12)]
        tasks = [await start(call) for call in calls]
        await until(lambda: len(backend.streams) == 12)
        for call in calls[::3]:
            call.disconnect()
        backend.release()
        await asyncio.gather(*tasks)
        assert len(backend.aborted) == 4
        for index, call in enumerate(calls):
            assert call.is_complete == (index % 3 != 0)
        assert state_of(app).works == set()

    run(scenario())
