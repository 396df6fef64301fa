"""The tools of a request: their definitions checked and read; which of them the model may, must or must not call."""

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lfm.chat.grammar import AnswerFormat, calls_grammar
from lfm.chat.grammar_calls import ToolGrammar, argument_objects
from lfm.chat.json_fields import check_strict, json_type, optional_text, typed
from lfm.chat.json_memory import JsonMemory
from lfm.chat.messages import Message
from lfm.chat.schema import read_schema, schema_bytes
from lfm.chat.schema_texts import Texts
from lfm.chat.tokenizer import SpecialTokens
from lfm.chat.tool_calls import CallForm
from lfm.errors import RequestError
from lfm.protocol import MAX_SCHEMAS_BYTES, MAX_TOOLS, GrammarSpec

NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
MAX_SPECS = 8  # grammars remembered of one set of tools
JSON_REQUEST = "Output function calls as JSON"  # what the model was trained to find in its system prompt

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """How an API writes a tool: the `type` of one that the caller runs, and the field with its arguments' schema."""

    kind: str = "function"
    schema_field: str = "parameters"


OPENAI_TOOLS = ToolSyntax()
ANTHROPIC_TOOLS = ToolSyntax("custom", "input_schema")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What may be called: `names` None means every tool of the request."""

    mode: Mode = "auto"
    names: frozenset[str] | None = None


class ToolSet:
    """The tools of a request, read and checked. Grammars made from it are remembered: agents send their tools again.

    Attributes:
        definitions: bare `{"name", "description", "parameters"}` objects, as the model was trained to see them.
        names: in order.
        notes: parts of schemas that describe without being enforced, for the answer's `warnings`.
        num_bytes: of the definitions as JSON, about.
    """

    def __init__(
        self, raw: Sequence[object], *, max_tokens: int, param: str = "tools", syntax: ToolSyntax = OPENAI_TOOLS
    ) -> None:
        if len(raw) > MAX_TOOLS:
            raise RequestError(f"{param} has {len(raw)} entries. Allowed: up to {MAX_TOOLS}.", param=param)
        self.definitions: list[dict[str, object]] = []
        self.num_bytes = 0
        self._tools: dict[str, ToolGrammar] = {}
        self._texts = Texts()  # bounds the work on patterns for all tools together
        notes: list[str] = []
        for index, item in enumerate(raw):
            self._add(item, f"{param}[{index}]", notes, max_tokens, syntax)
        self.names = tuple(self._tools)
        self.notes = tuple(notes)
        self._specs: OrderedDict[tuple[object, ...], tuple[AnswerFormat | None, GrammarSpec]] = OrderedDict()
        self._specs_lock = threading.Lock()

    def _add(self, item: object, where: str, notes: list[str], max_tokens: int, syntax: ToolSyntax) -> None:
        raw = typed(item, dict, where)
        kind = raw.get("type")
        if kind not in (None, syntax.kind):
            raise RequestError(
                f"{where}.type={str(kind)[:80]!r} is not supported. Allowed: {syntax.kind}.", param=f"{where}.type"
            )
        if "function" in raw:
            raw, where = typed(raw["function"], dict, f"{where}.function"), f"{where}.function"
        name = typed(raw.get("name"), str, f"{where}.name")
        if not NAME.fullmatch(name):
            raise RequestError(
                f"{where}.name={name[:128]!r} is no tool name. Allowed: 1 to 128 letters, digits, _, . and -.",
                param=f"{where}.name",
            )
        if name in self._tools:
            raise RequestError(f"{where}.name={name!r} is used twice. Give every tool its own.", param=f"{where}.name")
        check_strict(raw.get("strict"), where)
        definition: dict[str, object] = {"name": name}
        if (description := optional_text(raw.get("description"), f"{where}.description")) is not None:
            definition["description"] = description
        parameters = raw.get(syntax.schema_field)
        if parameters is not None:
            definition["parameters"] = parameters
        self.definitions.append(definition)
        where = f"{where}.{syntax.schema_field}"
        self._tools[name] = self._read_parameters(name, parameters, where, notes, max_tokens)

    def _read_parameters(
        self, name: str, parameters: object, where: str, notes: list[str], max_tokens: int
    ) -> ToolGrammar:
        if parameters is None or parameters == {}:
            return ToolGrammar(name, None)
        typed(parameters, dict, where)
        self.num_bytes += schema_bytes(parameters, param=where)
        if self.num_bytes > MAX_SCHEMAS_BYTES:
            raise RequestError(
                f"{where} brings the schemas of all tools to {self.num_bytes} bytes. Allowed: at most "
                f"{MAX_SCHEMAS_BYTES} together.",
                param=where,
            )
        schema = read_schema(parameters, param=where, max_tokens=max_tokens, texts=self._texts)
        if not argument_objects(schema):
            raise RequestError(f"{where} describes no object. Allowed: a schema of type object.", param=where)
        notes += schema.notes
        return ToolGrammar(name, schema)

    def grammar(
        self,
        choice: ToolChoice,
        *,
        special: SpecialTokens,
        form: CallForm = "pythonic",
        is_parallel: bool = True,
        answer: AnswerFormat | None = None,
    ) -> GrammarSpec:
        """The grammar of calls of the chosen tools, whose mode must not be "none"; see `calls_grammar`."""
        key = (choice, special, form, is_parallel, id(answer))  # the entry keeps the answer's format, and so its id
        with self._specs_lock:
            if key in self._specs:
                self._specs.move_to_end(key)
                return self._specs[key][1]
        chosen = [tool for name, tool in self._tools.items() if choice.names is None or name in choice.names]
        spec = calls_grammar(
            chosen,
            special=special,
            form=form,
            is_parallel=is_parallel,
            is_required=choice.mode == "required",
            answer=answer,
        )
        with self._specs_lock:
            self._specs[key] = (answer, spec)
            if len(self._specs) > MAX_SPECS:
                self._specs.popitem(last=False)
        return spec


class ToolSets:
    """The tool sets of recent requests, by what they say. Any thread may use it."""

    def __init__(self, *, max_tokens: int, max_bytes: int = 8 * MAX_SCHEMAS_BYTES) -> None:
        self._max_tokens = max_tokens
        self._memory = JsonMemory[ToolSet](max_bytes=max_bytes)

    def read(self, raw: object, *, param: str = "tools", syntax: ToolSyntax = OPENAI_TOOLS) -> ToolSet:
        """The tools of a request. Raises RequestError with the path of what is wrong."""
        tools = typed(raw, list, param)
        make = partial(ToolSet, tools, max_tokens=self._max_tokens, param=param, syntax=syntax)
        return self._memory.get(tools, make, param=param, kind=syntax.kind)


def parse_tool_choice(value: object, names: Sequence[str], *, param: str = "tool_choice") -> ToolChoice:
    """Read `tool_choice` in OpenAI's forms: a mode, one function by name, or `allowed_tools` with a mode of their own.

    `names` are the tools of the request. Without any, only "none" and "auto" make sense.
    """
    if value is None:
        return ToolChoice("auto" if names else "none")
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise RequestError(
                f"{param}={value[:80]!r} is not known. Allowed: none, auto, required, or an object that names tools.",
                param=param,
            )
        choice = ToolChoice(value)  # type: ignore[arg-type]  # looked at above
    else:
        choice = _parse_choice_object(value, names, param)
    if not names and choice.mode == "required":
        raise RequestError(f"{param} asks for a call, but the request has no tools. Send tools.", param=param)
    return choice if names else ToolChoice("none")


def _parse_choice_object(value: object, names: Sequence[str], param: str) -> ToolChoice:
    if not isinstance(value, dict):
        raise RequestError(f"{param} is {json_type(value)}. Allowed: a string or an object.", param=param)
    kind = value.get("type", "function")
    if kind == "function":
        inner, where = value, param
        if "function" in value:
            inner, where = typed(value["function"], dict, f"{param}.function"), f"{param}.function"
        return ToolChoice("required", frozenset((_known_name(inner.get("name"), names, f"{where}.name"),)))
    if kind != "allowed_tools":
        raise RequestError(
            f"{param}.type={str(kind)[:80]!r} is not known. Allowed: function, allowed_tools.", param=f"{param}.type"
        )
    inner, where = value, param
    if "allowed_tools" in value:
        inner, where = typed(value["allowed_tools"], dict, f"{param}.allowed_tools"), f"{param}.allowed_tools"
    mode = inner.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise RequestError(
            f"{where}.mode={str(mode)[:80]!r} is not known. Allowed: auto, required.", param=f"{where}.mode"
        )
    chosen = set()
    for index, item in enumerate(typed(inner.get("tools"), list, f"{where}.tools")):
        tool = typed(item, dict, f"{where}.tools[{index}]")
        tool = typed(tool.get("function", tool), dict, f"{where}.tools[{index}].function")
        chosen.add(_known_name(tool.get("name"), names, f"{where}.tools[{index}].name"))
    if not chosen:
        raise RequestError(f"{where}.tools is empty. Name a tool, or send tool_choice none.", param=f"{where}.tools")
    return ToolChoice(mode, frozenset(chosen))


def _known_name(value: object, names: Sequence[str], where: str) -> str:
    name = typed(value, str, where)
    if name not in names:
        listed = ", ".join(names[:10]) or "none"
        raise RequestError(f"{where}={name[:128]!r} is no tool of this request. Its tools: {listed}.", param=where)
    return name


def call_form(messages: Sequence[Message], tool_format: object = None) -> CallForm:
    """The form of calls that a request asks for: `tool_format`, else what its system prompt says, else Pythonic."""
    if tool_format is not None:
        if tool_format not in ("pythonic", "json"):
            raise RequestError(
                f"tool_format={str(tool_format)[:80]!r} is not known. Allowed: pythonic, json.", param="tool_format"
            )
        return "json" if tool_format == "json" else "pythonic"
    is_asked = any(one.role in ("system", "developer") and JSON_REQUEST in one.text for one in messages)
    return "json" if is_asked else "pythonic"
