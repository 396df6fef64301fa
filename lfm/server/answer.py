"""How a generation becomes an HTTP answer: server-sent events as they come, or one JSON body of the same deltas."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Send

from lfm.chat.output import Delta, join_deltas
from lfm.server.asgi import send_json
from lfm.server.generation import Choice, Generation
from lfm.server.sse import EventWriter
from lfm.server.state import RequestRecord

Json = dict[str, object]


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

    def fields(self, kind: str) -> Json:
        """The fields that every object begins with; `kind` is its `object`."""
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}

    @property
    def has_usage_field(self) -> bool:
        """Whether the chunks of a stream have the field, null but for the last."""
        return self.for_together or self.includes_usage


class AnswerShape(Protocol):
    """The JSON of one API family. `usage` is set where the answer must carry it."""

    def opening(self, choices: Sequence[Choice]) -> list[Json]:
        """The events in front of the first delta."""

    def chunk(self, choice: Choice, delta: Delta, usage: Json | None) -> Json:
        """The event for one delta of one choice."""

    def usage_chunk(self, usage: Json) -> Json:
        """The event without choices that carries the usage at the end."""

    def body(self, choices: Sequence[tuple[Choice, Delta]], usage: Json) -> Json:
        """The whole answer: every choice with all of its deltas joined."""


def usage_of(generation: Generation) -> Json:
    """Cached tokens stand in both places where clients look for them."""
    prompt, output, cached = generation.num_prompt_tokens, generation.num_output_tokens, generation.num_cached_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "cached_tokens": cached,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def send_whole(send: Send, generation: Generation, shape: AnswerShape) -> None:
    """Collect every delta, then send one body."""
    collected: list[list[Delta]] = [[] for _ in generation.choices]
    while news := await generation.next_deltas():
        for choice, delta in news:
            collected[choice.index].append(delta)
    answers = [(choice, join_deltas(collected[choice.index])) for choice in generation.choices]
    body = shape.body(answers, usage_of(generation))
    await generation.aclose()
    await send_json(send, body)


async def send_events(
    send: Send,
    generation: Generation,
    shape: AnswerShape,
    *,
    head: AnswerHead,
    record: RequestRecord,
    keepalive_s: float,
) -> None:
    """Stream the deltas. While a slow socket holds up the writer, later events pile up and leave as one chunk."""
    writer = EventWriter(send, record)
    await writer.start()
    opening = shape.opening(generation.choices)
    while (news := await generation.next_deltas(timeout_s=keepalive_s)) != []:
        if news is None:
            await writer.keep_alive()
            continue
        last_usage = usage_of(generation) if generation.is_finished and head.for_together else None
        last_choice = news[-1][0]
        chunks = [
            shape.chunk(choice, delta, last_usage if choice is last_choice else None)
            for choice, delta in news
            if _is_worth_sending(delta)
        ]
        if chunks:
            await writer.send(opening + chunks)
            opening = []
    if head.includes_usage:
        await writer.send([shape.usage_chunk(usage_of(generation))])
    await generation.aclose()
    await writer.finish()


def _is_worth_sending(delta: Delta) -> bool:
    """Tokens whose text is still held back (half a character, the begin of a stop string) show nothing yet."""
    return bool(delta.text or delta.logprobs or delta.prompt_logprobs or delta.finish_reason)
