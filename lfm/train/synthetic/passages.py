"""Questions answered from passages with a citation: passages in the prompt, or found by a search tool.

Half of the prompts, and all results of searches, are written as the service writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lfm.chat.messages import Message, ToolCall
from lfm.search.sources import CITE_INSTRUCTION, Source
from lfm.search.sources import render as render_sources
from lfm.train.synthetic.draw import Draw, Value, latin_word, render, slots_of
from lfm.train.synthetic.requests import full_request, polite
from lfm.train.synthetic.scenarios import Episode, Expected, calls, returned, says, user
from lfm.train.synthetic.tables import Split, world
from lfm.train.synthetic.tools import Tool, intent_named, served_tool

_MOST_QUESTIONS: Mapping[Split, int] = {"train": 6, "test": 1}  # about the same passages
_MOST_SEARCHES: Mapping[Split, int] = {"train": 2, "test": 1}  # in one conversation
_MOST_PASSAGES: Mapping[Split, int] = {"train": 6, "test": 4}
_MOST_FOUND = 4
NOTHING_FOUND = (
    "Nothing was found. Try other words, or answer without sources, and say so.",
    "The results hold no text. Try other words, or answer without sources, and say so.",
)


@dataclass(slots=True)
class _Passages:
    """Texts in order, and what they say. `known`: where, attribute, name of the thing, value."""

    texts: list[str] = field(default_factory=list)
    known: list[tuple[int, str, str, Value]] = field(default_factory=list)
    stated: set[tuple[str, str]] = field(default_factory=set)


def grounded(draw: Draw) -> Episode:
    """Passages in the prompt and a question that one of them answers, or none; in training up to six questions."""
    table = draw.table["grounded"]
    passages = _make_passages(draw, _MOST_PASSAGES[draw.split])
    questions = [_question(draw, passages, 1) for _ in range(draw.integer(1, _MOST_QUESTIONS[draw.split]))]
    first = questions[0][0]
    if draw.chance(0.5):  # as the service shows documents: numbered, fenced, in the system turn, behind the caller's
        theirs = f"{draw.phrase(draw.table['systems'])}\n\n" if draw.chance(0.3) else ""
        system = f"{theirs}{CITE_INSTRUCTION}\n\n{_as_sources(draw, passages.texts, 1, is_web=draw.chance(0.3))}"
    else:
        listed = "\n".join(f"[{i}] {text}" for i, text in enumerate(passages.texts, start=1))
        first = render(draw.phrase(table["prompts"]), {"documents": listed, "question": first})
        system = draw.phrase(table["system"])
    asked = [first, *(question for question, _, _ in questions[1:])]
    turns = [turn for text, (_, answer, _) in zip(asked, questions, strict=True) for turn in (user(text), says(answer))]
    expected = tuple(expected for _, _, expected in questions)
    return Episode((Message(role="system", content=system), *turns), expected)


def searched(draw: Draw) -> Episode:
    """Questions with the service's search tool: the question itself is the query, and what it finds is cited."""
    tool = served_tool(draw.one(("web_search", "file_search")))
    messages: list[Message] = []
    expected: list[Expected] = []
    number = 1
    for _ in range(draw.integer(1, _MOST_SEARCHES[draw.split])):
        number = _search(draw, tool, number, messages, expected)
    return Episode(tuple(messages), tuple(expected), (tool,), frozenset({"contact", "translate"}))


def _search(draw: Draw, tool: Tool, number: int, messages: list[Message], expected: list[Expected]) -> int:
    """One question, its search and its answer. Returns the number of the next source."""
    passages = _make_passages(draw, _MOST_FOUND)
    novels = [known for known in passages.known if known[1] == "novel_author"]
    found = f"{CITE_INSTRUCTION}\n\n{_as_sources(draw, passages.texts, number, is_web=tool.name == 'web_search')}"
    if draw.chance(0.2):
        question, answer, wanted = _open_question(draw), _says_absent(draw), Expected("absent")
        query = question
    elif novels and draw.chance(0.5):  # "search for this": then the query is what shall be searched for
        index, attribute, query, value = draw.one(novels)
        question = full_request(draw, intent_named("search"), {"query": Value(query, query)}).text
        answer, wanted = _cited(draw, attribute, query, value, number + index)
    else:
        query, answer, wanted = _question(draw, passages, number)
        question = polite(draw, query)
    if wanted.kind == "absent" and draw.chance(0.3):
        found = draw.one(NOTHING_FOUND)
    else:
        number += len(passages.texts)
    call = ToolCall(name=tool.name, arguments={"query": query})
    messages += [user(question), calls(call), returned(found), says(answer)]
    expected += [Expected("calls"), wanted]
    return number


