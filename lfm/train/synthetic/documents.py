"""Conversations about given texts: extraction into a JSON schema, and questions answered with a citation."""

import json
from collections.abc import Mapping

from lfm.chat.messages import Message
from lfm.search.sources import CITE_INSTRUCTION, Source
from lfm.search.sources import render as render_sources
from lfm.train.synthetic.draw import Draw, Value, render, slots_of
from lfm.train.synthetic.scenarios import Episode, Expected, says, user
from lfm.train.synthetic.tables import Split, world

_MOST_QUESTIONS: Mapping[Split, int] = {"train": 3, "test": 1}  # about the same passages
_JSON_TYPES = {str: "string", int: "integer", float: "number"}


def extraction(draw: Draw) -> Episode:
    """A text and a schema; the answer is the data as JSON in the schema's order, null where the text has nothing."""
    kind = draw.one(list(world()["documents"]))
    fields = world()["documents"][kind]
    template = draw.phrase(draw.table["extract"][kind])
    values = {field: draw.value(spec[0]) for field, spec in fields.items()}
    text = render(template, {field: value.text for field, value in values.items()})
    wanted = draw.shuffled(list(fields))[: draw.integer(2, len(fields))]
    if not set(wanted) & set(slots_of(template)):
        return extraction(draw)
    names = {field: draw.one(fields[field][1:]) for field in wanted}
    present = set(slots_of(template))
    data = {names[field]: values[field].data if field in present else None for field in wanted}
    schema = json.dumps(_schema(draw, {names[field]: values[field] for field in wanted}), ensure_ascii=False)
    prompt = render(draw.phrase(draw.table["extract"]["instructions"]), {"schema": schema, "text": text})
    return Episode((user(prompt), says(json.dumps(data, ensure_ascii=False))), (Expected("json"),))


def _schema(draw: Draw, values: Mapping[str, Value]) -> dict[str, object]:
    """The wanted object as a JSON schema, or in short as an object of type names."""
    types = {name: _JSON_TYPES[type(value.data)] for name, value in values.items()}
    if draw.chance(0.4):
        return dict(types)
    properties = {name: {"type": kind} for name, kind in types.items()}
    return {"type": "object", "properties": properties, "required": list(types)}


def grounded(draw: Draw) -> Episode:
    """Two to four passages and a question that one of them answers, or none; in training up to three questions."""
    table = draw.table["grounded"]
    facts = world()["facts"]
    documents: list[str] = []
    known: list[tuple[int, str, str, Value]] = []
    stated: set[tuple[str, str]] = set()
    for _ in range(draw.integer(2, 4)):
        thing = draw.one(sorted({attribute.partition("_")[0] for attribute in facts}))
        name = draw.value("title" if thing == "novel" else "coined").text
        attributes = draw.shuffled([attribute for attribute in facts if attribute.startswith(f"{thing}_")])
        sentences = []
        for attribute in attributes[: draw.integer(1, len(attributes))]:
            value = draw.value(facts[attribute])
            sentences.append(render(draw.phrase(table[attribute]["says"]), {"name": name, "value": value.text}))
            known.append((len(documents) + 1, attribute, name, value))
            stated.add((attribute, name))
        if draw.chance(0.5):
            sentences.append(draw.phrase(table["fillers"]))
        documents.append(draw.table.get("sentence_join", " ").join(draw.shuffled(sentences)))
    questions = [_question(draw, known, stated) for _ in range(draw.integer(1, _MOST_QUESTIONS[draw.split]))]
    first = questions[0][0]
    if draw.chance(0.5):  # as the service shows documents: numbered, fenced, in the system turn
        sources = [Source(number=i, text=text, title=_heading(draw)) for i, text in enumerate(documents, start=1)]
        system = Message(role="system", content=f"{CITE_INSTRUCTION}\n\n{render_sources(sources)}")
    else:
        listed = "\n".join(f"[{i}] {text}" for i, text in enumerate(documents, start=1))
        first = render(draw.phrase(table["prompts"]), {"documents": listed, "question": first})
        system = Message(role="system", content=draw.phrase(table["system"]))
    asked = [first, *(question for question, _, _ in questions[1:])]
    turns = [turn for text, (_, answer, _) in zip(asked, questions, strict=True) for turn in (user(text), says(answer))]
    return Episode((system, *turns), tuple(expected for _, _, expected in questions))


def _question(
    draw: Draw, known: list[tuple[int, str, str, Value]], stated: set[tuple[str, str]]
) -> tuple[str, str, Expected]:
    """A question about the passages, its answer, and what that has to say."""
    if draw.chance(0.25):
        attribute, name, answer, expected = _absent(draw, stated)
    else:
        number, attribute, name, value = draw.one(known)
        answer, expected = _cited(draw, attribute, name, value, number)
    return render(draw.phrase(draw.table["grounded"][attribute]["asks"]), {"name": name}), answer, expected


def _heading(draw: Draw) -> str:
    """A title for a source, or none; it says nothing of what is in it."""
    return draw.value("title").text if draw.chance(0.3) else ""


def _cited(draw: Draw, attribute: str, name: str, value: Value, number: int) -> tuple[str, Expected]:
    cite = f"[{number}]"
    template = draw.phrase(draw.table["grounded"][attribute]["answers"])
    answer = render(template, {"name": name, "value": value.text, "cite": cite})
    return answer, Expected("cited", (value.text, cite))


def _absent(draw: Draw, stated: set[tuple[str, str]]) -> tuple[str, str, str, Expected]:
    """Something that the passages do not say: of a thing in them if there is one, else of another."""
    facts = list(world()["facts"])
    names = sorted({(attribute.partition("_")[0], name) for attribute, name in stated})
    open_questions = [
        (attribute, name)
        for thing, name in names
        for attribute in facts
        if attribute.startswith(f"{thing}_") and (attribute, name) not in stated
    ]
    if open_questions and draw.chance(0.5):
        attribute, name = draw.one(open_questions)
    else:
        attribute = draw.one(facts)
        name = draw.value("title" if attribute.startswith("novel") else "coined").text
    return attribute, name, draw.phrase(draw.table["grounded"]["absent"]), Expected("absent")
