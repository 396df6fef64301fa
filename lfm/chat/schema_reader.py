"""JSON Schema as clients write it, read into nodes. Every keyword is honoured, noted as an annotation, or refused.

Drafts 4 to 2020-12 as tools use them. Two liberties, both only narrowing: a schema without `type` means the types that
its keywords speak of, and an object that declares properties gets no others unless `additionalProperties` says so.
"""

import functools
from collections.abc import Callable, Mapping
from urllib.parse import unquote

from lfm.chat.schema_fields import child, counts, fail, listed, shown, typed
from lfm.chat.schema_merge import Definitions, array_node, object_node
from lfm.chat.schema_nodes import (
    ANYTHING,
    NOTHING,
    Array,
    Boolean,
    Node,
    Null,
    Object,
    Property,
    Ref,
    SchemaError,
    Text,
    union_of,
)
from lfm.chat.schema_one_of import one_of
from lfm.chat.schema_regex import Regex
from lfm.chat.schema_scalars import is_enforced_format, literals, read_number, read_pattern, read_text
from lfm.chat.schema_texts import Texts
from lfm.chat.schema_unique import check_unique
from lfm.protocol import MAX_ENUM, MAX_SCHEMA_DEPTH

MAX_NOTES = 20
ITEM_BYTES = 3  # the shortest item of an array and its comma

KEYWORDS_OF_TYPES: Mapping[str, tuple[str, ...]] = {
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
        "unevaluatedProperties",
    ),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"),
    "string": ("minLength", "maxLength", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "integer": (),
    "boolean": (),
    "null": (),
}
COMBINING = ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "format")
# fmt: off
ANNOTATIONS = (
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema", "$id", "id", "$defs", "definitions", "discriminator", "externalDocs", "xml", "markdownDescription",
    "nullable",
)
UNSUPPORTED = (
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains", "minContains",
    "maxContains", "$dynamicRef", "$recursiveRef", "$anchor", "$dynamicAnchor",
)
# fmt: on
KNOWN = frozenset(COMBINING).union(ANNOTATIONS, UNSUPPORTED, *KEYWORDS_OF_TYPES.values())


