"""The engine loop against raw sockets: hostile bytes, dead and silent clients, acceptance, drain, liveness."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import zmq

from lfm.engine.wire import (
    MAX_REQUEST_FRAME_BYTES,
    Abort,
    Add,
    Drain,
    Events,
    FromEngine,
    Goodbye,
    Hello,
    Lost,
    encode_adds,
    engine_frame_decoder,
)
from lfm.protocol import EngineRequest, TokenEvent
from tests.engine_process.fakes import LIVELOCK, RAISE, WAIT, FakeEngine
from tests.engine_process.support import DEADLINE_S, LoopInThread, looping, request
from tests.waiting import wait_until

encode = msgspec.msgpack.encode


class RawClient:
    """A DEALER that sends what it is told to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, *, unread_limit: int = 1000) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVHWM, unread_limit)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        self.socket.connect(address)

    def send(self, *messages: object) -> None:
        self.socket.send_multipart([encode(message) for message in messages])

    def add(self, *requests: EngineRequest) -> None:
        self.socket.send_multipart(encode_adds(requests))

    def receive(self) -> FromEngine:
        return engine_frame_decoder.decode(self.socket.recv())

    def events_until(self, request_id: str) -> list[TokenEvent]:
        """All events up to the terminal one of this request."""
        seen: list[TokenEvent] = []
        while not any(event.request_id == request_id and event.finish_reason for event in seen):
            message = self.receive()
            assert isinstance(message, Events)
            seen += message.events
        return seen


@contextmanager
def clients(loop: LoopInThread, num: int, *, unread_limit: int = 1000) -> Iterator[list[RawClient]]:
    context = zmq.Context()
    opened = [RawClient(context, loop.address, unread_limit=unread_limit) for _ in range(num)]
    try:
        for client in opened:
            client.send(Hello())
        yield opened
    finally:
        context.destroy(linger=0)


def test_acceptance_is_sent_before_the_step_that_may_take_long() -> None:
    with looping(FakeEngine(step_s=0.5)) as loop, clients(loop, 1) as [client]:
        client.add(request("a", max_tokens=1))
        first = client.receive()
        assert isinstance(first, Events)
        assert first.events == [TokenEvent(request_id="a", is_accepted=True)]
        assert loop.engine.num_steps == 0


def test_all_events_of_a_step_arrive_in_one_message() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 1) as [client]:
        client.add(*(request(f"a-{i}", max_tokens=3) for i in range(40)))
        messages = [client.receive() for _ in range(4)]
        assert [len(message.events) for message in messages if isinstance(message, Events)] == [40] * 4


@pytest.mark.parametrize("seed", range(5))
def test_garbage_is_dropped_and_the_engine_goes_on(seed: int) -> None:
    choose = random.Random(seed)
    with looping(FakeEngine()) as loop, clients(loop, 1) as [client]:
        valid = encode_adds([request("x")])[0]
        for _ in range(200):
            mutated = bytearray(valid)
            mutated[choose.randrange(len(mutated))] = choose.randrange(256)
            junk = [choose.randbytes(choose.randrange(64)), valid[: choose.randrange(len(valid))], bytes(mutated)]
            client.socket.send_multipart(junk[: choose.randrange(1, 4)])
        client.socket.send(b"\x93\xa3add\xc4\x00\x91\x81\xa1z" + b"\x91" * 200_000)  # nested far too deep
        client.socket.send(b"\x93\xa3add\xc4\x00\xdd\xff\xff\xff\xff")  # promises four billion requests
        client.send(Add(b"\x01\x02\x03", [request("cut off", max_tokens=1)]))
        client.add(request("fine", max_tokens=2))
        tokens = [t for event in client.events_until("fine") if event.request_id == "fine" for t in event.token_ids]
        assert tokens == [0, 1]


def test_an_oversized_frame_costs_its_sender_the_connection_and_nobody_else() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 2) as [hostile, other]:
        hostile.socket.send(bytes(MAX_REQUEST_FRAME_BYTES + 1))
        other.add(request("a", max_tokens=3))
        assert other.events_until("a")[-1].finish_reason == "length"


def test_an_abort_before_its_add_and_after_the_end_is_harmless() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 1) as [client]:
        client.send(Abort(["a"]))
        client.add(request("a", max_tokens=90_000))
        assert client.events_until("a")[-1].finish_reason == "abort"
        client.add(request("b", max_tokens=1))
        assert client.events_until("b")[-1].finish_reason == "length"
        client.send(Abort(["b", "a", "never"]))
        client.add(request("c", max_tokens=1))
        assert client.events_until("c")[-1].finish_reason == "length"


def test_nobody_aborts_the_requests_of_another_client() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 2) as [owner, other]:
        owner.add(request("a", kind=WAIT))
        wait_until(lambda: "a" in loop.engine.running)
        other.send(Abort(["a"]))
        other.add(request("b", max_tokens=1))
        other.events_until("b")
        assert "a" in loop.engine.running
        owner.send(Abort(["a"]))
        assert owner.events_until("a")[-1].finish_reason == "abort"


