"""Extraction: a text and a JSON schema; the answer is the data as JSON in the schema's order.

All that decides the answer stands in the schema: a date has its format, and what the text may lack may be null.
"""

import json
from collections.abc import Collection, Mapping

from lfm.train.synthetic.draw import Draw, Value, latin_word, render, slots_of
from lfm.train.synthetic.scenarios import Episode, Expected, says, user
from lfm.train.synthetic.tables import world

_JSON_TYPES = {str: "string", int: "integer", float: "number"}
_SHORT_DATE = "date as YYYY-MM-DD"
_FORMS = 0.15  # of the texts for training
_FORM_KINDS = ("person", "city", "date", "code", "count", "amount", "email", "title", "coined", "time", "phone", "year")
_NULLABLE = 0.3  # of the fields that the text does hold: "may be null" says nothing of whether it is


def extraction(draw: Draw) -> Episode:
    """One text, one schema, one object."""
    if draw.split == "train" and draw.chance(_FORMS):
        return _form(draw)
    kind = draw.one(list(world()["documents"]))
    fields = world()["documents"][kind]
    template = draw.phrase(draw.table["extract"][kind])
    present = set(slots_of(template))
    values = {field: draw.value(spec[0]) for field, spec in fields.items()}
    text = render(template, {field: value.text for field, value in values.items()})
    wanted = draw.shuffled(list(fields))[: draw.integer(2, len(fields))]
    if not set(wanted) & present:
        return extraction(draw)
    names = {field: draw.one(fields[field][1:]) for field in wanted}
    if len(set(names.values())) < len(names):
        return extraction(draw)
    kinds = {field: fields[field][0] for field in wanted}
    return _asked(draw, text, names, kinds, {f: values[f] for f in wanted}, present)


def _form(draw: Draw) -> Episode:
    """A text of lines, each a label and a value; labels that say nothing, too: then the schema has the same ones."""
    kinds = {latin_word(draw): draw.one(_FORM_KINDS) for _ in range(draw.integer(3, 6))}
    fields = world()["documents"][draw.one(list(world()["documents"]))]
    if draw.chance(0.6):
        kinds = {field: spec[0] for field, spec in fields.items()}
    names = {field: draw.one(fields[field][1:]) if field in fields else field for field in kinds}
    values = {field: draw.value(kind) for field, kind in kinds.items()}
    present = set(draw.shuffled(list(kinds))[: draw.integer(2, len(kinds))])
    sign = draw.one((": ", " = ", " - ", ":\n"))
    lines = [f"{names[field]}{sign}{values[field].text}" for field in draw.shuffled(sorted(present))]
    wanted = draw.shuffled(list(kinds))[: draw.integer(2, len(kinds))]
    if not set(wanted) & present or len(set(names.values())) < len(names):
        return _form(draw)
    text = draw.one(("\n", "; ")).join(lines) if sign != ":\n" else "\n".join(lines)
    return _asked(draw, text, {f: names[f] for f in wanted}, kinds, values, present)


def _asked(
    draw: Draw,
    text: str,
    names: Mapping[str, str],
    kinds: Mapping[str, str],
    values: Mapping[str, Value],
    present: Collection[str],
) -> Episode:
    """The question for the fields of `names`, and the answer. `present`: the fields that the text holds."""
    data = {name: values[field].data if field in present else None for field, name in names.items()}
    types = {name: _type(draw, kinds[f], values[f], is_there=f in present) for f, name in names.items()}
    instruction = draw.phrase(draw.table["extract"]["instructions"])
    schema = json.dumps(_schema(draw, types), ensure_ascii=False)
    question = user(render(instruction, {"schema": schema, "text": text}))
    return Episode((question, says(json.dumps(data, ensure_ascii=False))), (Expected("json"),))


def _type(draw: Draw, kind: str, value: Value, *, is_there: bool) -> tuple[str, bool, bool]:
    """The JSON type, whether it is a date, and whether it may be null."""
    return _JSON_TYPES[type(value.data)], kind == "date", not is_there or draw.chance(_NULLABLE)


def _schema(draw: Draw, types: Mapping[str, tuple[str, bool, bool]]) -> dict[str, object]:
    """The wanted object as a JSON schema, or in short as an object of type names."""
    if draw.chance(0.4):
        return {
            name: (_SHORT_DATE if is_date else kind) + (" or null" if may_be_null else "")
            for name, (kind, is_date, may_be_null) in types.items()
        }
    properties: dict[str, object] = {}
    for name, (kind, is_date, may_be_null) in types.items():
        properties[name] = {"type": [kind, "null"] if may_be_null else kind} | ({"format": "date"} if is_date else {})
    schema: dict[str, object] = {"type": "object", "properties": properties, "required": list(types)}
    return schema | {"additionalProperties": False} if draw.chance(0.3) else schema
