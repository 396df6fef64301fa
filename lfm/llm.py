"""The engine in the caller's own process: text or ids in, text and ids out. No server, no second process.

    with LLM(EngineConfig(model="random:tiny")) as llm:
        print(llm.chat([Message(role="user", content="Hello")]).text)

This class and the engine's child process are the engine's only callers. It is not thread-safe, but streams of one LLM
may be read in turns. Importing this module loads no torch; making an LLM does.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lfm.chat.defaults import RequestedSampling, SamplingDefaults, defaults_for_source, resolve_sampling
from lfm.chat.grammar import answer_grammar
from lfm.chat.grammar_formats import parse_answer_format
from lfm.chat.messages import Message
from lfm.chat.output import Delta, OutputProcessor, TokenScore, join_deltas
from lfm.chat.prompt import build_prompt
from lfm.chat.stop import StopStrings
from lfm.chat.tokenizer import Tokenizer
from lfm.config import MAX_STEP_TOKENS, EngineConfig
from lfm.errors import InternalError, LfmError, RequestError
from lfm.model.progress import ignore_progress
from lfm.model.source import describe_model, resolve_model
from lfm.protocol import EngineRequest, ErrorInfo, FinishReason, GrammarSpec, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from lfm.engine.engine import Engine
    from lfm.engine.grammar_worker import GrammarTrial

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One finished sequence. `token_ids` are the billed ones: a sampled stop token is among them, never in `text`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenScore, ...] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class LLM:
    """A loaded model. Close it, or use it in a `with` block, to give its memory back."""

    engine: "Engine"

    def __init__(
        self, config: EngineConfig | None = None, *, on_phase: Callable[[str], None] = ignore_progress
    ) -> None:
        """Load the model; `on_phase` gets a line of progress now and then. Raises LfmError for a model or a machine."""
        from lfm.engine.build import build_engine
        from lfm.engine.plan import plan_engine

        config = EngineConfig() if config is None else config
        if config.step_tokens_decoding is None:  # whole answers are waited for: the longest steps are the fastest
            config = replace(config, step_tokens_decoding=MAX_STEP_TOKENS)
        description = describe_model(config.model, revision=config.revision)
        plan_engine(config, description.config)  # refuses what cannot fit before it is downloaded
        self.source = resolve_model(config.model, revision=config.revision, on_progress=on_phase)
        self.tokenizer = Tokenizer.for_source(self.source.folder, self.source.config)
        self.defaults: SamplingDefaults = defaults_for_source(self.source.folder, self.source.config)
        if self.source.folder is not None:  # found already: the engine need not ask the hub again
            config = replace(config, model=str(self.source.folder), revision=None)
        self.engine = build_engine(config, on_phase=on_phase)
        self._mailboxes: dict[str, deque[TokenEvent]] = {}
        self._num_requests = 0
        self._is_broken = False
        self._trial: GrammarTrial | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the engine and its memory. Idempotent; the LLM cannot be used afterwards."""
        if hasattr(self, "engine"):
            del self.engine
            if self._trial is not None:
                self._trial.close()

    def sampling(
        self,
        requested: RequestedSampling | None = None,
        *,
        max_tokens: int | None = None,
        num_prompt_tokens: int = 0,
    ) -> SamplingParams:
        """The model's recommended sampling with what `requested` names on top.

        `max_tokens` None: all of the context that a prompt of `num_prompt_tokens` leaves.
        """
        left = max(1, self.engine.info.max_model_len - num_prompt_tokens)
        return resolve_sampling(
            RequestedSampling() if requested is None else requested,
            defaults=self.defaults,
            max_tokens=left if max_tokens is None else max_tokens,
            stop_token_ids=self.tokenizer.stop_token_ids,
        )

    def grammar(self, response_format: Mapping[str, object]) -> GrammarSpec:
        """The grammar of answers of a form, as the API's `response_format`: json_object, json_schema, regex or grammar.

            llm.chat(messages, grammar=llm.grammar({"type": "json_schema", "json_schema": {"schema": schema}}))

        Raises RequestError with the path of what no grammar can hold. Whatever else is not enforced is logged.
        """
        answer, notes = parse_answer_format(dict(response_format), max_tokens=self.engine.info.max_model_len)
        if answer is None:
            raise RequestError("response_format of type text has no grammar. Leave it out.", param="response_format")
        for note in notes:
            logger.warning("%s", note)
        return answer_grammar(answer)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to where the assistant's answer begins."""
        return build_prompt(self.tokenizer, messages)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        grammar: GrammarSpec | None = None,
    ) -> Output:
        """Answer a conversation. Raises RequestError for a conversation or sampling that cannot be served."""
        return self.generate([self.chat_prompt(messages)], sampling=sampling, stop=stop, grammar=grammar)[0]

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        grammar: GrammarSpec | Sequence[GrammarSpec | None] | None = None,
    ) -> list[Output]:
        """Continue each prompt (ids, or raw text in which control tokens count), all of them as one batch.

        `sampling` is one for all prompts or one for each; None: the model's recommended sampling. So is `grammar`, and
        the outputs spell it unless max_tokens or a stop string cuts them; see `LLM.grammar`.
        """
        prompt_ids = [self._encode(prompt) for prompt in prompts]
        if isinstance(sampling, SamplingParams) or sampling is None:
            per_prompt = [self._or_default(sampling, ids) for ids in prompt_ids]
        else:
            per_prompt = list(sampling)
        if len(per_prompt) != len(prompt_ids):
            raise RequestError(f"{len(per_prompt)} sampling settings for {len(prompt_ids)} prompts. Give one for each.")
        grammars = [grammar] * len(prompt_ids) if isinstance(grammar, GrammarSpec | None) else list(grammar)
        if len(grammars) != len(prompt_ids):
            raise RequestError(f"{len(grammars)} grammars for {len(prompt_ids)} prompts. Give one for each.")
        strings = StopStrings(stop)
        requests = [self._request(*one) for one in zip(prompt_ids, per_prompt, grammars, strict=True)]
        processors = {request.request_id: self._processor(request, strings) for request in requests}
        deltas: dict[str, list[Delta]] = {request.request_id: [] for request in requests}
        for events in self.run(requests):
            for event in events:
                deltas[event.request_id].append(self._feed(processors[event.request_id], event))
        return [
            _to_output(request, join_deltas(deltas[request.request_id]), processors[request.request_id])
            for request in requests
        ]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        grammar: GrammarSpec | None = None,
    ) -> "Stream":
        """Continue one prompt, step by step."""
        ids = self._encode(prompt)
        request = self._request(ids, self._or_default(sampling, ids), grammar)
        processor = self._processor(request, StopStrings(stop))
        return Stream(
            self.run([request]), lambda event: self._feed(processor, event), processor, num_prompt_tokens=len(ids)
        )

    def run(self, requests: Sequence[EngineRequest]) -> Generator[list[TokenEvent]]:
        """Run engine requests as they are and yield their events after each step, if only an empty list.

        Closing the iterator aborts what has not ended. Raises RequestError if a request is refused (then all are
        aborted), InternalError if one fails. The first step begins as soon as there is enough for it: 256 prompts of
        4,000 tokens take 80 ms to add.
        """
        open_ids: list[str] = []
        may_start = len({request.priority for request in requests}) == 1  # else a later one may have to be the first
        self._mailboxes |= {request.request_id: deque() for request in requests}
        try:
            for request in requests:
                self.engine.add(request)
                open_ids.append(request.request_id)
                if may_start and self.engine.would_start_full:
                    may_start = False
                    self._step()
            while open_ids:
                if not any(self._mailboxes[request_id] for request_id in open_ids):
                    self._step()
                events = [event for request_id in open_ids for event in self._take(request_id)]
                for event in events:
                    if event.error is not None:
                        raise _to_exception(event.error)
                    if event.finish_reason is not None:
                        open_ids.remove(event.request_id)
                yield events
        finally:
            for request in requests:
                del self._mailboxes[request.request_id]
            self._abort(open_ids)

    def _feed(self, processor: OutputProcessor, event: TokenEvent) -> Delta:
        delta = processor.feed(event)
        if delta.stopped_by_string:
            self.engine.abort(event.request_id)
        return delta

    def _take(self, request_id: str) -> list[TokenEvent]:
        box = self._mailboxes[request_id]
        events = list(box)
        box.clear()
        return events

    def _step(self) -> None:
        """One engine step; its events go to the mailboxes of whoever reads them."""
        if self._is_broken or not self.engine.has_work():
            raise InternalError("The engine stopped in the middle of its work. Make a new LLM.")
        self._is_broken = True  # until the step is over: an interrupt or an error leaves it half done
        events = self.engine.step()
        self._is_broken = False
        for event in events:
            box = self._mailboxes.get(event.request_id)
            if box is not None:  # without a box: the end of a request whose reader went away
                box.append(event)

    def _abort(self, request_ids: Sequence[str]) -> None:
        """End requests that nobody reads any more, and give their blocks back."""
        if self._is_broken:
            return
        for request_id in request_ids:
            self.engine.abort(request_id)
        while not self._mailboxes and self.engine.has_work():  # other readers would step it themselves
            self._step()

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        return self.tokenizer.encode_raw(prompt, param="prompt") if isinstance(prompt, str) else list(prompt)

    def _or_default(self, sampling: SamplingParams | None, prompt_ids: Sequence[int]) -> SamplingParams:
        return self.sampling(num_prompt_tokens=len(prompt_ids)) if sampling is None else sampling

    def _request(self, prompt_ids: list[int], sampling: SamplingParams, grammar: GrammarSpec | None) -> EngineRequest:
        if grammar is not None:
            self._try_grammar(grammar)
        self._num_requests += 1
        name = f"llm-{self._num_requests}"
        return EngineRequest(request_id=name, prompt_ids=prompt_ids, sampling=sampling, grammar=grammar)

    def _try_grammar(self, grammar: GrammarSpec) -> None:
        """Have a new grammar tried in a process of its own, since the library runs in this one. Raises RequestError."""
        from lfm.engine.grammar_masks import token_table
        from lfm.engine.grammar_worker import GrammarTrial

        if self._trial is None:
            self._trial = GrammarTrial(token_table(self.tokenizer, vocab_size=self.source.config.vocab_size))
        self._trial.check(grammar, param="grammar")

    def _processor(self, request: EngineRequest, stop: StopStrings) -> OutputProcessor:
        return OutputProcessor(
            self.tokenizer, prompt_ids=request.prompt_ids, stop=stop, num_logprobs=request.sampling.logprobs
        )


