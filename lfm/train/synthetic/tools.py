"""Tools: an intent gets a name, parameters and descriptions that differ from conversation to conversation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm.train.synthetic.draw import Draw, JsonValue, latin_word
from lfm.train.synthetic.tables import language_table, shared_words, world

_OPAQUE_NAMES = 0.12  # names that say nothing: then only the description tells what the tool does
_VENDOR_NAMES = 0.1
_SERVED = 0.4  # of the search tools that nobody asks for
_INSIDE_LOOPS = 0.08  # of the tools that nobody asks for directly


@dataclass(frozen=True, slots=True)
class Intent:
    """Something a user can want. `noun` is the thing of a verb-and-thing intent, in English."""

    name: str
    spec: Mapping[str, Any]
    noun: str | None = None

    @property
    def key(self) -> str:
        return self.name if self.noun is None else f"{self.name}_{self.noun}"

    @property
    def required(self) -> Sequence[str]:
        required: Sequence[str] = self.spec["required"]
        return required

    def phrases(self, language: str) -> Mapping[str, Any]:
        """What people say for it in a language."""
        table = language_table(language)
        found: Mapping[str, Any] = table["verbs" if self.noun else "intents"][self.name]
        return found


@dataclass(frozen=True, slots=True)
class Tool:
    """A concrete tool. `parameters`: slot -> the parameter's name."""

    intent: Intent
    name: str
    parameters: Mapping[str, str]
    definition: Mapping[str, object]

    def arguments(self, data: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        """A call's arguments by parameter name, in the order of the definition."""
        return {name: data[slot] for slot, name in self.parameters.items() if slot in data}


def intent_named(name: str) -> Intent:
    return Intent(name, world()["intents"][name])


def any_intent(draw: Draw) -> Intent:
    """One that users ask for directly; book_flight and refund only occur inside loops."""
    if draw.chance(0.4):
        return verb_intent(draw.one(list(world()["verbs"])), draw.one(list(draw.table["nouns"])))
    return intent_named(draw.one(list(draw.table["intents"])))


def verb_intent(verb: str, noun: str) -> Intent:
    return Intent(verb, world()["verbs"][verb], noun)


def make_tool(draw: Draw, intent: Intent, used: Sequence[str] = ()) -> Tool:
    """A tool for an intent. Optional slots outside `used` are there or not."""
    spec = intent.spec
    slots = list(spec["required"])
    slots += [slot for slot in spec.get("optional", ()) if slot in used or draw.chance(0.4)]
    if draw.chance(0.2):
        slots = draw.shuffled(slots)
    parameters: dict[str, str] = {}
    for slot in slots:
        free = [name for name in world()["slots"][slot]["names"] if name not in parameters.values()]
        parameters[slot] = draw.one(free)
    name = _name(draw, intent)
    description = draw.phrase(spec["descriptions"]).replace("{noun}", intent.noun or "")
    schema = {
        "type": "object",
        "properties": {parameters[slot]: _property(draw, slot) for slot in slots},
        "required": [parameters[slot] for slot in slots if slot in spec["required"]],
    }
    if draw.chance(0.3):
        schema = _as_our_agent_writes(schema)
    definition: dict[str, object] = {"name": name, "description": description, "parameters": schema}
    return Tool(intent, name, parameters, definition)


def _as_our_agent_writes(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that `lfm.agent` makes of a function with these parameters: keys by name, defaults, nothing else."""
    properties = {}
    for name, spec in schema["properties"].items():
        default = {} if name in schema["required"] else {"default": spec["enum"][0] if "enum" in spec else 1}
        properties[name] = dict(sorted((spec | default).items()))
    return dict(sorted((schema | {"properties": properties, "additionalProperties": False}).items()))


def served_tool(name: str) -> Tool:
    """A tool that the service runs itself, as it shows it to the model."""
    description = world()["served"][name]
    query = {"type": "string", "minLength": 1, "maxLength": 300, "description": "What to look for."}
    schema = {"type": "object", "properties": {"query": query}, "required": ["query"]}
    definition: dict[str, object] = {"name": name, "description": description, "parameters": schema}
    return Tool(intent_named("search"), name, {"query": "query"}, definition)


def other_tool(draw: Draw) -> Tool:
    """One that may stand beside those that a conversation needs."""
    if draw.chance(_INSIDE_LOOPS):
        return make_tool(draw, intent_named(draw.one(("book_flight", "refund"))))
    intent = any_intent(draw)
    if intent.name == "search" and draw.chance(_SERVED):
        return served_tool(draw.one(("web_search", "file_search")))
    return make_tool(draw, intent)


def wrapped(draw: Draw, tools: Sequence[Tool]) -> tuple[Mapping[str, object], ...]:
    """The definitions, plain or all of them in OpenAI's envelope, in any order."""
    definitions = [tool.definition for tool in draw.shuffled(tools)]
    if draw.chance(0.15):
        return tuple({"type": "function", "function": definition} for definition in definitions)
    return tuple(definitions)


def result_of(draw: Draw, tool: Tool, data: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """What the tool returns, by the names of the results in the table."""
    if tool.intent.name == "calculator":
        return {"result": compute(str(data["expression"]))}
    return {name: draw.value(kind).data for name, kind in tool.intent.spec["results"].items()}


def result_text(draw: Draw, results: Mapping[str, JsonValue]) -> str:
    """A tool's answer as the JSON text of a tool message."""
    shown: dict[str, JsonValue] = {"status": "ok"} if draw.chance(0.3) else {}
    separators = (",", ":") if draw.chance(0.4) else None  # as the agent writes, or as most programs do
    return json.dumps(shown | dict(results), ensure_ascii=False, separators=separators)


def foreign_result(draw: Draw) -> tuple[str, str, tuple[str, ...]]:
    """A result in a form of its own: what a tool returns, the answer, and what that has to say.

    A text is passed on as it is. Of an object whose names mean nothing to us, every name and value is told.
    """
    if draw.chance(0.6):
        text = draw.one((_reading, lambda draw: str(draw.value("message").data), _reading))(draw)
        return text, text, (text,)
    fields: dict[str, JsonValue] = {}
    for _ in range(draw.integer(1, 3)):
        fields[_field_name(draw)] = draw.one((draw.value("amount"), draw.value("coined"), draw.value("count"))).data
    told = ", ".join(f"{name}: {value}" for name, value in fields.items())
    return result_text(draw, fields), f"{told}.", tuple(str(value) for value in fields.values())


def _reading(draw: Draw) -> str:
    """Something like "Sunny, 18 °C"."""
    unit = draw.one((" °C", "°", " %", " kg", " km/h", " EUR", ""))
    parts = [str(draw.value(draw.one(("title", "coined"))).data), f"{draw.value('temperature').text}{unit}"]
    return draw.one((", ", ": ", " - ")).join(parts if draw.chance(0.6) else reversed(parts))


def _field_name(draw: Draw) -> str:
    return "_".join(latin_word(draw) for _ in range(draw.integer(1, 2)))


def compute(expression: str) -> int | float:
    """The value of "x op y"."""
    left, sign, right = expression.split()
    x, y = (float(number) if "." in number else int(number) for number in (left, right))
    value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign]
    rounded = round(value, 2)
    return int(rounded) if rounded == int(rounded) else rounded


def _name(draw: Draw, intent: Intent) -> str:
    if draw.chance(_OPAQUE_NAMES):
        return draw.unseen(lambda: f"{latin_word(draw)}_{draw.integer(1, 99)}")
    name = draw.phrase(intent.spec["names"]).replace("{noun}", intent.noun or "")
    style = draw.generator.random()
    if style < 0.2:
        head, *rest = name.split("_")
        name = head + "".join(word.capitalize() for word in rest)
    elif style < 0.3:
        name = name.replace("_", ".", 1)
    return f"{draw.one(shared_words('vendors'))}_{name}" if draw.chance(_VENDOR_NAMES) else name


def _property(draw: Draw, slot: str) -> dict[str, object]:
    spec = world()["slots"][slot]
    schema: dict[str, object] = {"type": spec["type"]}
    if spec.get("told") or draw.chance(0.8):  # what decides how a value is written is always told
        schema["description"] = draw.phrase(spec["descriptions"])
    if "enum" in spec:
        schema["enum"] = spec["enum"]
    return schema
