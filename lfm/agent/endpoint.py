"""Where the model is: chat completions of an OpenAI-compatible server, streamed, over HTTP."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx2

from lfm import http_client
from lfm.agent.events import Json, ToolCall, Usage
from lfm.errors import InternalError, OverloadedError

MAX_RETRY_WAIT_S = 30.0
_LOST = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError)  # a kept connection that the server closed


class Endpoint:
    """One model of one server. Any number of agents may share it. Close it, or use `async with`.

    Args:
        url: the server's address, with or without /v1.
        model: the name to ask for; None: the first that the server lists.
        max_retries: how often a request is sent again that the server is too busy for, or whose connection was lost
            before an answer began.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None, max_retries: int = 3) -> None:
        self._root = http_client.api_root(url)
        self._model = model
        self._max_retries = max_retries
        self._client = httpx2.AsyncClient(
            headers=http_client.auth_headers(api_key),
            timeout=http_client.TIMEOUT,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._client.aclose()

    async def model(self) -> str:
        """The name of the model. Raises LfmError if none was given and the server lists none."""
        if self._model is None:
            try:
                response = await self._client.get(f"{self._root}/v1/models")
            except httpx2.HTTPError as error:
                raise http_client.unreachable(self._root, error) from error
            self._model = http_client.first_model(response, self._root)
        return self._model

    async def stream(self, body: Mapping[str, object], answer: "Answer") -> AsyncGenerator[str]:
        """Send a request without `model` and `stream`, yield the pieces of its text, and fill `answer` with the rest.

        Raises LfmError if the server refuses, fails or ends in the middle. Closing the iterator aborts the request.
        """
        stream_fields = {"stream": True, "stream_options": {"include_usage": True}}
        request = {"model": await self.model(), **body, **stream_fields}
        try:
            async with contextlib.AsyncExitStack() as stack:
                response = await self._send(request, stack)
                async for line in response.aiter_lines():
                    event = http_client.event_data(line)
                    if event is not None and (text := answer.read(event)):
                        yield text
        except httpx2.HTTPError as error:
            raise http_client.unreachable(self._root, error) from error
        if answer.finish_reason is None:
            raise InternalError(f"{self._root} ended its answer without saying why. The connection may have been cut.")

    async def _send(self, request: Json, stack: contextlib.AsyncExitStack) -> httpx2.Response:
        """Begin the request, again if there is a reason to. The response is closed with `stack`."""
        num_retries = 0
        while True:
            try:
                sending = self._client.stream("POST", f"{self._root}/v1/chat/completions", json=request)
                response = await stack.enter_async_context(sending)
                if response.status_code == 200:
                    return response
                await response.aread()
                raise http_client.refused(response)
            except (OverloadedError, *_LOST) as error:
                if num_retries == self._max_retries:
                    raise
                wait_s = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
            num_retries += 1
            await asyncio.sleep(min(wait_s, MAX_RETRY_WAIT_S))


@dataclass(slots=True)
class _CallPieces:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class Answer:
    """What the events of one answer add up to, but for its text."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.usage = Usage()
        self._calls: dict[int, _CallPieces] = {}

    def read(self, event: Mapping[str, Any]) -> str:
        """Take one chunk; returns the text that it adds. Raises InternalError for what is no chat completion chunk."""
        try:
            if isinstance(event.get("usage"), dict):
                self.usage = _read_usage(event["usage"])
            if not event.get("choices"):
                return ""
            choice = event["choices"][0]
            delta = choice.get("delta") or {}
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            for piece in delta.get("tool_calls") or ():
                self._add_call_piece(piece)
            return str(delta.get("content") or "")
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise InternalError(f"The server sent a chunk of another shape than OpenAI's ({error!r}).") from error

    def _add_call_piece(self, piece: Mapping[str, Any]) -> None:
        function = piece.get("function") or {}
        call = self._calls.setdefault(int(piece.get("index") or 0), _CallPieces())
        call.id = piece.get("id") or call.id
        call.name = function.get("name") or call.name
        call.arguments.append(function.get("arguments") or "")

    def calls(self, first_number: int) -> list[ToolCall]:
        """The calls in their order; those without an id get one from `first_number` on."""
        ordered = [call for _, call in sorted(self._calls.items())]
        return [_to_call(call, default_id=f"call_{number}") for number, call in enumerate(ordered, start=first_number)]


def _to_call(pieces: _CallPieces, *, default_id: str) -> ToolCall:
    raw = "".join(pieces.arguments)
    try:
        arguments = json.loads(raw or "{}")
    except (ValueError, RecursionError):
        arguments = None
    return ToolCall(
        id=pieces.id or default_id,
        name=pieces.name,
        arguments=arguments if isinstance(arguments, dict) else None,
        raw=raw,
    )


def _read_usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
        num_cached_tokens=int(details.get("cached_tokens") or usage.get("cached_tokens") or 0),
        num_output_tokens=int(usage.get("completion_tokens") or 0),
    )
