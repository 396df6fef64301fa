"""Conversations with tools: one call, several, none that fits, something missing, loops over several steps.

An episode is a piece of a conversation: what the user wants, the calls, their results, the answer. Several episodes
over the same tools make a longer conversation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lfm.chat.messages import Message, ToolCall
from lfm.train.synthetic.draw import Draw, JsonValue, Value, expression_of, render
from lfm.train.synthetic.requests import Request, answer_to, bare_request, full_request, joined, needed_in, polite
from lfm.train.synthetic.tools import (
    Intent,
    Tool,
    any_intent,
    compute,
    foreign_result,
    intent_named,
    make_tool,
    result_of,
    result_text,
    verb_intent,
)

ExpectedKind = Literal["calls", "json", "cited", "absent", "text", "one_of"]


@dataclass(frozen=True, slots=True)
class Expected:
    """What an assistant's turn is judged by. `contains`: strings of which an answer in words needs every one; if the
    kind is one_of, any one."""

    kind: ExpectedKind
    contains: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Episode:
    """Messages from a user's to the assistant's last, what each assistant turn is judged by, and the tools needed."""

    messages: tuple[Message, ...]
    expected: tuple[Expected, ...]
    tools: tuple[Tool, ...] = ()
    forbidden: frozenset[str] = frozenset()  # keys of intents whose tools would change what is right


# Tools about the same things that do something else.
_NEIGHBOURS = {
    "weather": ("clock",), "clock": ("weather",), "stock": ("currency",), "currency": ("stock",),
    "track": ("order", "refund"), "order": ("track", "refund"), "restaurant": ("hotel",), "hotel": ("restaurant",),
    "flights": ("hotel", "book_flight"), "light": ("music",), "music": ("light",), "translate": ("message",),
}  # fmt: skip
# What the model answers without a calculator: (sign, largest first number, largest second number).
_EASY = {"+": (20, 20), "-": (20, 20), "*": (10, 10), "/": (100, 10)}

_FOREIGN_RESULTS = 0.12  # of single calls: results in a form that the table of intents does not know


def user(text: str) -> Message:
    return Message(role="user", content=text)


def says(text: str) -> Message:
    return Message(role="assistant", content=text)


def calls(*made: ToolCall) -> Message:
    return Message(role="assistant", tool_calls=made)


def returned(text: str) -> Message:
    return Message(role="tool", content=text)


def single(draw: Draw) -> Episode:
    """One request, one call, its result and an answer."""
    request = full_request(draw, any_intent(draw))
    return _called(draw, request.text, [request])


def arithmetic(draw: Draw) -> Episode:
    """A sum, through the calculator."""
    request = full_request(draw, intent_named("calculator"))
    return _called(draw, request.text, [request])


def parallel(draw: Draw) -> Episode:
    """Two or three requests in one message: as many calls in one list. Half of the time they are of one kind."""
    count = 2 if draw.chance(0.75) else 3
    requests = [full_request(draw, any_intent(draw))]
    is_same = draw.chance(0.5)
    while len(requests) < count:
        if is_same:
            new = _with_tool(full_request(draw, requests[0].tool.intent), requests[0])
            requests += [new] if new is not None else []
        else:
            new = full_request(draw, any_intent(draw))
            if new.tool.intent.key not in [request.tool.intent.key for request in requests]:
                requests.append(new)
    return _called(draw, joined(draw, [request.text for request in requests]), requests)


def no_tool(draw: Draw) -> Episode:
    """A request that none of the tools serves, though some may look like it."""
    request = full_request(draw, any_intent(draw))
    if is_easy(request):
        return no_tool(draw)
    forbidden = {request.tool.intent.key, "search"}
    near = [make_tool(draw, intent) for intent in _near(draw, request.tool.intent)]
    return Episode((user(request.text), says(_declines(draw))), (_declined(draw),), tuple(near), frozenset(forbidden))


def toolless(draw: Draw) -> Episode:
    """A request for which a tool would be needed, and none is there; a small sum is answered."""
    if draw.chance(0.5):
        return _easy_sum(draw)
    request = full_request(draw, any_intent(draw))
    if is_easy(request):
        return toolless(draw)
    return Episode((user(request.text), says(_declines(draw))), (_declined(draw),))


def _declines(draw: Draw) -> str:
    return draw.phrase(draw.table["no_tool"])


def _declined(draw: Draw) -> Expected:
    return Expected("one_of", tuple(draw.table["no_tool"]))


def is_easy(request: Request) -> bool:
    """Whether this is a sum that needs no calculator."""
    if request.tool.intent.name != "calculator":
        return False
    x, sign, y = str(request.data["expression"]).split()
    return int(x) <= _EASY[sign][0] and int(y) <= _EASY[sign][1]


def _easy_sum(draw: Draw) -> Episode:
    sign = draw.one(list(_EASY))
    x, y = draw.integer(1, 10 if sign in "*/" else 20), draw.integer(1, 10 if sign in "*/" else 20)
    if sign == "/":
        x *= y
    if sign == "-" and x < y:
        x, y = y, x
    expression = expression_of(draw, sign, x, y)
    phrases = intent_named("calculator").phrases(draw.language)
    text = render(draw.phrase(phrases["free"]), {"expression": expression.text})
    result = str(compute(str(expression.data)))
    if draw.chance(0.2):
        text = expression.text
    answer = render(draw.phrase(phrases["answer"]), {"result": result})
    return Episode((user(polite(draw, text)), says(answer)), (Expected("text", (result,)),))


def missing(draw: Draw) -> Episode:
    """A request that lacks something: the assistant asks, the user tells, then comes the call."""
    request = bare_request(draw, any_intent(draw))
    if len(request.missing) > 2:
        return missing(draw)
    join = draw.table.get("sentence_join", " ").join
    question = join(draw.phrase(draw.table["ask"][slot]) for slot in request.missing)
    asked = (user(request.text), says(question))
    told = ", ".join(request.values[slot].text for slot in request.missing)
    reply = draw.phrase(draw.table["replies"]).replace("{value}", told)
    rest = _called(draw, reply, [request])
    asks = Expected("one_of", tuple(draw.table["ask"][request.missing[0]]))
    return Episode(asked + rest.messages, (asks, *rest.expected), rest.tools)


def loop(draw: Draw) -> Episode:
    """A task whose second call needs the first one's result."""
    return draw.one(_CHAINS)(draw)


