"""What the requests of one API process share: tools that were read before, and the trial of new grammars."""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Protocol

from lfm.chat.grammar_formats import AnswerFormats
from lfm.chat.grammar_tools import ToolSets
from lfm.chat.tokenizer import Tokenizer
from lfm.engine.client import EngineBackend
from lfm.engine.grammar_masks import token_table
from lfm.engine.grammar_worker import GrammarTrial
from lfm.errors import LfmError
from lfm.protocol import GrammarSpec

logger = logging.getLogger(__name__)


class Trial(Protocol):
    """What `GrammarTrial` does, in a process of its own."""

    def has_passed(self, spec: GrammarSpec) -> bool: ...

    def check(self, spec: GrammarSpec, *, param: str) -> None: ...

    def close(self) -> None: ...


class Turns:
    """One at a time: the tenants that wait in turn, and what each of them waits for in its order."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it until the end of the block."""
        if self._is_taken:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(tenant, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it came at that moment
                    self._pass_on(tenant)
                raise
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on(tenant)

    def _pass_on(self, tenant: str) -> None:
        if tenant in self._waiting:
            self._waiting.move_to_end(tenant)
        while self._waiting:
            following, turns = self._waiting.popitem(last=False)
            while turns and turns[0].done():  # who waited for it has left
                turns.popleft()
            if turns:
                turns.popleft().set_result(None)
                if turns:
                    self._waiting[following] = turns
                return
        self._is_taken = False


class Grammars:
    """Of one app. Nothing is made before `warm_up` or a request needs it, since the engine may still be loading."""

    def __init__(self, backend: EngineBackend, tokenizer: Tokenizer, *, trial: Trial | None = None) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._trial = trial
        self._is_warm = False
        # Trials have a thread of their own: a client with bad grammars must not take the threads that others need.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lfm-grammar-trial")
        self._turns = Turns()

    @cached_property
    def tool_sets(self) -> ToolSets:
        return ToolSets(max_tokens=self._backend.info.max_model_len)

    @cached_property
    def answer_formats(self) -> AnswerFormats:
        return AnswerFormats(max_tokens=self._backend.info.max_model_len)

    async def check(self, spec: GrammarSpec, *, param: str, tenant: str) -> None:
        """Return if an engine can be given this grammar. Raises RequestError naming `param` if not.

        `tenant`: who asks. One that sends grammars that take the whole 5 s must not keep the others waiting for each.
        """
        if self._trial is None or not self._trial.has_passed(spec):
            async with self._turns.of(tenant):
                await asyncio.get_running_loop().run_in_executor(self._thread, self._check, spec, param)

    def warm_up(self) -> None:
        """Start the trial's process, once, while nobody waits for it: it takes a second."""
        if not self._is_warm:
            self._is_warm = True
            self._thread.submit(self._try_anything)

    def close(self) -> None:
        """End the trial's process."""
        self._thread.shutdown(cancel_futures=True)
        if self._trial is not None:
            self._trial.close()

    def _try_anything(self) -> None:
        try:
            self._check(GrammarSpec(text='start: "a"'), "grammar")
        except LfmError as error:
            logger.warning("grammars cannot be tried yet: %s", error)

    def _check(self, spec: GrammarSpec, param: str) -> None:
        if self._trial is None:
            self._trial = GrammarTrial(token_table(self._tokenizer, vocab_size=self._backend.info.vocab_size))
        self._trial.check(spec, param=param)
