"""EngineClient against an engine loop in a thread."""

import asyncio
import random

import pytest

from lfm.engine.process import EngineClient
from lfm.errors import InternalError, OverloadedError, RequestError
from tests.engine_process.fakes import CRASH_ADD, MAX_MODEL_LEN, WAIT, FakeEngine
from tests.engine_process.support import connected, eventually, read_all, request, run, socket_directory


def test_a_request_yields_its_tokens_and_one_terminal_event() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine()) as (_, client):
            stream = await client.submit([request("a", max_tokens=200)])
            event = (await read_all(stream))["a"]
            assert event.token_ids == list(range(200))
            assert (event.finish_reason, event.num_cached_tokens) == ("length", 3)
            assert await stream.next_events() == []

    run(scenario())


def test_choices_of_one_request_arrive_in_one_stream() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine()) as (_, client):
            stream = await client.submit([request(f"a-{i}", max_tokens=i + 1) for i in range(8)])
            events = await read_all(stream)
            assert {name: len(event.token_ids) for name, event in events.items()} == {f"a-{i}": i + 1 for i in range(8)}

    run(scenario())


def test_a_refused_request_raises_what_the_engine_raised() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine()) as (loop, client):
            with pytest.raises(RequestError, match="too long") as caught:
                await client.submit([request("a", max_tokens=MAX_MODEL_LEN)])
            assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
            assert not loop.engine.running

    run(scenario())


def test_one_refused_choice_aborts_the_others() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine(max_queue=2)) as (loop, client):
            with pytest.raises(OverloadedError) as caught:
                await client.submit([request(f"a-{i}", kind=WAIT) for i in range(3)])
            assert caught.value.retry_after_s == 7.0
            await eventually(lambda: not loop.engine.running)
            again = await client.submit([request("b")])
            assert (await read_all(again))["b"].finish_reason == "length"

    run(scenario())


def test_an_unexpected_error_in_add_fails_one_request_only() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine()) as (_, client):
            other = await client.submit([request("other", max_tokens=500)])
            with pytest.raises(InternalError):
                await client.submit([request("a", kind=CRASH_ADD)])
            assert (await read_all(other))["other"].token_ids == list(range(500))

    run(scenario())


def test_a_prompt_of_30000_tokens_arrives_whole() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine()) as (loop, client):
            prompt_ids = [WAIT, *range(30_000)]
            long = request("a")
            stream = await client.submit([type(long)(request_id="a", prompt_ids=prompt_ids, sampling=long.sampling)])
            assert loop.engine.running["a"][0].prompt_ids == prompt_ids
            await stream.aclose()

    run(scenario())


def test_an_aborted_request_ends_and_its_neighbour_goes_on() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine(step_s=0.001)) as (loop, client):
            stream = await client.submit([request("a", max_tokens=90_000), request("b", max_tokens=100)])
            await stream.next_events()
            await stream.abort("a")
            await stream.abort("a")
            await stream.abort("never seen")
            events = await read_all(stream)
            assert set(events) == {"b"}
            assert events["b"].finish_reason == "length"
            await eventually(lambda: not loop.engine.running)

    run(scenario())


def test_a_closed_stream_is_aborted_and_says_nothing_more() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine(step_s=0.001)) as (loop, client):
            stream = await client.submit([request("a", max_tokens=90_000)])
            reader = asyncio.create_task(read_all(stream))
            await eventually(lambda: loop.engine.num_steps > 2)
            await stream.aclose()
            await stream.aclose()
            await reader
            assert await stream.next_events() == []
            await eventually(lambda: loop.engine.aborted == ["a"])

    run(scenario())


def test_a_cancelled_submit_aborts_what_it_sent() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine(step_s=0.2)) as (loop, client):
            busy = await client.submit([request("busy", kind=WAIT)])
            submitting = asyncio.create_task(client.submit([request("a", kind=WAIT), request("b", kind=WAIT)]))
            await asyncio.sleep(0)  # it has sent and waits; the engine is in a step
            submitting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submitting
            await eventually(lambda: set(loop.engine.aborted) == {"a", "b"})
            await eventually(lambda: set(loop.engine.running) == {"busy"})
            await busy.aclose()

    run(scenario())


def test_64_streams_with_a_third_aborted_at_random_keep_their_tokens() -> None:
    async def scenario() -> None:
        choose = random.Random(7)

        async def one(client: EngineClient, name: str, *, is_cut: bool, cut_after: int) -> None:
            stream = await client.submit([request(name, max_tokens=50)])
            seen: list[int] = []
            while events := await stream.next_events():
                seen += events[0].token_ids
                if is_cut and len(seen) >= cut_after:
                    await stream.aclose()
            if is_cut:
                assert seen == list(range(len(seen)))
            else:
                assert seen == list(range(50))

        async with connected(FakeEngine(step_s=0.001)) as (loop, client):
            streams = [
                one(client, f"r{i}", is_cut=choose.random() < 1 / 3, cut_after=choose.randrange(40)) for i in range(64)
            ]
            await asyncio.gather(*streams)
            await eventually(lambda: not loop.engine.running)
            await eventually(lambda: client.stats().num_running == 0)
            assert loop.engine.aborted

    run(scenario())


def test_a_request_id_in_use_is_refused_here() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine()) as (_, client):
            stream = await client.submit([request("a", kind=WAIT)])
            with pytest.raises(ValueError, match="twice"):
                await client.submit([request("a")])
            with pytest.raises(ValueError, match="twice"):
                await client.submit([request("b"), request("b")])
            await stream.aclose()

    run(scenario())


def test_before_an_engine_is_known_everything_is_not_ready() -> None:
    async def scenario() -> None:
        with socket_directory() as directory:
            async with EngineClient(directory) as client:
                assert client.not_ready_reason == "waiting for the engine"
                with pytest.raises(OverloadedError):
                    _ = client.info
                with pytest.raises(OverloadedError, match="waiting for the engine"):
                    await client.submit([request("a")])

    run(scenario())


def test_closing_the_client_ends_its_streams_and_its_requests() -> None:
    async def scenario() -> None:
        async with connected(FakeEngine()) as (loop, client):
            stream = await client.submit([request("a", kind=WAIT)])
            await client.aclose()
            assert (await stream.next_events())[0].finish_reason == "error"
            await eventually(lambda: loop.engine.aborted == ["a"])
            with pytest.raises(OverloadedError, match="closed"):
                await client.submit([request("b")])

    run(scenario())
