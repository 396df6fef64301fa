"""Reading JSON Schemas: what is refused, under which path, and what is only noted."""

import pytest

from lfm.chat.schema import read_schema
from lfm.chat.schema_nodes import NOTHING, Object, Schema, Union
from lfm.errors import RequestError

CONTEXT = 32_768


def read(schema: object) -> Schema:
    return read_schema(schema, param="p", max_tokens=CONTEXT)


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def node(schema: object) -> object:
    """The root of a schema as it was read."""
    read_one = read(schema)
    found = read_one.root
    while hasattr(found, "name"):
        found = read_one.definitions[found.name]
    return found


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "p.properties.a.not"),
        ({"if": {}, "then": {}}, "p.if"),
        ({"type": "array", "contains": {"type": "string"}}, "p.contains"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "p.dependentRequired"),
        (
            {"type": "object", "properties": {"first name": {"$dynamicRef": "#a"}}},
            'p.properties["first name"].$dynamicRef',
        ),
        ({"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "text"}]}}, "p.items.anyOf[1].type"),
        ({"$ref": "https://example.com/schema.json"}, "p.$ref"),
        ({"$ref": "#/$defs/missing"}, "p.$ref"),
        ({"type": "object", "required": True}, "p.required"),
        ({"type": "object", "properties": []}, "p.properties"),
        ({"type": "object", "properties": {"a": 1}}, "p.properties.a"),
        ({"type": "string", "minLength": -1}, "p.minLength"),
        ({"type": "string", "minLength": "3"}, "p.minLength"),
        ({"type": "integer", "multipleOf": 0.01}, "p.multipleOf"),
        ({"type": "integer", "minimum": True}, "p.minimum"),
        ({"type": "integer", "minimum": float("nan")}, "p.minimum"),
        ({"type": "integer", "maximum": 10**30}, "p.maximum"),
        ({"enum": []}, "p.enum"),
        ({"enum": list(range(5001))}, "p.enum"),
        ({"anyOf": []}, "p.anyOf"),
        ("a string", "p"),
        (None, "p"),
    ],
)
def test_an_unsupported_schema_is_refused_under_the_path_of_its_keyword(schema: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(schema)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert caught.value.message.startswith(param)


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 4}, "p.minimum"),
        ({"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 6}, "p.minimum"),
        ({"type": "integer", "minimum": 5, "maximum": 9, "multipleOf": 10}, "p.minimum"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "p.minLength"),
        ({"type": "string", "minLength": 9, "pattern": "^[a-z]{1,3}$"}, "p.pattern"),
        ({"type": "string", "maxLength": 3, "format": "uuid"}, "p.pattern"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "p.minItems"),
        ({"type": "object", "minProperties": 2, "maxProperties": 1}, "p.minProperties"),
        ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "p"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "p.required"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "p.required"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "p"),
        ({"type": "string", "enum": [1, 2]}, "p"),
        ({"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "^b"}]}, "p"),
        ({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True, "minItems": 3}, "p.uniqueItems"),
        (False, "p"),
    ],
)
def test_a_contradiction_is_refused(schema: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(schema)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {
            "anyOf": [{"$ref": "#/$defs/a"}],
            "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}},
        },
        {"type": "object", "allOf": [{"$ref": "#"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}},
    ],
)
def test_a_cycle_without_a_finite_instance_is_refused(schema: object) -> None:
    with pytest.raises(RequestError, match=r"finite instance|refers to itself"):
        read(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"anyOf": [{"type": "object", "properties": {"in": {"$ref": "#"}}, "required": ["in"]}, {"type": "null"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}}, "b": {}}},
    ],
)
def test_a_cycle_with_a_finite_instance_is_read(schema: object) -> None:
    assert read(schema).definitions


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 1_000_000},
        {"type": "string", "minLength": 1_000_000},
        {"type": "array", "items": {"type": "string", "minLength": 1000}, "minItems": 1000},
        {
            "type": "array",
            "items": {"type": "array", "minItems": 400, "items": {"type": "array", "minItems": 400}},
            "minItems": 9,
        },
    ],
)
def test_what_cannot_finish_in_the_context_is_refused(schema: object) -> None:
    with pytest.raises(RequestError, match="fit"):
        read(schema)


