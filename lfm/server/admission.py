"""From a validated request to engine requests: the model's name, the prompt as ids, the token limit."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from lfm.chat.completion import check_n, requests_for
from lfm.chat.defaults import resolve_sampling
from lfm.chat.tokenizer import Tokenizer
from lfm.engine.validate import validate
from lfm.errors import NotFoundError, RequestError
from lfm.protocol import EngineInfo, EngineRequest, GrammarSpec
from lfm.server.generation import DeltaSource
from lfm.server.schemas import SamplingRequest
from lfm.server.state import AppState

LONG_BODY_BYTES = 16_384  # some 3 ms of tokenizing: longer ones would hold up every stream of this process

_T = TypeVar("_T")


def check_model(requested: str, served: str) -> None:
    if requested != served:
        raise NotFoundError(
            f"The model {requested[:200]!r} is not served here. Served: {served!r}.",
            param="model",
            code="model_not_found",
        )


def check_text_size(num_bytes: int, state: AppState, *, param: str) -> None:
    """Refuse a text that cannot fit before it is tokenized: no token stands for more than `max_token_bytes`."""
    check_prompt_size(num_bytes // state.tokenizer.max_token_bytes, state, param=param)


def check_prompt_size(num_tokens: int, state: AppState, *, param: str) -> None:
    max_model_len = state.backend.info.max_model_len
    if num_tokens > max_model_len:
        raise RequestError(
            f"{param} makes {num_tokens} tokens or more. Allowed: the context of {max_model_len}. Send less.",
            param=param,
            code="context_length_exceeded",
        )


async def in_thread_if_long(work: Callable[[], _T], *, num_bytes: int) -> _T:
    """Tokenizing releases the interpreter lock, so a long body is worth a thread."""
    return await asyncio.to_thread(work) if num_bytes > LONG_BODY_BYTES else work()


@contextmanager
def renaming(ours: str, theirs: str) -> Iterator[None]:
    """Let errors about what we call `ours` name what the client calls it."""
    try:
        yield
    except RequestError as error:
        if ours != theirs and error.param is not None and error.param.startswith(ours):
            error.message = error.message.replace(ours, theirs, 1)
            error.param = theirs + error.param.removeprefix(ours)
        raise


def shown_prompt(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The prompt as the model sees it, control tokens included."""
    return b"".join(map(tokenizer.token_bytes, prompt_ids)).decode("utf-8", errors="replace")


def make_requests(
    request: SamplingRequest,
    prompts: Sequence[list[int]],
    *,
    request_id: str,
    tenant: str,
    state: AppState,
    grammar: GrammarSpec | None = None,
    banned_ids: Sequence[int] = (),
) -> list[EngineRequest]:
    """One engine request per choice: the n choices of the first prompt, then those of the second, and so on.

    `tenant` salts the prefix cache: what one key's requests computed, no other key's requests find.

    Raises RequestError for values that no engine could take; all other bounds are the engine's.
    """
    n = request.num_choices
    check_n(n)
    info = state.backend.info
    if n * len(prompts) > info.max_running + info.max_queue:
        raise RequestError(
            f"n={n} choices of {len(prompts)} prompts are {n * len(prompts)} sequences. "
            f"Allowed: {info.max_running + info.max_queue}. Send fewer at once.",
            param="n",
        )
    stop_token_ids = () if request.ignore_eos else state.tokenizer.stop_token_ids
    engine_requests: list[EngineRequest] = []
    for prompt_ids in prompts:
        sampling = resolve_sampling(
            request.requested_sampling(),
            defaults=state.defaults,
            max_tokens=_max_tokens(request, len(prompt_ids), info),
            stop_token_ids=stop_token_ids,
        )
        engine_requests += requests_for(
            prompt_ids,
            request_id=request_id,
            sampling=msgspec.structs.replace(sampling, banned_ids=tuple(banned_ids)),
            n=n,
            first_choice=len(engine_requests),
            tenant=tenant,
        )
    return [msgspec.structs.replace(engine_request, grammar=grammar) for engine_request in engine_requests]


def _max_tokens(request: SamplingRequest, num_prompt_tokens: int, info: EngineInfo) -> int:
    """What the client asked for; all that is left of the context and the cache if it named nothing.

    A prompt that fills the context leaves nothing; asking for one token lets the engine refuse it with the numbers.
    """
    left = max(1, _num_context_tokens(info) - num_prompt_tokens)
    if request.token_limit is None:
        return left
    return min(request.token_limit, left) if request.is_clamped else request.token_limit


def num_context_tokens(state: AppState) -> int:
    """The longest that a prompt and its answer can be together."""
    return _num_context_tokens(state.backend.info)


def _num_context_tokens(info: EngineInfo) -> int:
    return min(info.max_model_len, info.num_blocks * info.block_size + 1)  # the last id is never computed


async def open_generation(source: DeltaSource, request: SamplingRequest, *, prompt_field: str) -> None:
    """Submit. Raises what the engine refuses."""
    with naming_fields_of(request, prompt_field=prompt_field):
        await source.open()


def check_requests(
    engine_requests: Sequence[EngineRequest], request: SamplingRequest, *, prompt_field: str, state: AppState
) -> None:
    """The engine's own check of every sequence, without an engine. Raises what it would refuse."""
    info = state.backend.info
    with naming_fields_of(request, prompt_field=prompt_field):
        for engine_request in engine_requests:
            validate(
                engine_request,
                vocab_size=info.vocab_size,
                num_ids=state.tokenizer.num_ids,
                max_model_len=info.max_model_len,
                num_cache_tokens=info.num_blocks * info.block_size,
            )


@contextmanager
def naming_fields_of(request: SamplingRequest, *, prompt_field: str) -> Iterator[None]:
    """Let a refusal of the engine name the fields by which this client knows them."""
    try:
        yield
    except RequestError as error:
        names = {"max_tokens": request.max_tokens_field, "prompt": prompt_field, "messages": prompt_field}
        if error.param in names:
            error.message = error.message.replace("max_tokens", request.max_tokens_field)
            error.param = names[error.param]
        raise