def test_a_request_id_that_runs_already_is_refused() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 2) as [owner, other]:
        owner.add(request("a", kind=WAIT))
        wait_until(lambda: "a" in loop.engine.running)
        other.add(request("a", max_tokens=1))
        error = other.events_until("a")[-1].error
        assert error is not None
        assert error.status == 400
        assert "a" in loop.engine.running


@pytest.mark.parametrize("is_polite", [True, False])
def test_requests_of_a_client_that_leaves_are_aborted_and_others_are_not(is_polite: bool) -> None:
    with looping(FakeEngine(step_s=0.001)) as loop, clients(loop, 2) as [leaving, staying]:
        staying.add(request("stays", max_tokens=300))
        leaving.add(request("leaves", max_tokens=90_000), request("waits", kind=WAIT))
        wait_until(lambda: len(loop.engine.running) == 3)
        if is_polite:
            leaving.send(Goodbye())
        else:
            leaving.socket.close(0)
        wait_until(lambda: set(loop.engine.aborted) == {"leaves", "waits"})
        tokens = [token for event in staying.events_until("stays") for token in event.token_ids]
        assert tokens == list(range(300))


def test_a_client_that_reads_nothing_is_dropped_and_told_so() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 2, unread_limit=1) as [deaf, other]:
        deaf.add(request("unread", max_tokens=99_000))
        wait_until(lambda: "unread" in loop.engine.aborted)
        other.add(request("other", max_tokens=3))
        assert other.events_until("other")[-1].finish_reason == "length"
        deaf.add(request("too early", max_tokens=3))  # it has not read yet that it is lost
        while not isinstance(deaf.receive(), Lost):
            pass
        assert "too early" not in loop.engine.running
        deaf.add(request("again", max_tokens=3))
        assert deaf.events_until("again")[-1].finish_reason == "length"


def test_a_client_that_forgot_to_say_hello_is_told_that_nothing_of_it_runs() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 1) as [client]:
        client.send(Goodbye())
        client.add(request("a", max_tokens=3))
        assert client.receive() == Lost()
        assert not loop.engine.running


def test_drain_finishes_what_runs_refuses_what_comes_and_ends() -> None:
    with looping(FakeEngine(step_s=0.005)) as loop, clients(loop, 1) as [client]:
        client.add(request("a", max_tokens=20))
        wait_until(lambda: "a" in loop.engine.running)
        os.write(loop.command_write, encode_line(Drain(60.0)))
        client.receive()
        wait_until(lambda: loop.engine.num_steps > 5)
        client.add(request("late", max_tokens=1))
        events = client.events_until("a")
        assert [token for event in events for token in event.token_ids] == list(range(20))
        [late] = [event for event in events if event.request_id == "late"]
        assert late.error is not None
        assert late.error.status == 503
        wait_until(lambda: not loop.thread.is_alive())
        assert loop.error is None


def test_drain_aborts_what_does_not_finish_in_time() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 1) as [client]:
        client.add(request("a", kind=WAIT), request("b", kind=WAIT))
        wait_until(lambda: len(loop.engine.running) == 2)
        os.write(loop.command_write, encode_line(Drain(0.05)))
        events = client.events_until("b")
        assert {event.request_id: event.finish_reason for event in events if event.finish_reason} == {
            "a": "abort",
            "b": "abort",
        }
        wait_until(lambda: not loop.thread.is_alive())


def test_an_idle_drain_ends_at_once() -> None:
    with looping(FakeEngine()) as loop:
        os.write(loop.command_write, encode_line(Drain(60.0)))
        wait_until(lambda: not loop.thread.is_alive(), seconds=5.0)


def test_the_loop_ends_when_its_parent_is_gone() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 1) as [client]:
        client.add(request("a", kind=WAIT))
        os.close(loop.command_write)
        wait_until(lambda: not loop.thread.is_alive())


def test_an_exception_in_a_step_ends_the_loop() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 1) as [client]:
        client.add(request("a", kind=RAISE))
        wait_until(lambda: not loop.thread.is_alive())
        assert isinstance(loop.error, ZeroDivisionError)


def test_an_idle_loop_keeps_its_promise_and_a_livelock_does_not() -> None:
    with looping(FakeEngine()) as loop, clients(loop, 1) as [client]:
        wait_until(lambda: loop.num_promises > 3)
        client.add(request("a", kind=LIVELOCK))
        wait_until(lambda: "a" in loop.engine.running)
        client.receive()
        wait_until(lambda: loop.num_barren_steps > 50)
        promises = loop.num_promises
        wait_until(lambda: loop.num_barren_steps > 100)
        assert loop.num_promises == promises
        client.send(Abort(["a"]))
        wait_until(lambda: loop.num_promises > promises)


def encode_line(command: Drain) -> bytes:
    return msgspec.json.encode(command) + b"\n"