class Stream:
    """An iterator over what each step adds to one sequence, if only an empty delta. Close it early to abort."""

    def __init__(
        self,
        events: Generator[list[TokenEvent]],
        feed: Callable[[TokenEvent], Delta],
        processor: OutputProcessor,
        *,
        num_prompt_tokens: int,
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self._events = events
        self._feed = feed
        self._processor = processor

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache; known with the first output token."""
        return self._processor.num_cached_tokens

    @property
    def num_output_tokens(self) -> int:
        return self._processor.num_output_tokens

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        return join_deltas(self._feed(event) for event in next(self._events))

    def close(self) -> None:
        """Abort the sequence if it has not ended. Idempotent."""
        self._events.close()


def _to_output(request: EngineRequest, whole: Delta, processor: OutputProcessor) -> Output:
    assert whole.finish_reason is not None, "every request ends in exactly one terminal event"
    return Output(
        text=whole.text,
        token_ids=whole.token_ids,
        finish_reason=whole.finish_reason,
        logprobs=whole.logprobs,
        num_prompt_tokens=len(request.prompt_ids),
        num_cached_tokens=processor.num_cached_tokens,
    )


def _to_exception(error: ErrorInfo) -> LfmError:
    if error.status < 500:
        return RequestError(error.message, param=error.param, code=error.code)
    return InternalError(error.message)
