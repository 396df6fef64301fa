"""From what a request says about tools and the form of its answer to a prompt, a grammar, and how calls are read.

The one place where that is decided, for every API family and for every turn of a loop that runs tools in the server:
a family translates its own fields into `OutputFields`, and `plan_turn` makes of them what an engine request needs.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from lfm.chat.grammar import AnswerFormat, answer_grammar
from lfm.chat.grammar_tools import JSON_REQUEST, ToolChoice, ToolSet, call_form, parse_tool_choice
from lfm.chat.messages import Message
from lfm.chat.prompt import build_prompt
from lfm.chat.tool_calls import CallForm
from lfm.protocol import GrammarSpec
from lfm.server.admission import check_text_size, in_thread_if_long, renaming
from lfm.server.output_fields import OutputFields
from lfm.server.state import AppState

NO_CALLS = ToolChoice("none")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRules:
    """What the output of a request may be.

    Attributes:
        tools: those that the prompt shows, or None.
        choice: which of them the model may or must call.
        is_parallel: whether it may make several calls at once.
        form: how calls are written, those of earlier turns, too.
        system_note: what the system prompt must say for it.
        answer: what an answer without calls must be, and `answer_param`, the field that asks for it; None: any text.
        grammar: what the tokens of the output must spell.
        reads_calls: whether blocks of calls in the output are tool calls.
        bans_calls: whether the token that opens a block is never sampled.
        notes: of what the request says and the grammar does not enforce.
    """

    tools: ToolSet | None = None
    choice: ToolChoice = NO_CALLS
    is_parallel: bool = True
    form: CallForm = "pythonic"
    system_note: str = ""
    answer: AnswerFormat | None = None
    answer_param: str = "response_format"
    grammar: GrammarSpec | None = None
    notes: tuple[str, ...] = ()

    @property
    def reads_calls(self) -> bool:
        return self.choice.mode != "none"

    @property
    def bans_calls(self) -> bool:
        return self.tools is not None and not self.reads_calls


FREE = OutputRules()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of the model, ready for the engine."""

    messages: Sequence[Message]
    rules: OutputRules
    prompt_ids: list[int] = field(repr=False)


async def plan_turn(
    messages: Sequence[Message],
    fields: OutputFields,
    *,
    state: AppState,
    tenant: str,
    num_bytes: int,
    param: str,
    add_generation_prompt: bool = True,
) -> Turn:
    """Read the fields, try the grammar, build the prompt. Raises RequestError for whatever is wrong with the request.

    Args:
        tenant: who asks; see `Grammars.check`.
        num_bytes: about how long all of it is.
        param: what the client calls the messages.
    """
    rules = await read_rules(messages, fields, state=state)
    await check_grammar(rules, state=state, tenant=tenant)
    prompt_ids = await chat_prompt(
        messages, rules, state=state, num_bytes=num_bytes, param=param, add_generation_prompt=add_generation_prompt
    )
    return Turn(messages=messages, rules=rules, prompt_ids=prompt_ids)


async def with_messages(
    turn: Turn, messages: Sequence[Message], *, state: AppState, num_bytes: int, param: str
) -> Turn:
    """The same turn of another conversation."""
    prompt_ids = await chat_prompt(messages, turn.rules, state=state, num_bytes=num_bytes, param=param)
    return replace(turn, messages=messages, prompt_ids=prompt_ids)


async def plan_next_turn(turn: Turn, more: Sequence[Message], *, state: AppState, tenant: str, param: str) -> Turn:
    """The turn after tools were run in the server: `more` are the calls that the model made, and their results.

    Tools and form stay, so that its prompt begins with the last one's. A model that had to call may now answer: one
    that always has to call would never end.
    """
    rules = turn.rules
    if rules.choice.mode == "required":
        rules = await asyncio.to_thread(_without_obligation, rules, state)
        await check_grammar(rules, state=state, tenant=tenant)
    messages = [*turn.messages, *more]
    num_bytes = sum(len(message.text) for message in messages)
    return await with_messages(replace(turn, rules=rules), messages, state=state, num_bytes=num_bytes, param=param)


