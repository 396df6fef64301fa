"""JSON Schemas for tests: a strategy that mixes what clients use, and a list in the manner of JSONSchemaBench."""

from hypothesis import strategies as st

JsonObject = dict[str, object]

NAMES = ["a", "b", "class", "first name", "x-y", "d.e", "\u00e9", "q'\"x", "$k"]
PATTERNS = ["^[a-z]+$", "foo", "^a|b$", r"^\d{3}-\d{4}$", "^[^,\"']*$", r"\w+@x", "^.{2,5}$", r"^\S+$", '["\\\\]']
FORMATS = ["date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri", "duration"]

constants = st.sampled_from(
    [None, True, False, 0, 1, -3, 2.5, "", "a", "it's", 'q"x\\', "\u00e9\n\u2028", [], {}, [1, "x"], {"a": None}]
)


def keywords(required: dict[str, st.SearchStrategy], **optional: st.SearchStrategy) -> st.SearchStrategy[JsonObject]:
    return st.fixed_dictionaries(required, optional=optional)


def typed(kind: str, **optional: st.SearchStrategy) -> st.SearchStrategy[JsonObject]:
    return keywords({"type": st.just(kind)}, **optional)


small = st.integers(0, 4)
bounds = st.one_of(st.integers(-50, 50), st.floats(-20, 20).map(lambda value: round(value, 3)))

scalars = st.one_of(
    st.sampled_from(["string", "integer", "number", "boolean", "null"]).map(lambda kind: {"type": kind}),
    st.lists(constants, min_size=1, max_size=5).map(lambda values: {"enum": values}),
    constants.map(lambda value: {"const": value}),
    typed("string", minLength=small, maxLength=small.map(lambda count: count + 4)),
    typed("string", pattern=st.sampled_from(PATTERNS), maxLength=st.integers(0, 12)),
    typed("string", format=st.sampled_from(FORMATS)),
    typed("number", minimum=bounds, exclusiveMaximum=bounds.map(lambda bound: bound + 60)),
    typed("number", exclusiveMinimum=bounds, maximum=bounds.map(lambda bound: bound + 60)),
    typed("integer", minimum=bounds, maximum=bounds.map(lambda bound: bound + 60), multipleOf=st.sampled_from([2, 10])),
    st.sampled_from(["#/$defs/leaf", "#/$defs/tree"]).map(lambda target: {"$ref": target}),
    st.sampled_from([True, {}]),
)


def containers(inner: st.SearchStrategy) -> st.SearchStrategy[JsonObject]:
    return st.one_of(
        objects(inner),
        typed("array", items=inner, minItems=small, maxItems=small.map(lambda count: count + 4)),
        typed("array", prefixItems=st.lists(inner, min_size=1, max_size=3), items=st.booleans(), minItems=small),
        typed(
            "object",
            additionalProperties=inner,
            patternProperties=st.dictionaries(st.sampled_from(["^x-", "^[a-z]$", "_id$"]), inner, max_size=2),
            propertyNames=st.just({"pattern": "^[a-z]+$"}),
            minProperties=st.integers(0, 1),
            maxProperties=st.integers(1, 3),
        ),
        keywords({"type": st.just("array"), "items": st.just({"enum": ["a", "b", 1, None]})}, minItems=small).map(
            lambda schema: {**schema, "uniqueItems": True}
        ),
        st.sampled_from(["anyOf", "oneOf", "allOf"]).flatmap(
            lambda keyword: st.lists(inner, min_size=1, max_size=3).map(lambda branches: {keyword: branches})
        ),
        st.just({"type": ["string", "array"], "maxLength": 3, "minItems": 1, "items": {"type": "integer"}}),
    )


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy) -> JsonObject:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4))
    schema: JsonObject = {"type": "object", "properties": {name: draw(inner) for name in names}}
    if names:
        schema["required"] = draw(st.lists(st.sampled_from(names), unique=True))
    return schema | draw(
        keywords(
            {},
            additionalProperties=st.sampled_from([True, False, {"type": "integer"}]),
            minProperties=st.integers(0, 3),
            maxProperties=st.integers(1, 3),
        )
        if draw(st.integers(0, 3)) == 0
        else st.just({})
    )


