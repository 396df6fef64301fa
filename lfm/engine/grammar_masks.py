"""Which tokens a grammar allows next: matchers, compiled grammars, and the thread that fills masks. No torch here.

A mask is a row of packed bits: bit i of word i // 32 allows token id i. The library (llguidance) never raises for a bad
grammar or token; it enters an error state and says so only when asked. So each call here is followed by that question,
and a matcher in error allows the stop tokens alone: its request must end with an error, never as if it were complete.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from lfm.chat.tokenizer import Tokenizer
from lfm.engine.grammar_library import TokenTable, compile_grammar, readable_error
from lfm.errors import RequestError
from lfm.protocol import GrammarSpec

logger = logging.getLogger(__name__)

Masks = NDArray[np.int32]

# What a compiled grammar takes once it was used, measured: 1.1 MB for a text of 58 KB, 0.3 MB for 4 KB of patterns.
MAX_COMPILED_BYTES = 256 * 1024**2
BASE_BYTES = 64 * 1024
BYTES_PER_CHAR = 48
BITS = (1 << np.arange(32, dtype=np.uint32)).view(np.int32)
HELPER_STACK_BYTES = 32 * 1024**2


def token_table(tokenizer: Tokenizer, *, vocab_size: int) -> TokenTable:
    """The table of a checkpoint's tokenizer. Ids beyond the tokenizer have no bytes, so no grammar allows them."""
    known = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.num_ids)]
    stop_ids = [tokenizer.special.im_end, *(i for i in tokenizer.stop_token_ids if i != tokenizer.special.im_end)]
    return TokenTable(
        known + [b""] * (vocab_size - len(known)),
        special_ids=sorted(tokenizer.special_ids),
        stop_ids=[token_id for token_id in stop_ids if token_id < tokenizer.num_ids],
        encode=tokenizer.encode,
    )


def helper_thread(name: str) -> ThreadPoolExecutor:
    """One thread, started now, with so much stack that no grammar that passed its trial can overflow it."""
    before = threading.stack_size(HELPER_STACK_BYTES)
    try:
        executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        executor.submit(int).result()
    finally:
        threading.stack_size(before)
    return executor


