"""Names of members that a schema does not declare: which there may be, and the terminals that spell them."""

from collections.abc import Iterator
from dataclasses import dataclass

from lfm.chat.grammar_strings import counted, encoded_text, regex_source, string_source
from lfm.chat.schema_nodes import NOTHING, PLAIN_TEXT, Node, Object, Text, generated_additional
from lfm.chat.schema_regex import Chars, Choice, Concat, Regex, parse_regex
from lfm.chat.schema_texts import Texts

KEYWORD_CHARS = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
_KEYWORD = parse_regex(f"^{KEYWORD_CHARS}$")
_USUAL_NAMES = ("name", "key", "a", "b", "A", "_", "0", "x-1", "1.0", "first name", "", "\u00e9", "/")


@dataclass(frozen=True, slots=True)
class Names:
    """Names that `text` allows, without the declared ones and those that match a pattern of `avoided`."""

    text: Text
    declared: tuple[str, ...]
    avoided: tuple[Regex, ...]


def other_names(node: Object, texts: Texts, *, are_keywords: bool = False) -> Iterator[tuple[Names, Node]]:
    """The kinds of undeclared names that an object may have, each with its values' node; none that nobody can spell.

    A name that matches several patterns would need a value that satisfies all of them; such names are not used.
    """
    if not node.patterns and generated_additional(node) == NOTHING:
        return
    base: Node = PLAIN_TEXT if node.names is None else node.names
    if are_keywords:
        base = _intersection(base, _KEYWORD, texts)
    declared = tuple(one.name for one in node.properties)
    patterns = [pattern for pattern, _ in node.patterns]
    kinds = [
        (_intersection(base, pattern, texts), tuple(other for other in patterns if other != pattern), value)
        for pattern, value in node.patterns
    ]
    for text, avoided, value in [*kinds, (base, tuple(patterns), generated_additional(node))]:
        if value != NOTHING and isinstance(text, Text):
            names = Names(text, declared, avoided)
            if _exist(names, texts):
                yield names, value


def _intersection(text: Node, pattern: Regex, texts: Texts) -> Node:
    return texts.intersect(text, Text(patterns=(pattern,))) if isinstance(text, Text) else text


def _exist(names: Names, texts: Texts) -> bool:
    """Whether there certainly is such a name."""
    if names.text.choices is None and not names.avoided:
        return texts.node(names.text, excluded=names.declared) != NOTHING
    samples = names.text.choices or [*_USUAL_NAMES, *(text for one in names.text.patterns for text in _samples(one))]
    return any(
        text not in names.declared and not any(texts.matches(pattern, text) for pattern in names.avoided)
        for text in texts.accepted(names.text, samples)
    )


def _samples(regex: Regex) -> list[str]:
    """A few texts of a language."""
    if isinstance(regex, Chars):
        return [chr(low) for low, _ in regex.ranges[:2]] + [chr(high) for _, high in regex.ranges[:2]]
    if isinstance(regex, Choice):
        return [text for option in regex.options[:8] for text in _samples(option)[:4]]
    if isinstance(regex, Concat):
        parts = [_samples(part) or [""] for part in regex.parts]
        return ["".join(samples[index % len(samples)] for samples in parts) for index in range(4)]
    return [text * max(regex.low, 0 if regex.high == 0 else 1) for text in _samples(regex.body)] + [""] * (
        regex.low == 0
    )


def name_source(names: Names, *, is_json: bool) -> str:
    """The terminal of such a name in quotes."""
    return string_source(names.text, is_json=is_json, excluded=names.declared, avoided=names.avoided)


def keyword_source(names: Names) -> str:
    """The terminal of such a name as a keyword with its equals sign."""
    parts = [f"/{KEYWORD_CHARS}=/"]
    if names.text.choices is not None:
        parts.append(f"/(?:{'|'.join(encoded_text(text, '') for text in names.text.choices)})=/")
    parts += [f"/{regex_source(pattern, '')}=/" for pattern in names.text.patterns if pattern != _KEYWORD]
    if names.text.max_length is not None or names.text.min_length > 1:
        parts.append(f"/[A-Za-z0-9_]{counted(names.text.min_length, names.text.max_length)}=/")
    if names.declared:
        parts.append(f"~/(?:{'|'.join(encoded_text(text, '') for text in names.declared)})=/")
    parts += [f"~/{regex_source(pattern, '')}=/" for pattern in names.avoided]
    return " & ".join(parts)
