"""`response_format`: what an answer must be, read and checked."""

import re
from functools import partial

from lfm.chat.grammar import AnswerFormat
from lfm.chat.json_fields import check_strict, json_type, typed
from lfm.chat.json_memory import JsonMemory
from lfm.chat.schema import read_schema
from lfm.chat.schema_regex import Regex, RegexError, parse_regex
from lfm.errors import RequestError
from lfm.protocol import MAX_SCHEMA_BYTES, MAX_SCHEMAS_BYTES

KINDS = ("text", "json_object", "json_schema", "regex", "grammar")
MAX_NAME_CHARS = 64

_LARK_HEADER = "%llguidance {}"
# Lark source in pieces: strings, regular expressions, comments; what is left can be searched for directives.
_LARK_PIECES = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?![/*])(?:[^/\\\n]|\\.)+/|//[^\n]*|#[^\n]*')
_REFUSED_LARK = re.compile(r"<[^\s>]|@|%(?!ignore\b|import\b)\w*|\b(?:max_tokens|temperature|stop|stop_capture)\s*=")


class AnswerFormats:
    """The formats of recent requests, by what they say: the same one is the same object. Any thread may use it."""

    def __init__(self, *, max_tokens: int, max_bytes: int = 4 * MAX_SCHEMAS_BYTES) -> None:
        self._max_tokens = max_tokens
        self._memory = JsonMemory[tuple[AnswerFormat | None, tuple[str, ...]]](max_bytes=max_bytes)

    def read(self, value: object, *, param: str = "response_format") -> tuple[AnswerFormat | None, tuple[str, ...]]:
        """As `parse_answer_format`."""
        make = partial(parse_answer_format, value, max_tokens=self._max_tokens, param=param)
        return self._memory.get(value, make, param=param)


def parse_answer_format(
    value: object, *, max_tokens: int, param: str = "response_format"
) -> tuple[AnswerFormat | None, tuple[str, ...]]:
    """Read `response_format`: None for plain text; and notes of what a schema says that is not enforced.

    `max_tokens`: the longest answer that the context allows. Raises RequestError with the path of what is wrong.
    """
    if value is None:
        return None, ()
    if not isinstance(value, dict):
        raise RequestError(f"{param} is {json_type(value)}. Allowed: an object.", param=param)
    kind = value.get("type")
    if kind == "text":
        return None, ()
    if kind == "json_object":
        schema = value.get("schema")  # an older spelling of json_schema
        return (AnswerFormat(), ()) if schema is None else _from_schema(schema, max_tokens, f"{param}.schema")
    if kind == "json_schema":
        return _from_json_schema(value, max_tokens, param)
    if kind == "regex":
        return AnswerFormat(regex=_parse_pattern(value.get("pattern"), f"{param}.pattern")), ()
    if kind == "grammar":
        return AnswerFormat(lark=_parse_lark(value.get("grammar"), f"{param}.grammar")), ()
    raise RequestError(
        f"{param}.type={str(kind)[:80]!r} is not known. Allowed: {', '.join(KINDS)}.", param=f"{param}.type"
    )


def _from_json_schema(
    value: dict[str, object], max_tokens: int, param: str
) -> tuple[AnswerFormat | None, tuple[str, ...]]:
    # OpenAI's Responses API has the fields in the format itself, its chat API one level deeper.
    inner, where = value, param
    if "json_schema" in value:
        inner, where = typed(value["json_schema"], dict, f"{param}.json_schema"), f"{param}.json_schema"
    name = inner.get("name")
    if name is not None and len(typed(name, str, f"{where}.name")) > MAX_NAME_CHARS:
        raise RequestError(
            f"{where}.name has {len(str(name))} characters. Allowed: at most {MAX_NAME_CHARS}.", param=f"{where}.name"
        )
    check_strict(inner.get("strict"), where)
    if inner.get("schema") is None:
        raise RequestError(f"{where}.schema is missing. Send one, or use type json_object.", param=f"{where}.schema")
    return _from_schema(inner["schema"], max_tokens, f"{where}.schema")


def _from_schema(raw: object, max_tokens: int, where: str) -> tuple[AnswerFormat, tuple[str, ...]]:
    schema = read_schema(raw, param=where, max_tokens=max_tokens)
    return AnswerFormat(schema=schema), schema.notes


def _parse_pattern(value: object, where: str) -> Regex:
    pattern = typed(value, str, where)
    try:
        parse_regex(pattern)  # it must be whole by itself
        return parse_regex(f"^(?:{pattern})$")  # the whole answer must match
    except RegexError as error:
        raise RequestError(f"{where} cannot be used: {error}.", param=where, code="invalid_pattern") from None


def _parse_lark(value: object, where: str) -> str:
    text = typed(value, str, where)
    if len(text.encode("utf-8", errors="surrogatepass")) > MAX_SCHEMA_BYTES:
        raise RequestError(f"{where} is too large. Allowed: at most {MAX_SCHEMA_BYTES} bytes.", param=where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds a lone surrogate. Send whole characters.", param=where) from None
    text = text.removeprefix(_LARK_HEADER)
    rest = _LARK_PIECES.sub(" ", text)
    if '"' in rest or "/" in rest:  # else we might see pieces where the library does not, and miss what is between them
        raise RequestError(
            f"{where} has a string or a regular expression that does not end on its line. Close it there, and write a "
            "line break as \\n.",
            param=where,
            code="invalid_grammar",
        )
    if refused := _REFUSED_LARK.search(rest):
        raise RequestError(
            f"{where} uses {refused[0]!r}, which is not supported. Allowed: rules, terminals, %ignore, %import common.",
            param=where,
            code="invalid_grammar",
        )
    return _LARK_HEADER + "\n" + text  # without it, a text that looks like JSON would be another kind of grammar
