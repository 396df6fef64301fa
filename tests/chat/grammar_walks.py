"""Texts that a grammar allows, chosen at random token by token, as a model without any sense would write them."""

import random
from functools import cache

import numpy as np

from lfm.chat.call_parser import CallReader
from lfm.chat.call_parser_stream import CallDelta
from lfm.chat.tokenizer import Tokenizer
from lfm.engine.grammar_masks import GrammarCache, GrammarMatcher, num_mask_words, token_table
from lfm.model.presets import PRESETS
from lfm.protocol import GrammarSpec

MAX_TOKENS = 600
PATIENCE = 120  # tokens after which the walk takes the shortest way out
WAY_OUT = b"\"')]}"

Arguments = dict[str, object]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.byte_level(PRESETS["tiny"])


@cache
def grammars() -> GrammarCache:
    return GrammarCache(lambda: token_table(tokenizer(), vocab_size=tokenizer().num_ids), max_bytes=1)


def allowed_ids(matcher: GrammarMatcher) -> list[int]:
    row = np.zeros(num_mask_words(tokenizer().num_ids), dtype=np.int32)
    matcher.fill(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return [int(token_id) for token_id in np.flatnonzero(bits)]


def walk(spec: GrammarSpec, choice: random.Random, *, patience: int = PATIENCE) -> list[int] | None:
    """The tokens of one text, without a stop token; None if it did not end. Fails where nothing is allowed."""
    matcher = grammars().matcher(spec)
    ids: list[int] = []
    if spec.trigger_id is not None:
        assert not matcher.needs_mask
        assert matcher.accept(spec.trigger_id)
        ids.append(spec.trigger_id)
    while len(ids) < MAX_TOKENS:
        forced = matcher.take_forced()
        if not forced:
            allowed = allowed_ids(matcher)
            assert matcher.error is None, matcher.error
            assert allowed, "the grammar leads to a place where nothing is allowed"
            forced = [pick(allowed, choice, is_late=len(ids) > patience)]
            if forced[0] not in tokenizer().stop_token_ids:
                assert matcher.accept(forced[0]), matcher.error
        if forced[0] in tokenizer().stop_token_ids:
            return ids
        ids += forced
    return None


def pick(allowed: list[int], choice: random.Random, *, is_late: bool) -> int:
    """One of the allowed tokens; when it is late, one that comes to an end."""
    stop_ids = [token_id for token_id in allowed if token_id in tokenizer().stop_token_ids]
    if stop_ids and (is_late or len(stop_ids) == len(allowed) or choice.random() < 0.3):
        return stop_ids[0]
    closing = [i for char in WAY_OUT if (i := tokenizer().encode(chr(char))[0]) in allowed]
    if closing and (is_late or choice.random() < 0.2):
        return closing[0]
    return choice.choice([token_id for token_id in allowed if token_id not in stop_ids])


def text_of(ids: list[int]) -> str:
    return b"".join(tokenizer().token_bytes(i) for i in ids if i not in tokenizer().special_ids).decode("utf-8")


def read_calls(ids: list[int], *, is_constrained: bool = True, cut: int = 7) -> tuple[list[tuple[str, str]], str]:
    """The calls (name, arguments) and the text of an answer, read in pieces of `cut` characters."""
    special = tokenizer().special
    reader = CallReader(is_constrained=is_constrained)
    pieces: list[str | CallDelta] = []
    run: list[int] = []
    for token_id in [*ids, special.pad]:
        if token_id in (special.tool_call_start, special.tool_call_end, special.pad):
            text = text_of(run)
            for begin in range(0, len(text), cut):
                pieces += reader.push(text[begin : begin + cut])
            run = []
        else:
            run.append(token_id)
        if token_id == special.tool_call_start:
            pieces += reader.open()
        elif token_id == special.tool_call_end:
            pieces += reader.close()
    return join_pieces([*pieces, *reader.finish()])


def join_pieces(pieces: list[str | CallDelta]) -> tuple[list[tuple[str, str]], str]:
    """Deltas as whole calls, and the text beside them. Checks what every client relies on."""
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    deltas = [piece for piece in pieces if isinstance(piece, CallDelta)]
    calls: list[tuple[str, str]] = []
    ids: list[str] = []
    for delta in deltas:
        if delta.index == len(calls):
            assert delta.name is not None
            calls.append((delta.name, ""))
            ids.append(delta.id)
        else:
            assert delta.index == len(calls) - 1
            assert delta.name is None
        assert delta.id == ids[delta.index]
        calls[delta.index] = (calls[delta.index][0], calls[delta.index][1] + delta.arguments)
    return calls, text
