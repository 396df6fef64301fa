"""What a user asks for: a sentence in one language, and the tool call that it means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lfm.chat.messages import ToolCall
from lfm.train.synthetic.draw import Draw, JsonValue, Value, constants_of, render, slots_of
from lfm.train.synthetic.tables import part_of
from lfm.train.synthetic.tools import Intent, Tool, make_tool


@dataclass(frozen=True, slots=True)
class Request:
    """One wish. `values` are all slots of the intent that a complete request would name; `text` may leave some out."""

    tool: Tool
    text: str
    values: Mapping[str, Value]
    data: Mapping[str, JsonValue]
    missing: tuple[str, ...] = ()

    @property
    def call(self) -> ToolCall:
        return ToolCall(name=self.tool.name, arguments=self.tool.arguments(self.data))

    @property
    def texts(self) -> dict[str, str]:
        return {slot: value.text for slot, value in self.values.items()}


def full_request(draw: Draw, intent: Intent, given: Mapping[str, Value] | None = None) -> Request:
    """A request that names everything that the tool needs. `given`: values that are not drawn."""
    phrases = intent.phrases(draw.language)
    if "free" in phrases and draw.chance(0.35):
        template = draw.phrase(phrases["free"])
    else:
        action = draw.phrase(phrases["vp"])
        template = draw.one(_frames(draw, action)).replace("{vp}", action)
    return _request(draw, intent, template, given or {})


def bare_request(draw: Draw, intent: Intent) -> Request:
    """A request that leaves out at least one thing that the tool needs."""
    request = _request(draw, intent, draw.phrase(intent.phrases(draw.language)["bare"]), {})
    assert request.missing, f"{draw.language} {intent.name}: a bare request names everything"
    return request


def _frames(draw: Draw, action: str) -> list[str]:
    """The sentences that an action fits into: "I want to ..." none that says "tell me"."""
    frames = part_of(draw.table["frames"], draw.split)
    says_me = any(mark in f" {action} " for mark in draw.table.get("first_person", ()))
    if "wishes" not in draw.table or says_me:
        return frames
    return frames + part_of(draw.table["wishes"], draw.split)


def _request(draw: Draw, intent: Intent, template: str, given: Mapping[str, Value]) -> Request:
    constants = constants_of(template)
    named = [slot for slot in slots_of(template) if slot not in ("a_noun", "the_noun")]
    slots = dict.fromkeys([*intent.required, *named])
    values = {slot: given.get(slot) or draw.value(slot) for slot in slots if slot not in constants}
    # Two values of one kind in a sentence are never the same: a city to itself, a currency into itself.
    if len({value.text for value in values.values()}) < len(values):
        return _request(draw, intent, template, given)
    data = {slot: value.data for slot, value in values.items()} | constants
    missing = tuple(slot for slot in intent.required if slot not in named)
    texts = {slot: value.text for slot, value in values.items()} | _nouns(draw, intent)
    tool = make_tool(draw, intent, used=named)
    return Request(tool, polite(draw, render(template, texts)), values, data, missing)


def _nouns(draw: Draw, intent: Intent) -> dict[str, str]:
    if intent.noun is None:
        return {}
    indefinite, _, definite = draw.table["nouns"][intent.noun].partition("|")
    return {"a_noun": indefinite, "the_noun": definite or indefinite}


def polite(draw: Draw, text: str) -> str:
    """The text, now and then with a greeting before it or thanks behind it."""
    if draw.chance(0.2):
        text = draw.phrase(draw.table["openers"]) + text
    if draw.chance(0.15):
        text += draw.phrase(draw.table["closers"])
    return text


def joined(draw: Draw, texts: list[str]) -> str:
    """Several wishes as one message."""
    joiners = part_of(draw.table["joiners"], draw.split)
    if len(texts) > 2:  # a numbered list has two places
        joiners = [joiner for joiner in joiners if not joiner.startswith("1.")]
    whole = texts[0]
    for text in texts[1:]:
        whole = draw.one(joiners).replace("{a}", whole).replace("{b}", text)
    return whole


def answer_to(draw: Draw, request: Request, results: Mapping[str, JsonValue]) -> tuple[str, tuple[str, ...]]:
    """The assistant's sentence about a tool's results, and the results that it has to name."""
    templates = request.tool.intent.phrases(draw.language)["answer"]
    texts = {name: str(value) for name, value in results.items()}
    # What the user said wins over a result of the same name, as in "it is {time} in {city}", where only one is given.
    facts = tuple(texts[slot] for slot in needed_in(templates) if slot in texts and slot not in request.values)
    return render(draw.phrase(templates), texts | request.texts), facts


def needed_in(templates: Sequence[str]) -> list[str]:
    """The slots that all templates name: an answer without the others is right, too."""
    return [slot for slot in slots_of(templates[0]) if all(slot in slots_of(other) for other in templates)]