def num_mask_words(vocab_size: int) -> int:
    """Words of one row of masks."""
    return -(-vocab_size // 32)


class GrammarMatcher:
    """One sequence's place in its grammar.

    Attributes:
        needs_mask: whether the next token is constrained. False until the grammar's trigger token was accepted.
        is_finished: whether only stop tokens are left.
        error: what went wrong in the library, or None. Then only stop tokens are allowed, and nothing is accepted.
        stop_ids: what a finished grammar allows.
    """

    def __init__(self, matcher: LLMatcher, *, trigger_id: int | None, stop_ids: Sequence[int]) -> None:
        self.error: str | None = None
        self._matcher = matcher
        self._trigger_id = trigger_id
        self._stop_ids = tuple(stop_ids)
        self.stop_ids = frozenset(stop_ids)
        self.needs_mask = trigger_id is None

    @property
    def is_finished(self) -> bool:
        return self.needs_mask and self.error is None and self._matcher.is_stopped()

    def fill(self, row: Masks, *, address: int | None = None) -> None:
        """Write the mask of the next token into a row of `num_mask_words` contiguous words.

        `address`: where the row begins in memory, for callers that know; asking numpy takes longer than most masks.
        """
        if self.error is None:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data if address is None else address, row.nbytes)
            self._check()
        if self.error is not None:
            row[:] = 0
            for token_id in self._stop_ids:
                row[token_id // 32] |= BITS[token_id % 32]

    def accept(self, token_id: int) -> bool:
        """Go on with the token that was sampled. False: the grammar does not allow it, or is in error."""
        if not self.needs_mask:
            if token_id != self._trigger_id:
                return True
            self.needs_mask = True
        if self.error is None:
            self._matcher.consume_token(token_id)
            self._check()
        return self.error is None

    def take_forced(self) -> list[int]:
        """The tokens that must come next whatever the model says, already accepted; a stop token if nothing else may.

        Empty where there is a choice.
        """
        if not self.needs_mask or self.error is not None:
            return []
        if self.is_finished:
            return [self._stop_ids[0]]
        forced = self._matcher.compute_ff_tokens()
        self._check()
        if forced and self.error is None:
            self._matcher.consume_tokens(forced)
            self._check()
        return forced if self.error is None else []

    def _check(self) -> None:
        self.error = readable_error(self._matcher) or self.error


class GrammarCache:
    """Compiled grammars by their text, those used last, up to `max_bytes` by estimate. Any thread may use it.

    `make_table` is called for the first grammar, by the thread that asks for it; so is the table compiled, in 0.2 s.
    """

    def __init__(self, make_table: Callable[[], TokenTable], *, max_bytes: int = MAX_COMPILED_BYTES) -> None:
        self._thread = helper_thread("grammar-compiler")
        self._progress = _Progress()
        self._make_table = make_table
        self._table_lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def prepare(self, spec: GrammarSpec) -> Future[GrammarMatcher]:
        """`matcher` in a helper thread: 1 ms for one new tool, 40 ms for 200, 0.1 ms for any that were seen before."""
        return self._thread.submit(self._prepare, spec, self._progress)

    @property
    def busy_s(self) -> float:
        """How long the helper thread has been at one grammar; 0 if it is at none. Making the table does not count."""
        begun_s = self._progress.begun_s
        return 0.0 if begun_s is None else time.monotonic() - begun_s

    def abandon_helper(self) -> None:
        """Never wait for the helper thread again: it hangs. What else it was to prepare is cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread, self._progress = helper_thread("grammar-compiler"), _Progress()

    def close(self) -> None:
        """End the helper thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def matcher(self, spec: GrammarSpec) -> GrammarMatcher:
        """A matcher at the beginning of the grammar. Raises RequestError if the library refuses the grammar."""
        with self._lock:
            compiled = self._compiled.get(spec.text)
            if compiled is not None:
                self._compiled.move_to_end(spec.text)
                compiled = compiled.deep_copy()
        tokenizer = self._compiled_table()
        if compiled is None:
            compiled = self._compile(tokenizer, spec.text)
        return GrammarMatcher(compiled, trigger_id=spec.trigger_id, stop_ids=tokenizer.eos_tokens)

    def _prepare(self, spec: GrammarSpec, progress: "_Progress") -> GrammarMatcher:
        self._compiled_table()
        progress.begun_s = time.monotonic()
        try:
            return self.matcher(spec)
        finally:
            progress.begun_s = None

    def _compiled_table(self) -> LLTokenizer:
        with self._table_lock:
            if self._tokenizer is None:
                self._tokenizer = self._make_table().compiled()
            return self._tokenizer

    def _compile(self, tokenizer: LLTokenizer, text: str) -> LLMatcher:
        matcher = compile_grammar(tokenizer, text)
        error = readable_error(matcher)
        if error is not None:
            raise RequestError(f"The grammar cannot be used: {error}.", param="response_format", code="invalid_grammar")
        copy = matcher.deep_copy()
        with self._lock:
            if text not in self._compiled:
                self._compiled[text] = copy
                self._num_bytes += _estimated_bytes(text)
            while self._num_bytes > self._max_bytes and len(self._compiled) > 1:
                dropped, _ = self._compiled.popitem(last=False)
                self._num_bytes -= _estimated_bytes(dropped)
        return matcher


class _Progress:
    """When a helper thread began with its grammar."""

    begun_s: float | None = None


def _estimated_bytes(text: str) -> int:
    return BASE_BYTES + BYTES_PER_CHAR * len(text)


class MaskFiller:
    """Fills the masks of a step in one helper thread, while the device computes.

    The library releases the interpreter lock meanwhile; more threads were measured to only add time. `masks` is the
    host buffer [rows, words], which may share its memory with a (pinned) tensor. Between `start` and `wait` it belongs
    to the helper, and so do the matchers.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self._addresses = [masks[row].ctypes.data for row in range(len(masks))]
        self._thread = helper_thread("grammar-masks")
        self._job = _Job([])
        self._future: Future[None] | None = None

    def fill_one(self, row: int, token_id: int) -> None:
        """Write a mask of one id, here and now."""
        self.masks[row] = 0
        self.masks[row, token_id >> 5] = BITS[token_id & 31]

    def start(self, rows: Sequence[tuple[int, GrammarMatcher]]) -> None:
        """Begin to fill these rows of `masks`. The step before must have been waited for."""
        self._job = _Job(rows)
        self._future = self._thread.submit(self._fill, self._job) if rows else None

    def wait(self, timeout_s: float) -> list[int]:
        """Wait for the rows, at most so long. Returns those that are late: their requests must fail, never run free."""
        future, job = self._future, self._job
        if future is None:
            return []
        self._future = None
        wait([future], timeout_s)
        if not future.done():
            job.is_late = True
            return [row for row, _ in job.rows[job.num_done :]]
        future.result()
        return []

    def rest(self, *, after: int) -> list[tuple[int, GrammarMatcher]]:
        """What was to be filled after this row."""
        rows = [row for row, _ in self._job.rows]
        return self._job.rows[rows.index(after) + 1 :]

    def abandon(self) -> None:
        """Never wait for the helper thread again: it hangs. Nothing may be started here any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the helper thread when it has done what it was given."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fill(self, job: "_Job") -> None:
        for row, matcher in job.rows:
            if job.is_late:
                return
            try:
                matcher.fill(self.masks[row], address=self._addresses[row])
            except Exception:  # it costs its own request only; the traceback goes to the log
                logger.exception("a grammar mask could not be filled")
                matcher.error = "the grammar library failed"
                matcher.fill(self.masks[row])
            job.num_done += 1


class _Job:
    """The masks of one step, on their way."""

    def __init__(self, rows: Sequence[tuple[int, GrammarMatcher]]) -> None:
        self.rows = list(rows)
        self.num_done = 0
        self.is_late = False
