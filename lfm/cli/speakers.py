"""Who answers in `lfm chat`: a model in this process, or a server."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Protocol

import httpx2

from lfm import http_client as http
from lfm.chat.defaults import RequestedSampling
from lfm.chat.messages import Message
from lfm.llm import LLM


@dataclass(slots=True)
class Counts:
    """Tokens of one answer, as far as they are known."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


class Speaker(Protocol):
    """Whoever answers: a loaded model or a server."""

    name: str

    def answer(self, messages: list[Message], counts: Counts) -> Iterator[str]:
        """Yield the answer piece by piece and keep `counts` up to date. KeyboardInterrupt may end it at any piece."""


class LocalSpeaker:
    """A model in this process. Later turns find the earlier ones in the prefix cache."""

    def __init__(self, llm: LLM, *, requested: RequestedSampling, max_tokens: int | None) -> None:
        self.name = llm.source.name
        self._llm = llm
        self._requested = requested
        self._max_tokens = max_tokens

    def answer(self, messages: list[Message], counts: Counts) -> Iterator[str]:
        prompt_ids = self._llm.chat_prompt(messages)
        counts.num_prompt_tokens = len(prompt_ids)
        sampling = self._llm.sampling(
            self._requested, max_tokens=self._max_tokens, num_prompt_tokens=counts.num_prompt_tokens
        )
        stream = self._llm.stream(prompt_ids, sampling=sampling)
        with held_interrupt() as interrupt, contextlib.closing(stream):
            for delta in stream:
                counts.num_output_tokens = stream.num_output_tokens
                counts.num_cached_tokens = stream.num_cached_tokens
                yield delta.text
                interrupt.raise_if_held()


class HeldInterrupt:
    """Whether Ctrl-C was pressed: an exception in the middle of an engine step would leave the step half done."""

    def __init__(self) -> None:
        self._is_held = False

    def hold(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:  # pressed twice: the user does not want to wait for the step
            raise KeyboardInterrupt
        self._is_held = True

    def raise_if_held(self) -> None:
        if self._is_held:
            raise KeyboardInterrupt


@contextlib.contextmanager
def held_interrupt() -> Iterator[HeldInterrupt]:
    """Hold Ctrl-C back until the body asks for it."""
    interrupt = HeldInterrupt()
    before = signal.signal(signal.SIGINT, interrupt.hold)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class ServerSpeaker:
    """A server that speaks OpenAI's chat completions."""

    def __init__(
        self, client: httpx2.Client, root: str, *, requested: RequestedSampling, max_tokens: int | None
    ) -> None:
        self.name = http.served_model(client, root)
        self._client = client
        self._root = root
        named = {**asdict(requested), "max_tokens": max_tokens}
        self._sampling = {name: value for name, value in named.items() if value is not None}

    def answer(self, messages: list[Message], counts: Counts) -> Iterator[str]:
        body = {
            "model": self.name,
            "messages": [{"role": message.role, "content": message.text} for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
        }
        try:
            with self._client.stream("POST", f"{self._root}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise http.refused(response)
                for line in response.iter_lines():
                    event = http.event_data(line)
                    if event is not None:
                        yield _read_chunk(event, counts)
        except httpx2.HTTPError as error:
            raise http.unreachable(self._root, error) from error


def _read_chunk(event: dict[str, object], counts: Counts) -> str:
    """The text of one chunk. Chunks may carry several tokens; the usage at the end has the true count."""
    usage = event.get("usage")
    if isinstance(usage, dict):
        counts.num_prompt_tokens = int(usage.get("prompt_tokens", 0))
        counts.num_output_tokens = int(usage.get("completion_tokens", 0))
        details = usage.get("prompt_tokens_details")
        counts.num_cached_tokens = int(details.get("cached_tokens") or 0) if isinstance(details, dict) else 0
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return ""
    text = choices[0].get("delta", {}).get("content") or ""
    if text and not isinstance(usage, dict):
        counts.num_output_tokens += 1
    return str(text)