TREE: JsonObject = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
    },
    "required": ["value"],
}
DEFINITIONS: JsonObject = {"tree": TREE, "leaf": {"type": ["string", "null"], "maxLength": 5}}

schemas = st.recursive(scalars, containers, max_leaves=8)


def as_document(schema: object) -> JsonObject:
    """A schema with the definitions that it may refer to."""
    return {**(schema if isinstance(schema, dict) else {}), "$defs": DEFINITIONS}


BENCH: list[JsonObject] = [
    {  # a function call of a calendar
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 1, "maxLength": 80},
            "start": {"type": "string", "format": "date-time"},
            "attendees": {
                "type": "array",
                "items": {"type": "string", "format": "email"},
                "minItems": 1,
                "maxItems": 5,
            },
            "repeat": {"enum": ["daily", "weekly", None]},
        },
        "required": ["title", "start"],
        "additionalProperties": False,
    },
    {  # a discriminated union, as pydantic writes it
        "$defs": {
            "Cat": {
                "type": "object",
                "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["kind", "lives"],
            },
            "Dog": {
                "type": "object",
                "properties": {"kind": {"const": "dog"}, "good": {"type": "boolean", "default": True}},
                "required": ["kind"],
            },
        },
        "type": "object",
        "properties": {
            "pet": {
                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                "discriminator": {"propertyName": "kind"},
            }
        },
        "required": ["pet"],
    },
    {  # a linked list
        "$ref": "#/definitions/node",
        "definitions": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "next": {"anyOf": [{"$ref": "#/definitions/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
            }
        },
    },
    {  # draft 4, as configuration files have it
        "$schema": "http://json-schema.org/draft-04/schema#",
        "id": "http://example.com/port.json",
        "type": "object",
        "properties": {
            "port": {"type": "integer", "minimum": 0, "maximum": 65536, "exclusiveMaximum": True},
            "point": {"type": "array", "items": [{"type": "number"}, {"type": "number"}], "additionalItems": False},
            "version": {"type": "string", "pattern": r"^v?\d+\.\d+(\.\d+)?(-[0-9A-Za-z.-]+)?$"},
        },
        "required": ["port", "point"],
    },
    {  # allOf over a base type, with a sibling
        "definitions": {
            "base": {"type": "object", "properties": {"id": {"type": "string", "format": "uuid"}}, "required": ["id"]}
        },
        "allOf": [{"$ref": "#/definitions/base"}, {"properties": {"size": {"enum": ["S", "M", "L"]}}}],
        "required": ["size"],
    },
    {  # maps by pattern and by name
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": "^[a-z][a-z0-9-]{0,20}$"}},
        "patternProperties": {"^x-": {"type": "string", "maxLength": 10}},
        "additionalProperties": {"type": "integer", "multipleOf": 5},
        "required": ["name"],
        "maxProperties": 4,
    },
    {  # at least one of several
        "type": "object",
        "properties": {"email": {"type": "string"}, "phone": {"type": "string"}, "fax": {"type": "string"}},
        "minProperties": 1,
        "maxProperties": 2,
        "additionalProperties": False,
    },
    {  # exactly one of two
        "type": "object",
        "properties": {
            "url": {"type": "string", "format": "uri"},
            "path": {"type": "string"},
            "mode": {"type": "string"},
        },
        "oneOf": [{"required": ["url"]}, {"required": ["path"]}],
    },
    {  # nested arrays and constants that are objects
        "type": "array",
        "items": {
            "type": "array",
            "prefixItems": [{"const": {"op": "add", "path": ["a", 1]}}, {"type": ["integer", "null"]}],
            "items": False,
            "minItems": 2,
        },
        "minItems": 1,
        "maxItems": 3,
    },
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "uniqueItems": True, "minItems": 2},
    {"type": "string", "minLength": 3, "maxLength": 3, "pattern": "^[A-Z]+$"},
    {"enum": [1, "one", None, [1], {"one": 1}, True]},
]
