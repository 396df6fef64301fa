"""Tool calls as LFM2 writes them: `[f(a="b"), g(n=1)]` between the call markers. The markers are the caller's ids."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from lfm.chat.messages import ToolCall

CallForm = Literal["pythonic", "json"]


def render_calls(calls: Sequence[ToolCall]) -> str:
    """Write calls as one bracketed list. Raises ValueError, TypeError or RecursionError for what JSON cannot hold."""
    return "[" + ", ".join(_render_call(call) for call in calls) + "]"


def render_json_calls(calls: Sequence[ToolCall]) -> str:
    """Write calls in the JSON form that the model uses when its system prompt asks for it. Raises as `render_calls`."""
    return json.dumps([{"name": call.name, "arguments": call.arguments} for call in calls], ensure_ascii=False)


def is_keyword(name: str) -> bool:
    """Whether a call can give an argument of that name as `name=value`: a reader finds where the name ends."""
    return name.isidentifier() or (bool(name) and all(char.isalnum() or char in "_.$@-" for char in name))


def _render_call(call: ToolCall) -> str:
    arguments = [f"{key}={_render_value(value)}" for key, value in call.arguments.items() if is_keyword(key)]
    others = {key: value for key, value in call.arguments.items() if not is_keyword(key)}
    if others:
        arguments.append(f"**{_render_value(others)}")
    return f"{call.name}({', '.join(arguments)})"


def _render_value(value: object) -> str:
    # As the family's later template does: strings in double quotes, mappings as JSON, the rest as Python writes it.
    # Unlike there, quotes inside a string are escaped, so that the call reads back as what it was.
    if isinstance(value, str | Mapping):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