def _open_question(draw: Draw) -> str:
    """Something about the world that nobody has told the model."""
    template = draw.phrase(draw.table["self"]["unknown"]["asks"])
    return render(template, {slot: draw.value(slot).text for slot in slots_of(template)})


def fact_question(draw: Draw) -> str:
    """A question that passages would answer, without any."""
    attribute, name = _unsaid(draw, set())
    return render(draw.phrase(draw.table["grounded"][attribute]["asks"]), {"name": name})


def _make_passages(draw: Draw, most: int) -> _Passages:
    table, facts, made = draw.table["grounded"], world()["facts"], _Passages()
    for _ in range(draw.integer(2, most)):
        thing = draw.one(sorted({attribute.partition("_")[0] for attribute in facts}))
        name = draw.value("title" if thing == "novel" else "coined").text
        attributes = draw.shuffled([attribute for attribute in facts if attribute.startswith(f"{thing}_")])
        if any((attribute, name) in made.stated for attribute in attributes):
            continue  # one thing is told of once
        sentences = []
        for attribute in attributes[: draw.integer(1, len(attributes))]:
            value = draw.value(facts[attribute])
            sentences.append(render(draw.phrase(table[attribute]["says"]), {"name": name, "value": value.text}))
            made.known.append((len(made.texts), attribute, name, value))
            made.stated.add((attribute, name))
        if draw.chance(0.5):
            sentences.append(draw.phrase(table["fillers"]))
        made.texts.append(draw.table.get("sentence_join", " ").join(draw.shuffled(sentences)))
    return made


def _as_sources(draw: Draw, texts: Sequence[str], first: int, *, is_web: bool) -> str:
    """As the service shows them. Headings, addresses and dates say nothing of what is in the text."""
    has_titles = draw.chance(0.5)
    sources = [
        Source(
            number=number,
            text=text,
            title=draw.value("title").text if has_titles else "",
            url=_address(draw) if is_web else "",
            location=draw.value("coined").text if not is_web and draw.chance(0.2) else "",
            date=str(draw.value("date").data) if is_web and draw.chance(0.3) else None,
        )
        for number, text in enumerate(texts, start=first)
    ]
    return render_sources(sources)


def _address(draw: Draw) -> str:
    return f"https://{draw.value('domain').text}/{latin_word(draw)}"


def _question(draw: Draw, passages: _Passages, first: int) -> tuple[str, str, Expected]:
    """A question about the passages, numbered from `first`, its answer, and what that has to say."""
    if draw.chance(0.25):
        attribute, name = _unsaid(draw, passages.stated)
        answer, expected = _says_absent(draw), Expected("absent")
    else:
        index, attribute, name, value = draw.one(passages.known)
        answer, expected = _cited(draw, attribute, name, value, first + index)
    return render(draw.phrase(draw.table["grounded"][attribute]["asks"]), {"name": name}), answer, expected


def _cited(draw: Draw, attribute: str, name: str, value: Value, number: int) -> tuple[str, Expected]:
    cite = f"[{number}]"
    template = draw.phrase(draw.table["grounded"][attribute]["answers"])
    answer = render(template, {"name": name, "value": value.text, "cite": cite})
    return answer, Expected("cited", (value.text, cite))


def _says_absent(draw: Draw) -> str:
    return draw.phrase(draw.table["grounded"]["absent"])


def _unsaid(draw: Draw, stated: set[tuple[str, str]]) -> tuple[str, str]:
    """An attribute and a name that the passages do not say: of a thing in them if there is one, else of another."""
    facts = list(world()["facts"])
    names = sorted({(attribute.partition("_")[0], name) for attribute, name in stated})
    open_questions = [
        (attribute, name)
        for thing, name in names
        for attribute in facts
        if attribute.startswith(f"{thing}_") and (attribute, name) not in stated
    ]
    if open_questions and draw.chance(0.5):
        return draw.one(open_questions)
    while True:
        attribute = draw.one(facts)
        name = draw.value("title" if attribute.startswith("novel") else "coined").text
        if (attribute, name) not in stated:
            return attribute, name
