"""Bugs and engine failures: what the client learns, what the log says, and never the other way round."""

import logging
import re
from collections.abc import Callable

import msgspec
import pytest

from lfm.errors import InternalError
from lfm.protocol import EngineRequest, ErrorInfo, TokenEvent
from tests.server.fakes import AppClient, FakeBackend, FakeStream, events_of

SECRET = "the prompt of a user"


class FailingStream(FakeStream):
    """Gives two tokens of the text, then whatever `fail` makes of it."""

    fail: Callable[[EngineRequest], TokenEvent]

    def _next_event(self, request: EngineRequest) -> TokenEvent:
        if self._num_sent[request.request_id] < 2:
            return super()._next_event(request)
        event = self.fail(request)
        if event.finish_reason is not None:
            del self.running[request.request_id]
        return event


class FailingBackend(FakeBackend):
    def __init__(self, fail: Callable[[EngineRequest], TokenEvent]) -> None:
        super().__init__()
        self._fail = fail

    async def submit(self, requests: list[EngineRequest]) -> FakeStream:  # type: ignore[override]
        stream = FailingStream(self, requests)
        stream.fail = self._fail
        self.streams.append(stream)
        return stream


def ends_in(finish_reason: str, error: ErrorInfo | None = None) -> AppClient:
    def fail(request: EngineRequest) -> TokenEvent:
        return TokenEvent(request_id=request.request_id, finish_reason=finish_reason, error=error)  # type: ignore[arg-type]

    return AppClient(FailingBackend(fail))


def raises(error: Exception) -> AppClient:
    def fail(request: EngineRequest) -> TokenEvent:
        raise error

    return AppClient(FailingBackend(fail))


def test_a_bug_is_500_with_a_fixed_message_and_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    response = raises(KeyError(SECRET)).chat()
    assert response.status_code == 500
    request_id = response.headers["x-request-id"]
    error = response.json()["error"]
    assert error == {
        "message": "The server failed to handle this request. It is our fault; "
        f"report it with request id {request_id}.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert request_id in record.getMessage()
    assert record.exc_info is not None


def test_an_internal_error_hides_its_text_from_the_client(caplog: pytest.LogCaptureFixture) -> None:
    response = raises(InternalError("3 logprobs for 4 tokens")).chat()
    assert response.status_code == 500
    assert "logprobs" not in response.text
    assert "3 logprobs for 4 tokens" in caplog.text


def test_a_bug_in_a_stream_is_an_error_event(caplog: pytest.LogCaptureFixture) -> None:
    response = raises(KeyError(SECRET)).chat(stream=True)
    assert response.status_code == 200
    *chunks, last = events_of(response)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "H", "e"]
    assert list(last) == ["error"]
    assert last["error"]["code"] == "internal_error"
    assert SECRET not in response.text


def test_a_failed_sequence_ends_the_whole_request() -> None:
    info = ErrorInfo(message="A step gave no finite numbers.", code="not_finite")
    client = ends_in("error", info)
    response = client.chat(n=2)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == info.message
    assert response.json()["error"]["code"] == "not_finite"
    assert not client.backend.streams[0].running  # the other choice was aborted
    last = events_of(client.chat(stream=True))[-1]
    assert last == {"error": {"message": info.message, "type": "server_error", "param": None, "code": "not_finite"}}


def test_a_dead_engine_is_503_if_it_says_so() -> None:
    client = ends_in("error", ErrorInfo(message="The engine is gone.", status=503, retry_after_s=5.0))
    response = client.chat()
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"


@pytest.mark.parametrize("client", [ends_in("abort"), ends_in("error")], ids=["abort", "error-without-text"])
def test_a_sequence_that_the_engine_ended_is_503(client: AppClient) -> None:
    response = client.chat()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "aborted"
    assert events_of(client.chat(stream=True))[-1]["error"]["code"] == "aborted"


def test_a_stream_that_ends_too_early_is_an_error() -> None:
    """A backend that reports the end of all sequences while one has no terminal event."""
    client = AppClient()
    client.backend.engine_stats = msgspec.structs.replace(client.backend.engine_stats)

    async def no_events(self: FakeStream) -> list[TokenEvent]:
        return []

    class Ending(FakeBackend):
        async def submit(self, requests: list[EngineRequest]) -> FakeStream:  # type: ignore[override]
            stream = await super().submit(requests)
            stream.next_events = no_events.__get__(stream)  # type: ignore[method-assign]
            return stream

    assert AppClient(Ending()).chat().status_code == 503


@pytest.mark.parametrize("request_id", ["abc-123", "req_1.2:3", "a" * 128])
def test_a_plain_request_id_is_echoed(request_id: str) -> None:
    for path in ("/livez", "/no/such/path"):
        assert AppClient().get(path, headers={"X-Request-Id": request_id}).headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "a" * 129, "a b", "<script>", "a\tb", "\u00e9".encode().decode("latin-1")])
def test_another_request_id_is_replaced(request_id: str) -> None:
    headers = {"X-Request-Id": request_id.encode("latin-1")}
    assert re.fullmatch(r"req-[0-9a-f]{32}", AppClient().get("/livez", headers=headers).headers["x-request-id"])


def test_a_clients_request_id_never_reaches_the_engine() -> None:
    client = AppClient()
    for _ in range(2):
        client.post(
            "/v1/completions", {"model": "LiquidAI/LFM2-24B-A2B", "prompt": "a"}, headers={"X-Request-Id": "same"}
        )
    assert len({request.request_id for request in client.backend.requests}) == 2
    assert not [request for request in client.backend.requests if "same" in request.request_id]


def access_line(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lfm.server.access"]
    return dict(part.split("=", 1) for part in line.split(" "))


def test_one_access_line_per_request_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lfm")
    client = AppClient()
    client.backend.num_cached_tokens = 16
    messages = [{"role": "user", "content": SECRET}]
    response = client.request(
        "POST",
        "/v1/chat/completions",
        json={"model": "LiquidAI/LFM2-24B-A2B", "messages": messages, "stop": "?", "user": SECRET},
        headers={"X-Request-Id": "r1", "X-Stainless-Retry-Count": "2"},
    )
    line = access_line(caplog)
    assert float(line.pop("duration_ms")) >= float(line.pop("ttft_ms")) >= 0
    assert line == {
        "request_id": "r1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": "200",
        "prompt_tokens": str(response.json()["usage"]["prompt_tokens"]),
        "cached_tokens": "16",
        "completion_tokens": "7",
        "finish": "stop",
        "retry": "2",
    }
    assert SECRET not in caplog.text


def test_a_refused_request_has_its_line_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lfm")
    AppClient().get("/no/such%0Apath", headers={"X-Stainless-Retry-Count": "many\t"})
    line = access_line(caplog)
    assert (line["route"], line["status"], line["retry"], line["ttft_ms"]) == ("unknown", "404", "0", "-")


def test_probes_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lfm")
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        AppClient().get(path)
    assert not [record for record in caplog.records if record.name == "lfm.server.access"]