def _called(draw: Draw, text: str, requests: Sequence[Request]) -> Episode:
    tools = tuple({request.tool.intent.key: request.tool for request in requests}.values())
    messages = [user(text), calls(*(request.call for request in requests))]
    if len(requests) == 1 and tools[0].intent.name != "calculator" and draw.chance(_FOREIGN_RESULTS):
        result, sentence, facts_of_it = foreign_result(draw)
        expected = (Expected("calls"), Expected("text", facts_of_it))
        return Episode((*messages, returned(result), says(sentence)), expected, tools)
    sentences: list[str] = []
    facts: list[str] = []
    for request in requests:
        results = result_of(draw, request.tool, request.data)
        messages.append(returned(result_text(draw, results)))
        sentence, named = answer_to(draw, request, results)
        sentences.append(sentence)
        facts += named
    messages.append(says(draw.table.get("sentence_join", " ").join(sentences)))
    return Episode(tuple(messages), (Expected("calls"), Expected("text", tuple(facts))), tools)


def _with_tool(request: Request, other: Request) -> Request | None:
    """The same wish to another request's tool; None where that lacks a parameter that the wish names."""
    if not request.data.keys() <= other.tool.parameters.keys():
        return None
    return Request(other.tool, request.text, request.values, request.data)


def _near(draw: Draw, intent: Intent) -> list[Intent]:
    """Intents that are easily taken for this one: another thing, or another thing to do with it."""
    if intent.noun is None:
        return [intent_named(name) for name in _NEIGHBOURS.get(intent.name, ()) if draw.chance(0.6)]
    verbs = [verb for verb in draw.table["verbs"] if verb != intent.name]
    nouns = [noun for noun in draw.table["nouns"] if noun != intent.noun]
    return [verb_intent(draw.one(verbs), intent.noun), verb_intent(intent.name, draw.one(nouns))]


def _chain(draw: Draw, name: str, steps: Sequence[tuple[str, Mapping[str, str]]], drawn: Sequence[str]) -> Episode:
    """Calls one after the other. A step names its intent and, per slot, the slot or the earlier result it takes."""
    spec = draw.table["chains"][name]
    values: dict[str, Value] = {slot: draw.value(slot) for slot in drawn}
    if len({value.text for value in values.values()}) < len(values):
        return _chain(draw, name, steps, drawn)
    known: dict[str, JsonValue] = {slot: value.data for slot, value in values.items()}
    texts = {slot: value.text for slot, value in values.items()}
    messages, tools = [user(render(draw.phrase(spec["ask"]), texts))], []
    for intent_name, sources in steps:
        tool = make_tool(draw, intent_named(intent_name), used=list(sources))
        data = {slot: _source(source, known) for slot, source in sources.items()}
        results = result_of(draw, tool, data)
        messages += [
            calls(ToolCall(name=tool.name, arguments=tool.arguments(data))),
            returned(result_text(draw, results)),
        ]
        known |= results
        tools.append(tool)
    known["flight"] = known.get("flight_number")
    template = draw.phrase(spec["answer"])
    answer = render(template, {name: str(value) for name, value in known.items()} | texts)
    results_named = [str(known[name]) for name in needed_in(spec["answer"]) if name not in texts]
    messages.append(says(answer))
    expected = (*(Expected("calls") for _ in steps), Expected("text", tuple(results_named)))
    return Episode(tuple(messages), expected, tuple(tools))


def _source(source: str, known: Mapping[str, JsonValue]) -> JsonValue:
    """A known value, or a text made of known values."""
    return render(source, {name: str(value) for name, value in known.items()}) if "{" in source else known[source]


_CHAINS: tuple[Callable[[Draw], Episode], ...] = (
    lambda draw: _chain(
        draw,
        "mail",
        [("contact", {"person": "person"}), ("email", {"email": "email", "subject": "subject"})],
        ["person", "subject"],
    ),
    lambda draw: _chain(
        draw,
        "fly",
        [
            ("flights", {"origin": "origin", "destination": "destination", "date": "date"}),
            ("book_flight", {"flight": "flight_number", "person": "person"}),
        ],
        ["origin", "destination", "date", "person"],
    ),
    lambda draw: _chain(
        draw,
        "invest",
        [("stock", {"ticker": "ticker"}), ("calculator", {"expression": "{price} * {count}"})],
        ["ticker", "count"],
    ),
    lambda draw: _chain(draw, "refund", [("order", {"order": "order"}), ("refund", {"order": "order"})], ["order"]),
)
