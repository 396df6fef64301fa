"""Whether an answer is right: pure functions on what the model wrote and what was expected.

A turn is judged by what its kind needs: calls by name and all arguments, JSON by value, grounded answers by their
value and citation, asking back and declining by a phrase for it, other words by the facts that they have to name.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lfm.chat.call_parser_lenient import ParsedCall, parse_block
from lfm.chat.messages import Message, ToolCall
from lfm.chat.tokenizer import Tokenizer
from lfm.train.synthetic.scenarios import Expected
from lfm.train.synthetic.tables import language_table

_CITATION = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote in one turn. `calls` None: a block of calls that cannot be read as such."""

    text: str
    calls: tuple[ToolCall, ...] | None = ()


def read_answer(tokenizer: Tokenizer, token_ids: Iterable[int]) -> Answer:
    """Split the ids of a turn into its text and its calls, as serving would read them."""
    special = tokenizer.special
    text: list[int] = []
    block: list[int] = []
    blocks: list[str] = []
    is_inside = False
    for token_id in token_ids:
        if token_id in (special.tool_call_start, special.tool_call_end):
            if is_inside:
                blocks.append(tokenizer.decode(block))
            is_inside, block = token_id == special.tool_call_start, []
        else:
            (block if is_inside else text).append(token_id)
    if is_inside:
        blocks.append(tokenizer.decode(block))
    found = [part for written in blocks for part in parse_block(written)]
    calls = [ToolCall(name=p.name, arguments=json.loads(p.arguments)) for p in found if isinstance(p, ParsedCall)]
    is_readable = len(calls) == len(found)
    return Answer(tokenizer.decode(text).strip(), tuple(calls) if is_readable else None)


def is_right(expected: Expected, gold: Message, answer: Answer, *, language: str) -> bool:
    """Whether a turn is as it should be. `gold` is the turn of the made conversation."""
    if expected.kind == "calls":
        return answer.calls is not None and same_calls(gold.tool_calls, answer.calls)
    if answer.calls != () or not answer.text:
        return False
    if expected.kind == "json":
        return is_same_json(gold.text, answer.text)
    if expected.kind == "cited":
        value, citation = expected.contains
        return names_fact(answer.text, value) and {f"[{n}]" for n in _CITATION.findall(answer.text)} == {citation}
    if expected.kind == "absent":
        phrases = language_table(language)["grounded"]["absent"]
        return not _CITATION.search(answer.text) and any(phrase in answer.text for phrase in phrases)
    if expected.kind == "one_of":
        return any(phrase in answer.text for phrase in expected.contains)
    return all(names_fact(answer.text, fact) for fact in expected.contains)


def same_calls(wanted: Sequence[ToolCall], made: Sequence[ToolCall]) -> bool:
    """Whether the calls are the same, in whatever order, each with all arguments and no other."""
    left = list(made)
    for call in wanted:
        match = next((i for i, other in enumerate(left) if _same_call(call, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def is_same_json(wanted: str, written: str) -> bool:
    """Whether two texts are JSON of one value; the order of keys does not matter, the kind of a number neither."""
    try:
        return same_value(json.loads(wanted), json.loads(written))
    except (ValueError, RecursionError):
        return False


def same_value(one: object, other: object) -> bool:
    """Equality of JSON values: 5 is 5.0, but true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_value(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same_value(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other if isinstance(one, str) else one == other


def names_fact(text: str, fact: str) -> bool:
    """Whether a fact stands in a text, and not only as a part of a longer number."""
    before = r"(?<![\d.])" if fact[:1].isdigit() else ""
    after = r"(?!\d|\.\d)" if fact[-1:].isdigit() else ""
    return re.search(f"{before}{re.escape(fact)}{after}", text) is not None


def _same_call(one: ToolCall, other: ToolCall) -> bool:
    return one.name == other.name and same_value(dict(one.arguments), dict(other.arguments))