class SchemaReader:
    """Reads one schema document. `notes` collects what is said but not enforced.

    Args:
        root: the whole document, which `$ref` points into.
        param: the path of the document in the request, for messages.
        max_chars: characters that fit into the context; a longer minimum can never be reached.
    """

    def __init__(self, root: object, texts: Texts, *, param: str, max_chars: int) -> None:
        self.definitions = Definitions(texts)
        self.notes: list[str] = []
        self.paths: dict[str, str] = {}  # of the definitions that stand in the document
        self._root = root
        self._param = param
        self._max_chars = max_chars

    def read_root(self) -> Ref:
        """The document itself, as a definition. Read all of `definitions` before relying on it."""
        return self._reference("#", self._param)

    # -- one schema ----------------------------------------------------------------------------------------------------

    def _read(self, raw: object, path: str, depth: int) -> Node:
        if depth > MAX_SCHEMA_DEPTH:
            fail(path, f"is nested deeper than the {MAX_SCHEMA_DEPTH} levels that are allowed")
        if isinstance(raw, bool):
            return ANYTHING if raw else NOTHING
        if not isinstance(raw, dict):
            fail(path, f"is {shown(raw)}, which is no schema. Allowed: an object, true or false")
        self._check_keywords(raw, path)
        try:
            node = self._combined(raw, path, depth)
        except SchemaError as error:
            fail(path, str(error))
        if node == NOTHING:
            fail(path, "contradicts itself: no value can satisfy it")
        return node

    def _check_keywords(self, raw: Mapping[str, object], path: str) -> None:
        for keyword in raw:
            if keyword in UNSUPPORTED:
                fail(child(path, keyword), "is not supported. Describe the value without it")
            if keyword in ("unevaluatedProperties", "unevaluatedItems") and not isinstance(raw[keyword], bool):
                fail(child(path, keyword), "is supported as true or false only")
            if keyword == "$id" and path != self._param:
                fail(child(path, keyword), "is supported at the top of the schema only")
            if keyword == "nullable" and raw[keyword] is True:
                # No validator of JSON Schema knows it, and the null would not be valid.
                self._note(f"{child(path, keyword)} is OpenAPI's and has no effect. To allow null, add it to type.")
            elif keyword not in KNOWN:
                self._note(f"{child(path, keyword)} is unknown and has no effect.")

    def _note(self, text: str) -> None:
        if len(self.notes) < MAX_NOTES and text not in self.notes:
            self.notes.append(text)

    def _combined(self, raw: Mapping[str, object], path: str, depth: int) -> Node:
        """What all keywords of one schema say together."""
        intersect = self.definitions.intersect
        found = self._own_types(raw, path, depth)
        if "const" in raw:
            found = intersect(found, literals([raw["const"]], child(path, "const")))
        if "enum" in raw:
            values = listed(raw, "enum", path)
            if not 1 <= len(values) <= MAX_ENUM:
                fail(child(path, "enum"), f"has {len(values)} values. Allowed: 1 to {MAX_ENUM}")
            found = intersect(found, literals(values, child(path, "enum")))
        if "$ref" in raw:
            target = typed(raw["$ref"], str, child(path, "$ref"))
            found = intersect(found, self._reference(target, child(path, "$ref")))
        for keyword in ("allOf", "anyOf", "oneOf"):
            if keyword in raw:
                found = self._with_branches(found, raw, keyword, path, depth)
        return found

    def _with_branches(self, found: Node, raw: Mapping[str, object], keyword: str, path: str, depth: int) -> Node:
        """`found`, which also satisfies all, any or exactly one of the branches."""
        where = child(path, keyword)
        branches = listed(raw, keyword, path)
        if not branches:
            fail(where, "is empty. Give at least one schema")
        options = [
            self._read(_with_type_of(raw, branch), f"{where}[{index}]", depth + 1)
            for index, branch in enumerate(branches)
        ]
        intersect = self.definitions.intersect
        if keyword == "allOf" or len(options) == 1:
            return functools.reduce(intersect, options, found)
        if keyword == "anyOf":
            return intersect(found, union_of(options))
        whole = [intersect(found, option) for option in options]
        return self._define(where, where, lambda: one_of(whole, self.definitions))

    # -- definitions ---------------------------------------------------------------------------------------------------

    def _define(self, name: str, path: str, make: Callable[[], Node]) -> Ref:
        """A definition that is made later, when everything that it may need is declared."""

        self.paths[name] = path

        def checked() -> Node:
            try:
                node = make()
            except SchemaError as error:
                fail(path, str(error))
            if node == NOTHING:
                fail(path, "contradicts itself: no value can satisfy it")
            return node

        return self.definitions.declare(name, checked)

    def _reference(self, target: str, path: str) -> Ref:
        if not target.startswith("#") or (len(target) > 1 and target[1] != "/"):
            fail(path, f"is {shown(target)}. Allowed: a pointer within the schema, such as #/$defs/Name")
        raw, where = self._root, self._param
        for part in target.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(raw, dict) and key in raw:
                raw, where = raw[key], child(where, key)
            elif isinstance(raw, list) and key.isdecimal() and int(key) < len(raw):
                raw, where = raw[int(key)], f"{where}[{int(key)}]"
            else:
                fail(path, f"points to {shown(target)}, which does not exist")
        return self._define(target, where, lambda: self._read(raw, where, 1))

    # -- types ---------------------------------------------------------------------------------------------------------

    def _own_types(self, raw: Mapping[str, object], path: str, depth: int) -> Node:
        """What `type` and the keywords of single types say; anything if there are none."""
        kinds = _kinds(raw, path)
        if "format" in raw and not is_enforced_format(raw["format"], kinds):
            self._note(f"{child(path, 'format')}={shown(raw['format'])} describes the value and is not enforced.")
        if not kinds:
            return ANYTHING
        return union_of([self._of_kind(kind, raw, path, depth) for kind in kinds])

    def _of_kind(self, kind: str, raw: Mapping[str, object], path: str, depth: int) -> Node:
        if kind == "object":
            return self._object(raw, path, depth)
        if kind == "array":
            return self._array(raw, path, depth)
        if kind == "string":
            return read_text(raw, path, self.definitions.texts, max_chars=self._max_chars)
        if kind in ("number", "integer"):
            return read_number(raw, path, is_integer=kind == "integer")
        return Null() if kind == "null" else Boolean()

    def _array(self, raw: Mapping[str, object], path: str, depth: int) -> Node:
        low, high = counts(raw, "minItems", "maxItems", path)
        if low * ITEM_BYTES > self._max_chars:
            fail(child(path, "minItems"), f"is {low}: no answer that long fits into the context")
        # Before 2020-12, `items` held the array that is `prefixItems` now, and `additionalItems` the rest.
        prefix_key, rest_key = (
            ("items", "additionalItems") if isinstance(raw.get("items"), list) else ("prefixItems", "items")
        )
        rest = raw.get(rest_key, raw.get("unevaluatedItems", True))
        where = child(path, prefix_key)
        node = array_node(
            Array(
                self._read(rest, child(path, rest_key), depth + 1),
                tuple(
                    self._read(one, f"{where}[{index}]", depth + 1)
                    for index, one in enumerate(listed(raw, prefix_key, path))
                ),
                min_items=low,
                max_items=high,
                is_unique=raw.get("uniqueItems") is True,
            )
        )
        if isinstance(node, Array) and node.is_unique:
            where = child(path, "uniqueItems")
            return self._define(where, where, lambda: check_unique(node, self.definitions))
        return node

    def _object(self, raw: Mapping[str, object], path: str, depth: int) -> Node:
        low, high = counts(raw, "minProperties", "maxProperties", path)
        num_declared = len(typed(raw.get("properties", {}), dict, child(path, "properties")))
        says_nothing = not any(one in raw for one in ("properties", "required", "patternProperties"))
        additional = raw.get("additionalProperties")
        where = child(path, "additionalProperties")
        undeclared = Object(
            additional=None if additional is None else self._read(additional, where, depth + 1),
            patterns=self._name_patterns(raw, path, depth),
            names=self._names(raw, path, depth),
            is_open=(says_nothing or low > num_declared) and raw.get("unevaluatedProperties") is not False,
        )
        return object_node(
            Object(
                self._properties(raw, undeclared, path, depth),
                undeclared.additional,
                undeclared.patterns,
                undeclared.names,
                low,
                high,
                undeclared.is_open,
            )
        )

    def _properties(self, raw: Mapping[str, object], undeclared: Object, path: str, depth: int) -> tuple[Property, ...]:
        where = child(path, "properties")
        declared = typed(raw.get("properties", {}), dict, where)
        if isinstance(raw.get("required"), bool):  # draft 3, and what some generators still write
            fail(child(path, "required"), "is a boolean. Allowed: an array of property names")
        names = [typed(name, str, child(path, "required")) for name in listed(raw, "required", path)]
        required = dict.fromkeys(names)
        by_name = Object(patterns=undeclared.patterns, names=undeclared.names)
        found = []
        for name, value in declared.items():
            node = self._read(value, child(where, name), depth + 1)
            node = self.definitions.intersect(node, self.definitions.undeclared(by_name, name))
            found.append(Property(name, node, name in required))
        found += [
            Property(name, self.definitions.undeclared(undeclared, name), True)
            for name in required
            if name not in declared
        ]
        for one in found:
            if one.is_required and one.value == NOTHING:
                fail(child(path, "required"), f"names {shown(one.name)}, which may have no value at all")
        return tuple(found)

    def _name_patterns(self, raw: Mapping[str, object], path: str, depth: int) -> tuple[tuple[Regex, Node], ...]:
        where = child(path, "patternProperties")
        return tuple(
            (read_pattern(pattern, child(where, pattern)), self._read(value, child(where, pattern), depth + 1))
            for pattern, value in typed(raw.get("patternProperties", {}), dict, where).items()
        )

    def _names(self, raw: Mapping[str, object], path: str, depth: int) -> Text | None:
        given = raw.get("propertyNames", True)
        if given is True:
            return None
        where = child(path, "propertyNames")
        node = self._read({"type": "string", **given} if isinstance(given, dict) else given, where, depth + 1)
        if not isinstance(node, Text):
            fail(where, "must be a schema of strings, without alternatives and references")
        return node


def _kinds(raw: Mapping[str, object], path: str) -> list[str]:
    """The named types; else those that the keywords speak of."""
    if "type" not in raw:
        return [kind for kind, keywords in KEYWORDS_OF_TYPES.items() if any(one in raw for one in keywords)]
    where = child(path, "type")
    given = raw["type"] if isinstance(raw["type"], list) else [raw["type"]]
    kinds = [kind for kind in given if isinstance(kind, str) and kind in KEYWORDS_OF_TYPES]
    if not given or len(kinds) < len(given):
        fail(where, f"is {shown(raw['type'])}. Allowed: {', '.join(KEYWORDS_OF_TYPES)}, or an array of these")
    return kinds


def _with_type_of(raw: Mapping[str, object], branch: object) -> object:
    """A branch that speaks of some type without naming it means those of the schema around it."""
    if "type" not in raw or not isinstance(branch, dict) or "type" in branch or not _kinds(branch, ""):
        return branch
    return {"type": raw["type"], **branch}
