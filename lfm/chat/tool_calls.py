"""Tool calls as LFM2 writes them: `[f(a="b"), g(n=1)]` between the call markers. The markers are the caller's ids."""

import json
from collections.abc import Mapping, Sequence

from lfm.chat.messages import ToolCall


def render_calls(calls: Sequence[ToolCall]) -> str:
    """Write calls as one bracketed list. Raises ValueError, TypeError or RecursionError for what JSON cannot hold."""
    return "[" + ", ".join(_render_call(call) for call in calls) + "]"


def _render_call(call: ToolCall) -> str:
    arguments = ", ".join(f"{key}={_render_value(value)}" for key, value in call.arguments.items())
    return f"{call.name}({arguments})"


def _render_value(value: object) -> str:
    # As the family's later template does: strings in double quotes, mappings as JSON, the rest as Python writes it.
    # Unlike there, quotes inside a string are escaped, so that the call reads back as what it was.
    if isinstance(value, str | Mapping):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
