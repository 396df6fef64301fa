"""A conversation as token ids, built from parts: control tokens are appended as ids, text is encoded as literal text.

No text of a message, tool or call can therefore become a control token. On ordinary text the ids equal those of the
checkpoint's chat template (the 24B's, or the "wrapped" one of LFM2-8B-A1B and dense LFM2; no template code is run).
"""

import json
from collections.abc import Mapping, Sequence

from lfm.chat.messages import Message, check_messages
from lfm.chat.tokenizer import Tokenizer, check_text
from lfm.chat.tool_calls import CallForm, render_calls, render_json_calls
from lfm.errors import RequestError

Tool = Mapping[str, object] | str


def build_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    call_form: CallForm = "pythonic",
    system_note: str = "",
    add_generation_prompt: bool = True,
    keep_past_thinking: bool = False,
) -> list[int]:
    """Build the ids of a conversation, BOS included exactly once.

    Args:
        tools: definitions as JSON objects, or texts that are taken as they are.
        call_form: how the calls of earlier turns are written.
        system_note: a line of our own behind the system text.
        keep_past_thinking: leave `<think>` parts in assistant turns before the last one.

    Raises RequestError whose `param` names the message, part or tool that no prompt can hold.
    """
    check_messages(messages)
    writer = _PromptWriter(tokenizer)
    has_system = messages[0].role in ("system", "developer")
    _write_system(writer, messages[0].text if has_system else "", tools, note=system_note)
    last_assistant = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    for index in range(int(has_system), len(messages)):
        message = messages[index]
        is_past = message.role == "assistant" and index != last_assistant
        strips_thinking = is_past and not keep_past_thinking and tokenizer.prompt_form == "plain"
        _write_message(writer, message, index, strips_thinking=strips_thinking, call_form=call_form)
    if add_generation_prompt:
        writer.control(tokenizer.special.im_start)
        writer.text("assistant\n")
    return writer.ids()


class _PromptWriter:
    """Collects control ids and runs of text. Adjacent texts are encoded as one, as in a rendered template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._runs: list[list[str]] = [[]]
        self._controls: list[int] = []  # _controls[i] stands between _runs[i] and _runs[i + 1]
        self.control(tokenizer.special.bos)

    def control(self, token_id: int | None) -> None:
        assert token_id is not None, "the tokenizer was checked for this control token"
        self._controls.append(token_id)
        self._runs.append([])

    def text(self, text: str, param: str | None = None) -> None:
        check_text(text, param=param)
        self._runs[-1].append(text)

    def ids(self) -> list[int]:
        encoded = self.tokenizer.encode_many(["".join(run) for run in self._runs])
        ids = encoded[0]
        for control, run in zip(self._controls, encoded[1:], strict=True):
            ids.append(control)
            ids.extend(run)
        return ids


def _write_system(writer: _PromptWriter, text: str, tools: Sequence[Tool], *, note: str) -> None:
    if note:
        text = f"{text}\n{note}" if text else note
    if not text and not tools:
        return  # LFM2 has no default system prompt
    special = writer.tokenizer.special
    is_wrapped = writer.tokenizer.prompt_form == "wrapped"
    writer.control(special.im_start)
    writer.text("system\n")
    writer.text(text, "messages[0].content")
    if tools:
        writer.text("\nList of tools: " if text else "List of tools: ")
        if is_wrapped:
            writer.control(special.tool_list_start)
        writer.text("[")
        for index, tool in enumerate(tools):
            writer.text(", " if index else "")
            writer.text(_render_tool(tool, f"tools[{index}]"), f"tools[{index}]")
        writer.text("]")
        if is_wrapped:
            writer.control(special.tool_list_end)
    writer.control(special.im_end)
    writer.text("\n")


def _write_message(
    writer: _PromptWriter, message: Message, index: int, *, strips_thinking: bool, call_form: CallForm
) -> None:
    special = writer.tokenizer.special
    is_response = message.role == "tool" and writer.tokenizer.prompt_form == "wrapped"
    text = message.text
    if strips_thinking and "</think>" in text:
        text = text.rpartition("</think>")[2].strip()
    writer.control(special.im_start)
    writer.text("system\n" if message.role == "developer" else f"{message.role}\n")
    if is_response:
        writer.control(special.tool_response_start)
    writer.text(text, f"messages[{index}].content")
    if is_response:
        writer.control(special.tool_response_end)
    if message.tool_calls:
        _write_calls(writer, message, f"messages[{index}].tool_calls", call_form)
    writer.control(special.im_end)
    writer.text("\n")


def _write_calls(writer: _PromptWriter, message: Message, param: str, call_form: CallForm) -> None:
    # The published templates drop tool_calls. The caller has written the turn's text by now: our grammar lets nothing
    # follow a block of calls, so the model wrote them in this order.
    special = writer.tokenizer.special
    if special.tool_call_start is None or special.tool_call_end is None:
        raise RequestError(f"{param} cannot be used: this model has no tool call tokens. Remove it.", param=param)
    try:
        calls = (render_json_calls if call_form == "json" else render_calls)(message.tool_calls)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{param} holds arguments that are not plain JSON ({error}).", param=param) from error
    writer.control(special.tool_call_start)
    writer.text(calls, param)
    writer.control(special.tool_call_end)


def _render_tool(tool: Tool, param: str) -> str:
    if isinstance(tool, str):
        return tool
    try:
        return json.dumps(tool, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{param} is not plain JSON ({error}).", param=param) from error
