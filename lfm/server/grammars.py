"""What the requests of one API process share: tools that were read before, and the trial of new grammars."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
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


class Grammars:
    """Of one app. Nothing is made before `warm_up` or a request needs it, since the engine may still be loading."""

    def __init__(self, backend: EngineBackend, tokenizer: Tokenizer, *, trial: Trial | None = None) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._trial = trial
        self._is_warm = False
        # Trials have a thread of their own: a client with bad grammars must not take the threads that others need.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lfm-grammar-trial")

    @cached_property
    def tool_sets(self) -> ToolSets:
        return ToolSets(max_tokens=self._backend.info.max_model_len)

    @cached_property
    def answer_formats(self) -> AnswerFormats:
        return AnswerFormats(max_tokens=self._backend.info.max_model_len)

    async def check(self, spec: GrammarSpec, *, param: str) -> None:
        """Return if an engine can be given this grammar. Raises RequestError naming `param` if not."""
        if self._trial is None or not self._trial.has_passed(spec):
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
