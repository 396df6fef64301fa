"""What a request asks of its output, in one form for all API families; `lfm.server.constraints` reads it."""

from dataclasses import dataclass

from lfm.chat.grammar_tools import OPENAI_TOOLS, ToolSyntax


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFields:
    """What a request asks of its output, nothing of it checked, in the forms of OpenAI's chat API.

    `tool_syntax` says how the API writes tools; `format_param` is what the client calls the field of the format.
    """

    tools: object = None
    tool_choice: object = None
    is_parallel: bool = True
    answer_format: object = None
    tool_format: object = None
    tool_syntax: ToolSyntax = OPENAI_TOOLS
    format_param: str = "response_format"

    @property
    def has_no_tools(self) -> bool:
        return self.tools is None or self.tools == []

    @property
    def asks_for_nothing(self) -> bool:
        return self.has_no_tools and self.tool_choice in (None, "none", "auto") and self.answer_format is None