def test_the_bounds_of_size_and_depth_hold() -> None:
    assert read(nested(30))
    with pytest.raises(RequestError, match="32 levels"):
        read(nested(33))
    with pytest.raises(RequestError, match="65536"):
        read({"type": "string", "description": "x" * 70_000})
    with pytest.raises(RequestError, match="levels"):
        read({"const": nested(50)})


def test_very_deep_or_unprintable_schemas_are_refused_not_crashed_on() -> None:
    deep: dict[str, object] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="plain JSON"):
        read(deep)
    with pytest.raises(RequestError, match="plain JSON"):
        read({"const": "\ud800"})
    with pytest.raises(RequestError):
        read({"const": {1: 2}, "x": object()})


def chain_of_doubling_references(length: int) -> dict[str, object]:
    definitions: dict[str, object] = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"anyOf": [{"type": "object", "required": [f"p{i}x{j}"]} for j in range(40)]} for i in range(10)]},
        {"type": "string", "allOf": [{"pattern": f"{char}.{{50}}{char}"} for char in "abcdefghijklmnop"]},
        {"properties": {f"p{i}": {"pattern": "(a|b)*a(a|b){400}", "minLength": 9999} for i in range(99)}},
    ],
    ids=["products of alternatives", "many patterns", "long patterns"],
)
def test_schemas_that_explode_are_refused_soon(schema: object) -> None:
    with pytest.raises(RequestError) as caught:
        read(schema)
    assert caught.value.param is not None


def test_references_are_shared_not_written_out() -> None:
    assert len(read(chain_of_doubling_references(40)).definitions) < 100


def test_annotations_are_silent_and_unknown_words_are_noted() -> None:
    schema = {
        "title": "T", "description": "D", "default": 1, "examples": [2], "$comment": "C", "deprecated": True,
        "type": "object",
        "properties": {"a": {"type": "string", "format": "password"}, "b": {"type": "string", "minLenght": 3}},
    }  # fmt: skip
    notes = read(schema).notes
    assert [note.split(" ")[0] for note in notes] == ['p.properties.a.format="password"', "p.properties.b.minLenght"]


def test_a_null_that_no_validator_would_take_is_not_written() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "nullable": True}, "b": {"nullable": False}}}
    read_schema = read(schema)
    assert [note.split(" ")[0] for note in read_schema.notes] == ["p.properties.a.nullable"]
    assert node({"type": "boolean", "nullable": True}) == node({"type": "boolean"})


def test_declared_properties_close_an_object_that_does_not_say_otherwise() -> None:
    closed, opened, free = (
        node({"type": "object", "properties": {"a": {}}}),
        node({"type": "object", "properties": {"a": {}}, "additionalProperties": True}),
        node({"type": "object"}),
    )
    assert isinstance(closed, Object) and closed.additional is None and not closed.is_open  # noqa: PT018
    assert isinstance(opened, Object) and opened.additional is not None  # noqa: PT018
    assert isinstance(free, Object) and free.is_open  # noqa: PT018


def test_exclusive_alternatives_that_overlap_are_told_apart_or_refused() -> None:
    either = node({"properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]})
    assert isinstance(either, Union)
    for option, given, missing in zip(either.options, "ab", "ba", strict=True):
        assert isinstance(option, Object)
        values = {one.name: one.value for one in option.properties}
        assert values[given] != NOTHING
        assert values[missing] == NOTHING
    for overlapping in (
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"oneOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "maxLength": 3}]},
        {"oneOf": [{"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {"b": {}}}]},
    ):
        with pytest.raises(RequestError, match="match at once"):
            read(overlapping)
