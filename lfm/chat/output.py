"""Token events to deltas of text and tool calls: one `OutputProcessor` per choice, for streams and whole bodies."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lfm.chat.call_parser import CallReader, Piece
from lfm.chat.call_parser_stream import CallDelta
from lfm.chat.detokenizer import Detokenizer
from lfm.chat.stop import StopMatcher, StopStrings
from lfm.chat.tokenizer import Tokenizer
from lfm.errors import InternalError
from lfm.protocol import ErrorInfo, FinishReason, TokenEvent, TokenLogprob

LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this for a token of probability 0


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token with its log-probability (None: the first token of a prompt) and the `top` alternatives.

    `bytes` are the token's exact bytes; `text` shows them, with U+FFFD for part of a character.
    """

    token_id: int
    text: str
    bytes: list[int]
    logprob: float | None
    top: tuple["TokenScore", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStep:
    """Something that a tool in the server did. `position`: characters of the answer's text that stand before it."""

    position: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What an event adds to one choice. A choice has exactly one terminal delta: the one with a `finish_reason`.

    `token_ids` are the billed tokens, a sampled stop token included, and `logprobs` (if asked for) has one entry for
    each of them; `text` may lag behind, since it is held while it could be half a character or begin a stop string.
    `calls` has at most one piece of each tool call, in order; text that came with them stood in front of them. `steps`
    come from loops that run tools between turns; no turn of a model has any.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenScore, ...] = ()
    prompt_logprobs: tuple[TokenScore, ...] | None = None
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None
    stopped_by_string: bool = False
    calls: tuple[CallDelta, ...] = ()
    steps: tuple[ToolStep, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return self != _NOTHING


_NOTHING = Delta()


class OutputProcessor:
    """Follows one choice: detokenizes, watches for stop strings, describes logprobs, counts what is billed.

    Args:
        prompt_ids: the ids that prompt logprobs belong to.
        stop: texts, or one `StopStrings` that the choices of a request share.
        include_stop: keep the stop string at the end of the text.
        num_logprobs: alternatives to report per token; None reports no logprobs.
        calls: reads tool calls out of the blocks that the model's control tokens open and close. Stop strings hold
            outside of blocks only. None: those tokens are nothing special, and have no text.

    The finish reason is "tool_calls" where the model ended its turn, or a stop string did, and a call was read.
    When a delta is `stopped_by_string` the caller aborts the engine request; later events feed to nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        stop: StopStrings | Sequence[str] = (),
        include_stop: bool = False,
        num_logprobs: int | None = None,
        calls: CallReader | None = None,
    ) -> None:
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._num_logprobs = num_logprobs
        self._detokenizer = Detokenizer(tokenizer)
        strings = stop if isinstance(stop, StopStrings) else StopStrings(stop)
        self._stop = StopMatcher(strings, include_stop=include_stop)
        self._calls = calls
        self._call_start, self._call_end = tokenizer.special.tool_call_start, tokenizer.special.tool_call_end

    @property
    def is_finished(self) -> bool:
        """Whether the terminal delta was returned."""
        return self.finish_reason is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stop.matched

    def feed(self, event: TokenEvent) -> Delta:
        """Turn one event of this choice into its delta, which may be empty. Raises InternalError for a broken event."""
        if self.is_finished:
            return _NOTHING
        if event.num_cached_tokens is not None:
            self.num_cached_tokens = event.num_cached_tokens
        pieces, num_kept = self._read_tokens(event)
        self.num_output_tokens += num_kept
        is_matched = self._stop.matched is not None and event.error is None
        self.finish_reason = self._finish_reason("stop" if is_matched else event.finish_reason)
        return Delta(
            text="".join(piece for piece in pieces if isinstance(piece, str)),
            token_ids=tuple(event.token_ids[:num_kept]),
            logprobs=self._scores(event, num_kept),
            prompt_logprobs=self._prompt_scores(event.prompt_logprobs),
            finish_reason=self.finish_reason,
            error=event.error,
            stopped_by_string=is_matched,
            calls=join_calls(piece for piece in pieces if isinstance(piece, CallDelta)),
        )

    def _finish_reason(self, reason: FinishReason | None) -> FinishReason | None:
        return "tool_calls" if reason == "stop" and self._calls is not None and self._calls.num_calls else reason

    def _read_tokens(self, event: TokenEvent) -> tuple[list[Piece], int]:
        """The text and the calls that the event makes certain, and how many of its tokens belong to the output."""
        num_tokens = len(event.token_ids)
        # The engine ends with "stop" only on a stop token. That one is never text, whichever token the request chose.
        num_texts = num_tokens - 1 if event.finish_reason == "stop" else num_tokens
        pieces: list[Piece] = []
        for index in range(num_texts):
            pieces += self._read_token(event.token_ids[index])
            if self._stop.matched is not None:
                return pieces, index + 1
        if event.finish_reason is not None:
            pieces += self._read_text(self._detokenizer.finish())
            if self._calls is not None:
                is_open = self._calls.is_open
                rest = self._calls.finish()
                pieces += rest if is_open else self._until_stop(rest)
            pieces.append(self._stop.flush())
        return pieces, num_tokens

    def _read_token(self, token_id: int) -> list[Piece]:
        calls = self._calls
        if calls is None or token_id not in (self._call_start, self._call_end):
            return self._read_text(self._detokenizer.push((token_id,)))
        pieces = self._read_text(self._detokenizer.finish())  # no character reaches across a control token
        if token_id == self._call_end:
            return pieces + calls.close()
        if not calls.is_open:
            pieces += self._until_stop(calls.open())
            if self._stop.matched is None:
                pieces.append(self._stop.flush())  # nor does a stop string
        return pieces

    def _read_text(self, text: str) -> list[Piece]:
        if self._calls is None:
            return [self._stop.push(text)]
        is_open = self._calls.is_open
        pieces = self._calls.push(text)
        return pieces if is_open else self._until_stop(pieces)

    def _until_stop(self, pieces: Iterable[Piece]) -> list[Piece]:
        return [self._stop.push(piece) if isinstance(piece, str) else piece for piece in pieces]

    def _scores(self, event: TokenEvent, num_kept: int) -> tuple[TokenScore, ...]:
        if self._num_logprobs is None:
            return ()
        if len(event.logprobs) != len(event.token_ids):
            raise InternalError(f"{len(event.logprobs)} logprobs for {len(event.token_ids)} tokens in one event.")
        return tuple(self._score(entry) for entry in event.logprobs[:num_kept])

    def _prompt_scores(self, entries: list[TokenLogprob | None] | None) -> tuple[TokenScore, ...] | None:
        if entries is None:
            return None
        if len(entries) != len(self._prompt_ids):
            raise InternalError(f"{len(entries)} prompt logprobs for {len(self._prompt_ids)} prompt tokens.")
        return tuple(
            self._describe(token_id, None) if entry is None else self._score(entry)
            for token_id, entry in zip(self._prompt_ids, entries, strict=True)
        )

    def _score(self, entry: TokenLogprob) -> TokenScore:
        # Embedding rows beyond the tokenizer have a logit but no text: no alternative that anyone could read.
        known = [(token_id, logprob) for token_id, logprob in entry.top if token_id < self._tokenizer.num_ids]
        top = tuple(self._describe(token_id, logprob) for token_id, logprob in known[: self._num_logprobs])
        return self._describe(entry.token_id, entry.logprob, top)

    def _describe(self, token_id: int, logprob: float | None, top: tuple[TokenScore, ...] = ()) -> TokenScore:
        data = self._tokenizer.token_bytes(token_id)
        shown = None if logprob is None else max(logprob, LOWEST_LOGPROB)
        return TokenScore(token_id, data.decode("utf-8", errors="replace"), list(data), shown, top)


def join_deltas(deltas: Iterable[Delta]) -> Delta:
    """Make one delta of consecutive ones of a choice: a whole body, or what waited for a slow reader."""
    deltas = list(deltas)
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(score for delta in deltas for score in delta.logprobs),
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
        finish_reason=next((delta.finish_reason for delta in deltas if delta.finish_reason is not None), None),
        error=next((delta.error for delta in deltas if delta.error is not None), None),
        stopped_by_string=any(delta.stopped_by_string for delta in deltas),
        calls=join_calls(piece for delta in deltas for piece in delta.calls),
        steps=tuple(step for delta in deltas for step in delta.steps),
    )


def join_calls(pieces: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """Make one piece of the successive ones of each call."""
    joined: dict[int, CallDelta] = {}
    for piece in pieces:
        first = joined.get(piece.index)
        joined[piece.index] = piece if first is None else replace(first, arguments=first.arguments + piece.arguments)
    return tuple(joined.values())
