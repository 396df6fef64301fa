"""How a generation becomes an HTTP answer: server-sent events as they come, or one JSON body of the same deltas."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from starlette.types import Send

from lfm.chat.output import Delta, join_deltas
from lfm.protocol import ErrorInfo
from lfm.server.asgi import send_json
from lfm.server.errors import error_body
from lfm.server.generation import Choice, DeltaSource
from lfm.server.sse import DONE, KEEP_ALIVE, EventWriter, data_event
from lfm.server.state import RequestRecord

Json = dict[str, object]


class Usage(NamedTuple):
    """The tokens of one HTTP request. `num_cached_tokens` of the prompt's were found in the cache."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every event and body of one answer says, and what this client expects of them (see `lfm.server.dialect`)."""

    request_id: str
    created: int
    model: str
    n: int
    warnings: list[dict[str, str]]
    for_together: bool
    includes_usage: bool  # stream_options.include_usage
    runs_usage: bool  # stream_options.continuous_usage_stats too, as in vLLM: in every chunk

    def fields(self, kind: str) -> Json:
        """The fields that every object of chat and completions begins with; `kind` is its `object`."""
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}

    @property
    def has_usage_field(self) -> bool:
        """Whether the chunks of a stream have the field, null but for the last."""
        return self.for_together or self.includes_usage


class AnswerShape(Protocol):
    """One answer in the form of one API family: as events, or as one body."""

    def begin(self, choices: Sequence[Choice]) -> bytes:
        """The events that go out as soon as the engine has accepted the request; may be empty."""

    def news(self, news: Sequence[tuple[Choice, Delta]], usage: Usage, *, is_last: bool) -> bytes:
        """The events for new deltas, of each choice at most one; empty if they show nothing yet."""

    def keep_alive(self) -> bytes:
        """What to send when nothing came for a while."""

    async def end(self, usage: Usage) -> bytes:
        """The events after the last delta."""

    def failure(self, error: ErrorInfo, http_request_id: str) -> bytes:
        """The events that end a stream which cannot go on."""

    async def body(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Json:
        """The whole answer: every choice with all of its deltas joined."""


class ChunkShape(ABC):
    """What the streams of chat and completions have in common: unnamed chunks of one choice each, then [DONE]."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self._choices: Sequence[Choice] = ()
        self._has_opened = False

    @abstractmethod
    def opening(self, choices: Sequence[Choice]) -> list[Json]:
        """The chunks in front of the first delta."""

    @abstractmethod
    def chunk(self, choice: Choice, delta: Delta, usage: Json | None) -> Json:
        """The chunk for one delta of one choice. `usage` is set where the chunk must carry it."""

    @abstractmethod
    def usage_chunk(self, usage: Json) -> Json:
        """The chunk without choices that carries the usage at the end."""

    def begin(self, choices: Sequence[Choice]) -> bytes:
        self._choices = choices
        return b""

    def news(self, news: Sequence[tuple[Choice, Delta]], usage: Usage, *, is_last: bool) -> bytes:
        runs = self._head.runs_usage
        last_usage = chat_usage(usage) if runs or (is_last and self._head.for_together) else None
        last_choice = news[-1][0]
        shown = [(choice, delta) for choice, delta in news if _is_worth_sending(delta)]
        if not shown:
            return b""
        opening = [] if self._has_opened else self.opening(self._choices)
        chunks = [
            self.chunk(choice, delta, last_usage if runs or choice is last_choice else None) for choice, delta in shown
        ]
        self._has_opened = True
        return b"".join(map(data_event, opening + chunks))

    def keep_alive(self) -> bytes:
        return KEEP_ALIVE

    async def end(self, usage: Usage) -> bytes:
        return (data_event(self.usage_chunk(chat_usage(usage))) if self._head.includes_usage else b"") + DONE

    def failure(self, error: ErrorInfo, http_request_id: str) -> bytes:
        """A data object with a top-level "error", which the SDKs raise."""
        return data_event(error_body(error)) + DONE


def usage_of(generation: DeltaSource) -> Usage:
    return Usage(generation.num_prompt_tokens, generation.num_cached_tokens, generation.num_output_tokens)


def chat_usage(usage: Usage) -> Json:
    """Cached tokens stand in both places where clients look for them."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "cached_tokens": usage.num_cached_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


async def send_whole(send: Send, generation: DeltaSource, shape: AnswerShape) -> None:
    """Collect every delta, then send one body."""
    collected: list[list[Delta]] = [[] for _ in generation.choices]
    while news := await generation.next_deltas():
        for choice, delta in news:
            collected[choice.index].append(delta)
    answers = [(choice, join_deltas(collected[choice.index])) for choice in generation.choices]
    await generation.aclose()
    await send_json(send, await shape.body(answers, usage_of(generation)))


async def send_events(
    send: Send, generation: DeltaSource, shape: AnswerShape, *, record: RequestRecord, keepalive_s: float
) -> None:
    """Stream the deltas. While a slow socket holds up the writer, later events pile up and leave as one chunk."""
    writer = EventWriter(send)
    record.stream_failure = shape.failure
    await writer.start()
    if opening := shape.begin(generation.choices):
        await writer.write(opening)
    while (news := await generation.next_deltas(timeout_s=keepalive_s)) != []:
        if news is None:
            data = shape.keep_alive()
        else:
            data = shape.news(news, usage_of(generation), is_last=generation.is_finished)
        if data:
            await writer.write(data)
    await generation.aclose()
    await writer.finish(await shape.end(usage_of(generation)))


def _is_worth_sending(delta: Delta) -> bool:
    """Tokens whose text is still held back (half a character, the begin of a stop string) show nothing yet."""
    return bool(delta.text or delta.calls or delta.logprobs or delta.prompt_logprobs or delta.finish_reason)
