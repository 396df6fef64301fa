"""Searches of earlier answers, as clients send them back: what they found, as the model saw it, and citable again."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace

import orjson

from lfm.chat.messages import Message
from lfm.search.citations import MAX_NUMBER
from lfm.search.sources import Source, grounded
from lfm.server.search_annotations import Citations, Cited

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundMessage(Message):
    """The result of a search. Its `content` is what the model reads of its `sources`."""

    sources: tuple[Source, ...] = ()
    is_file: bool = False

    @staticmethod
    def of(sources: Sequence[Source], *, call_id: str | None = None, is_file: bool = False) -> "FoundMessage":
        return FoundMessage(
            role="tool",
            content=grounded(sources) if sources else "Nothing was found.",
            tool_call_id=call_id,
            sources=tuple(sources),
            is_file=is_file,
        )


def cite_past(messages: Sequence[Message], citations: Citations) -> list[Message]:
    """The messages, with what their searches found added to `citations`: an answer may cite it again.

    Sources keep their numbers, so that marks in earlier answers stay true and the prompt what it was. One whose number
    another source has gets a new one: some clients put conversations together.
    """
    cited: list[Message] = []
    for message in messages:
        if isinstance(message, FoundMessage) and message.sources:
            sources = []
            for source in message.sources:
                is_free = 0 < source.number <= MAX_NUMBER and not citations.has(source.number)
                sources.append(source if is_free else replace(source, number=citations.next_number))
                citations.add(Cited(source=sources[-1], is_file=message.is_file))
            message = FoundMessage.of(sources, call_id=message.tool_call_id, is_file=message.is_file)
        cited.append(message)
    return cited


def past_results(content: object, *, call_id: str) -> Message:
    """A result block that a client sends back; of another service's, its titles and addresses."""
    if isinstance(content, dict):
        text = f"The search failed: {str(content.get('error_code', 'unavailable'))[:80]}."
        return Message(role="tool", content=text, tool_call_id=call_id)
    entries = [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
    return FoundMessage.of([_unpacked(entry, number) for number, entry in enumerate(entries, 1)], call_id=call_id)


def past_sources(results: object, *, is_file: bool) -> Message:
    """An item's results."""
    entries = [entry for entry in results if isinstance(entry, dict)] if isinstance(results, list) else []
    sources = []
    for at, entry in enumerate(entries, 1):
        number = entry.get("number")
        sources.append(
            Source(
                number=number if type(number) is int else at,
                text=str(entry.get("text") or ""),
                title=str(entry.get("title") or entry.get("filename") or ""),
                url=str(entry.get("url") or entry.get("file_id") or ""),
                location=str(entry.get("location") or ""),
                date=str(entry["date"]) if entry.get("date") else None,
            )
        )
    return FoundMessage.of(sources, is_file=is_file)


def _unpacked(entry: Json, number: int) -> Source:
    text = location = ""
    try:
        kept = orjson.loads(base64.b64decode(str(entry.get("encrypted_content", "")), validate=True))
        number, text, location = int(kept["number"]), str(kept["text"]), str(kept.get("location", ""))
    except (ValueError, TypeError, KeyError, OverflowError):  # not ours
        pass
    return Source(
        number=number,
        text=text,
        title=str(entry.get("title") or ""),
        url=str(entry.get("url") or ""),
        location=location,
        date=str(entry["page_age"]) if entry.get("page_age") else None,
    )
