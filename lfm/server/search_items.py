"""Searches that ran in the server, in the forms of the API families: items of responses, blocks of messages."""

import base64
import uuid
from dataclasses import replace

import orjson

from lfm.chat.output import Delta
from lfm.search.sources import Source
from lfm.server.search_annotations import file_name
from lfm.server.search_run import SearchRun
from lfm.server.server_tools_loop import SearchStep

Json = dict[str, object]

# What `include` can add to a search.
WEB_SOURCES, WEB_RESULTS, FILE_RESULTS = (
    "web_search_call.action.sources",
    "web_search_call.results",
    "file_search_call.results",
)
_ERROR_CODES = {
    "unavailable": "unavailable",
    "invalid_tool_input": "invalid_tool_input",
    "max_uses_exceeded": "max_uses_exceeded",
    "no_room": "unavailable",
}


def in_order(delta: Delta) -> list[Delta]:
    """A whole answer as it came: text and steps by turns, the caller's calls, the steps behind them, the end."""
    pieces: list[Delta] = []
    at = 0
    late = [step for step in delta.steps if isinstance(step, SearchStep) and step.is_after_calls]
    for step in delta.steps:
        if step in late:
            continue
        if step.position > at:
            pieces.append(Delta(text=delta.text[at : step.position]))
            at = step.position
        pieces.append(Delta(steps=(step,)))
    rest = replace(delta, text=delta.text[at:], steps=(), finish_reason=None)
    return [*pieces, rest, Delta(steps=tuple(late), finish_reason=delta.finish_reason)]


class SearchItem:
    """The output item of one search of a response."""

    def __init__(self, step: SearchStep, *, output_index: int, includes: frozenset[str]) -> None:
        self.call_id = step.call_id
        self._is_web = step.tool.name == "web_search"
        self._kind = f"{step.tool.name}_call"
        self._item_id = f"{'ws' if self._is_web else 'fs'}_{uuid.uuid4().hex}"
        self._query = step.query
        self._output_index = output_index
        self._shows_sources = WEB_SOURCES in includes
        self._shows_results = (WEB_RESULTS if self._is_web else FILE_RESULTS) in includes
        self._status = "in_progress"
        self._run: SearchRun | None = None

    def opening(self) -> list[Json]:
        added = {"type": "response.output_item.added", "output_index": self._output_index, "item": self.value()}
        events = [added, self._event("in_progress"), self._event("searching")]
        self._status = "searching"
        return events

    def finish(self, run: SearchRun) -> list[Json]:
        """The events of its end. A search without results is complete; one that could not be made has failed."""
        self._run = run
        self._status = "completed" if run.error is None else "failed"
        done = {"type": "response.output_item.done", "output_index": self._output_index, "item": self.value()}
        return [self._event("completed"), done] if run.error is None else [done]

    def close(self, status: str) -> list[Json]:
        """Another item begins, which ends no search; only a response that fails does."""
        if self._run is None and status == "incomplete":
            self._status = "failed"
        return []

    def value(self) -> Json:
        item: Json = {"id": self._item_id, "type": self._kind, "status": self._status}
        if not self._is_web:
            return item | {"queries": [self._query], "results": self._files() if self._shows_results else None}
        action: Json = {"type": "search", "query": self._query, "queries": [self._query]}
        if self._shows_sources:
            action["sources"] = self._sources()
        return item | {"action": action} | ({"results": self._results()} if self._shows_results else {})

    def found(self) -> tuple[str, Json]:
        """Its id, and what a later response needs to know of it, whether it is shown or not."""
        return self._item_id, {"results": self._results() if self._is_web else self._files()}

    def _sources(self) -> list[Json]:
        """With the digest of what was read under each address: the trace of the search."""
        reads = () if self._run is None else self._run.reads
        return [
            {"type": "url", "url": read.url, "title": read.title, "sha256": read.sha256, "num_bytes": read.num_bytes}
            for read in reads
        ]

    def _results(self) -> list[Json]:
        sources = () if self._run is None else self._run.sources
        return [
            {"number": source.number, "title": source.title, "url": source.url, "text": source.text, **_place(source)}
            for source in sources
        ]

    def _files(self) -> list[Json]:
        sources = () if self._run is None else self._run.sources
        return [
            {
                "file_id": source.url,
                "filename": file_name(source),
                "title": source.title,
                "text": source.text,
                "number": source.number,
                **_place(source),
                "score": None,
                "attributes": {},
            }
            for source in sources
        ]

    def _event(self, name: str) -> Json:
        return {
            "type": f"response.{self._kind}.{name}",
            "output_index": self._output_index,
            "item_id": self._item_id,
        }


def tool_use_block(step: SearchStep) -> Json:
    """A search as Anthropic's block, before its input."""
    return {"type": "server_tool_use", "id": tool_use_id(step), "name": step.tool.name, "input": {}}


def tool_use_id(step: SearchStep) -> str:
    return f"srvtoolu_{step.call_id.removeprefix('call_')}"


def tool_result_block(step: SearchStep) -> Json:
    """What a search found. `encrypted_content` holds the text, so that a client that sends it back keeps it."""
    assert step.run is not None, "the search is done"
    content: object
    if step.run.error is not None:
        code = _ERROR_CODES.get(step.run.error, "unavailable")
        content = {"type": "web_search_tool_result_error", "error_code": code}
    else:
        content = [
            {
                "type": "web_search_result",
                "title": source.title or source.url,
                "url": source.url,
                "encrypted_content": _packed(source),
                "page_age": source.date,
            }
            for source in step.run.sources
        ]
    return {"type": f"{step.tool.name}_tool_result", "tool_use_id": tool_use_id(step), "content": content}


def _packed(source: Source) -> str:
    kept = {"number": source.number, "text": source.text, "location": source.location}
    return base64.b64encode(orjson.dumps(kept)).decode()


def _place(source: Source) -> Json:
    """What else the model reads of a source, where there is any."""
    return {name: value for name, value in (("location", source.location), ("date", source.date)) if value}
