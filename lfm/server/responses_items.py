"""The output items of one response while they grow, and the events that tell of it."""

from collections.abc import Callable, Sequence

from lfm.chat.call_parser_stream import CallDelta
from lfm.chat.output import TokenScore
from lfm.server.answer import Json
from lfm.server.logprobs import logprob_entries
from lfm.server.responses_input import new_id


class MessageItem:
    """The output item of a text, while it grows. `annotate` says what it cites when it is whole."""

    def __init__(self, *, output_index: int, annotate: Callable[[str], list[Json]] | None = None) -> None:
        self._annotate = annotate
        self._annotations: list[Json] = []
        self._item_id = new_id("message")
        self._output_index = output_index
        self._texts: list[str] = []
        self._logprobs: list[Json] = []
        self._status = "in_progress"

    def opening(self) -> list[Json]:
        item = self.value() | {"content": []}
        return [
            {"type": "response.output_item.added", "output_index": self._output_index, "item": item},
            self._part_event("response.content_part.added", {"part": self._part()}),
        ]

    def add(self, text: str, scores: Sequence[TokenScore]) -> Json:
        logprobs = logprob_entries(scores)
        self._texts.append(text)
        self._logprobs += logprobs
        return self._part_event("response.output_text.delta", {"delta": text, "logprobs": logprobs})

    def close(self, status: str) -> list[Json]:
        self._status = status
        text = "".join(self._texts)
        self._annotations = [] if self._annotate is None else self._annotate(text)
        return [
            *(
                self._part_event(
                    "response.output_text.annotation.added", {"annotation": annotation, "annotation_index": index}
                )
                for index, annotation in enumerate(self._annotations)
            ),
            self._part_event("response.output_text.done", {"text": text, "logprobs": self._logprobs}),
            self._part_event("response.content_part.done", {"part": self._part()}),
            {
                "type": "response.output_item.done",
                "output_index": self._output_index,
                "item": self.value(),
            },
        ]

    def value(self) -> Json:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": self._status,
            "content": [self._part()],
        }

    def _part(self) -> Json:
        return {
            "type": "output_text",
            "text": "".join(self._texts),
            "annotations": list(self._annotations),
            "logprobs": list(self._logprobs),
        }

    def _part_event(self, kind: str, fields: Json) -> Json:
        return {
            "type": kind,
            "item_id": self._item_id,
            "output_index": self._output_index,
            "content_index": 0,
            **fields,
        }


class CallItem:
    """The output item of one function call."""

    def __init__(self, call: CallDelta, *, output_index: int) -> None:
        self.index = call.index  # among the calls of the answer
        self._item_id = new_id("function_call")
        self._call_id = call.id
        self._name = call.name
        self._output_index = output_index
        self._arguments: list[str] = []
        self._status = "in_progress"

    def opening(self) -> list[Json]:
        return [{"type": "response.output_item.added", "output_index": self._output_index, "item": self.value()}]

    def add(self, arguments: str) -> Json:
        self._arguments.append(arguments)
        return self._event("response.function_call_arguments.delta", {"delta": arguments})

    def close(self, status: str) -> list[Json]:
        self._status = status
        fields: Json = {"name": self._name, "arguments": "".join(self._arguments)}
        return [
            self._event("response.function_call_arguments.done", fields),
            {"type": "response.output_item.done", "output_index": self._output_index, "item": self.value()},
        ]

    def value(self) -> Json:
        return {
            "id": self._item_id,
            "type": "function_call",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
            "status": self._status,
        }

    def _event(self, kind: str, fields: Json) -> Json:
        return {"type": kind, "item_id": self._item_id, "output_index": self._output_index, **fields}