async def with_tools(turn: Turn, names: frozenset[str], *, state: AppState, tenant: str) -> Turn:
    """The same turn and prompt, but only these of its tools may be called."""
    rules = await asyncio.to_thread(_restricted, turn.rules, names, state)
    await check_grammar(rules, state=state, tenant=tenant)
    return replace(turn, rules=rules)


async def read_rules(messages: Sequence[Message], fields: OutputFields, *, state: AppState) -> OutputRules:
    """What the fields ask for. The grammar is not tried yet; nothing may be generated before `check_grammar`."""
    if fields.asks_for_nothing:
        return replace(FREE, form=call_form(messages, fields.tool_format))
    return await asyncio.to_thread(_read_rules, messages, fields, state)


async def check_grammar(rules: OutputRules, *, state: AppState, tenant: str) -> None:
    """Have the grammar tried in a process of its own. Raises RequestError if no engine should be given it."""
    if rules.grammar is None:
        return
    check = partial(state.grammars.check, tenant=tenant)
    if not rules.reads_calls:
        await check(rules.grammar, param=rules.answer_param)
        return
    if rules.answer is not None and rules.answer.lark is not None:
        # By itself first: a walk into calls or answer may never come to the client's own grammar.
        await check(answer_grammar(rules.answer), param=rules.answer_param)
    await check(rules.grammar, param="tools")


async def chat_prompt(
    messages: Sequence[Message],
    rules: OutputRules = FREE,
    *,
    state: AppState,
    num_bytes: int,
    param: str,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of a conversation with the tools that it has. `param` and `num_bytes` as for `plan_turn`."""
    num_chars = sum(len(message.text) for message in messages)
    check_text_size(num_chars, state, param=param)
    tools = [] if rules.tools is None else rules.tools.definitions
    build = partial(
        build_prompt,
        state.tokenizer,
        messages,
        tools=tools,
        call_form=rules.form,
        system_note=rules.system_note,
        add_generation_prompt=add_generation_prompt,
    )
    with renaming("messages", param):
        return await in_thread_if_long(build, num_bytes=num_bytes)


def _read_rules(messages: Sequence[Message], fields: OutputFields, state: AppState) -> OutputRules:
    tools = None
    if not fields.has_no_tools:
        tools = state.grammars.tool_sets.read(fields.tools, syntax=fields.tool_syntax)
    choice = parse_tool_choice(fields.tool_choice, () if tools is None else tools.names)
    answer, notes = state.grammars.answer_formats.read(fields.answer_format, param=fields.format_param)
    form = call_form(messages, fields.tool_format)
    is_told = tools is None or form == "pythonic" or call_form(messages) == "json"
    rules = OutputRules(
        tools=tools,
        choice=choice,
        is_parallel=fields.is_parallel,
        form=form,
        system_note="" if is_told else f"{JSON_REQUEST}.",
        answer=answer,
        answer_param=fields.format_param if answer is None or answer.lark is None else f"{fields.format_param}.grammar",
        notes=(*(() if tools is None else tools.notes), *notes),
    )
    if rules.reads_calls:
        return replace(rules, grammar=_calls_grammar(rules, state))
    if answer is None:
        return rules
    with renaming("response_format", fields.format_param):
        return replace(rules, grammar=answer_grammar(answer))


def _calls_grammar(rules: OutputRules, state: AppState) -> GrammarSpec:
    assert rules.tools is not None, "without tools there is nothing to call"
    return rules.tools.grammar(
        rules.choice,
        special=state.tokenizer.special,
        form=rules.form,
        is_parallel=rules.is_parallel,
        answer=rules.answer,
    )


def _restricted(rules: OutputRules, names: frozenset[str], state: AppState) -> OutputRules:
    names &= rules.choice.names if rules.choice.names is not None else names
    if names:
        rules = replace(rules, choice=ToolChoice("auto", names))
        return replace(rules, grammar=_calls_grammar(rules, state))
    grammar = None if rules.answer is None else answer_grammar(rules.answer)
    return replace(rules, choice=NO_CALLS, grammar=grammar)


def _without_obligation(rules: OutputRules, state: AppState) -> OutputRules:
    rules = replace(rules, choice=replace(rules.choice, mode="auto"))
    return replace(rules, grammar=_calls_grammar(rules, state))
