"""Who answers in `lfm chat`: a model in this process, or a server."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Protocol

import httpx2

from lfm import http_client as http
from lfm.chat.defaults import RequestedSampling
from lfm.chat.messages import parse_messages
from lfm.llm import LLM

Json = dict[str, object]


@dataclass(slots=True)
class Turn:
    """One answer as far as it has come: its tokens, its text, and before that the messages of its use of tools."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    messages: list[Json] = field(default_factory=list)
    text: str = ""


class Speaker(Protocol):
    """Whoever answers: a loaded model or a server."""

    name: str

    def answer(self, messages: list[Json], turn: Turn) -> Iterator[str]:
        """Yield the answer to messages in OpenAI's form piece by piece, and keep `turn` up to date.

        The reader adds the pieces to `turn.text`. KeyboardInterrupt may end it at any piece.
        """


class LocalSpeaker:
    """A model in this process. Later turns find the earlier ones in the prefix cache."""

    def __init__(self, llm: LLM, *, requested: RequestedSampling, max_tokens: int | None) -> None:
        self.name = llm.source.name
        self._llm = llm
        self._requested = requested
        self._max_tokens = max_tokens

    def answer(self, messages: list[Json], turn: Turn) -> Iterator[str]:
        prompt_ids = self._llm.chat_prompt(parse_messages(messages))
        turn.num_prompt_tokens = len(prompt_ids)
        sampling = self._llm.sampling(
            self._requested, max_tokens=self._max_tokens, num_prompt_tokens=turn.num_prompt_tokens
        )
        stream = self._llm.stream(prompt_ids, sampling=sampling)
        with held_interrupt() as interrupt, contextlib.closing(stream):
            for delta in stream:
                turn.num_output_tokens = stream.num_output_tokens
                turn.num_cached_tokens = stream.num_cached_tokens
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

    def answer(self, messages: list[Json], turn: Turn) -> Iterator[str]:
        body = {
            "model": self.name,
            "messages": messages,
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
                        yield _read_chunk(event, turn)
        except httpx2.HTTPError as error:
            raise http.unreachable(self._root, error) from error


def _read_chunk(event: dict[str, object], turn: Turn) -> str:
    """The text of one chunk. Chunks may carry several tokens; the usage at the end has the true count."""
    usage = event.get("usage")
    if isinstance(usage, dict):
        turn.num_prompt_tokens = int(usage.get("prompt_tokens", 0))
        turn.num_output_tokens = int(usage.get("completion_tokens", 0))
        details = usage.get("prompt_tokens_details")
        turn.num_cached_tokens = int(details.get("cached_tokens") or 0) if isinstance(details, dict) else 0
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return ""
    text = choices[0].get("delta", {}).get("content") or ""
    if text and not isinstance(usage, dict):
        turn.num_output_tokens += 1
    return str(text)
