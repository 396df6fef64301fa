"""The one check of a request at the engine's boundary, so that no front end can bypass it. No torch here.

The bounds are those of `lfm.protocol`. Each message says what was given, what is allowed and what to do.
"""

import math

from lfm import protocol
from lfm.errors import RequestError
from lfm.protocol import EngineRequest, GrammarSpec, SamplingParams


def validate(
    request: EngineRequest, *, vocab_size: int, num_ids: int, max_model_len: int, num_cache_tokens: int
) -> None:
    """Raise RequestError unless the request can run to its end: ids known, numbers in bounds, context and cache enough.

    `num_ids`: ids that the tokenizer knows; `num_cache_tokens`: tokens that the whole block pool holds.
    """
    _check_sampling(request.sampling, vocab_size=vocab_size)
    _check_range("priority", request.priority, -protocol.MAX_PRIORITY, protocol.MAX_PRIORITY)
    _check_prompt(request.prompt_ids, num_ids if request.mask_padded_ids else vocab_size)
    if request.grammar is not None:
        _check_grammar(request.grammar, num_ids)
    _check_context(len(request.prompt_ids), request.sampling.max_tokens, max_model_len, num_cache_tokens)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high:
        raise RequestError(f"{name}={value} is out of range. Allowed: {low:g} to {high:g}.", param=name)


def _check_sampling(sampling: SamplingParams, *, vocab_size: int) -> None:
    _check_range("temperature", sampling.temperature, 0, protocol.MAX_TEMPERATURE)
    _check_range("min_p", sampling.min_p, 0, 1)
    _check_range("top_p", sampling.top_p, 0, 1)
    if sampling.top_p == 0:
        raise RequestError("top_p=0 leaves no token. Allowed: above 0, up to 1.", param="top_p")
    _check_range("top_k", sampling.top_k, 0, vocab_size)
    _check_range(
        "repetition_penalty",
        sampling.repetition_penalty,
        protocol.MIN_REPETITION_PENALTY,
        protocol.MAX_REPETITION_PENALTY,
    )
    for name in ("presence_penalty", "frequency_penalty"):
        limit = protocol.MAX_PRESENCE_FREQUENCY
        _check_range(name, getattr(sampling, name), -limit, limit)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(sampling, name) is not None:
            _check_range(name, getattr(sampling, name), 0, protocol.MAX_TOP_LOGPROBS)
    if sampling.seed is not None:
        _check_range("seed", sampling.seed, protocol.INT64_MIN, protocol.INT64_MAX)
    if sampling.max_tokens < 1:
        raise RequestError(f"max_tokens={sampling.max_tokens} is out of range. Allowed: 1 or more.", param="max_tokens")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise RequestError(
            f"min_tokens={sampling.min_tokens} is out of range. Allowed: 0 to max_tokens={sampling.max_tokens}.",
            param="min_tokens",
        )
    _check_logit_bias(sampling.logit_bias, vocab_size)
    _check_banned_ids(sampling.banned_ids, vocab_size)


def _check_logit_bias(bias: dict[int, float], vocab_size: int) -> None:
    if len(bias) > protocol.MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(bias)} entries. Allowed: up to {protocol.MAX_LOGIT_BIAS}.", param="logit_bias"
        )
    for token_id, value in bias.items():
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"logit_bias names token id {token_id}. Allowed: 0 to {vocab_size - 1}.", param="logit_bias"
            )
        limit = protocol.MAX_LOGIT_BIAS_VALUE
        if not -limit <= value <= limit:  # NaN fails too
            raise RequestError(
                f"logit_bias[{token_id}]={value} is out of range. Allowed: {-limit:g} to {limit:g}.",
                param="logit_bias",
            )


def _check_banned_ids(banned_ids: tuple[int, ...], vocab_size: int) -> None:
    if len(banned_ids) > protocol.MAX_BANNED_IDS:
        raise RequestError(
            f"banned_ids has {len(banned_ids)} entries. Allowed: at most {protocol.MAX_BANNED_IDS}.", param="banned_ids"
        )
    for token_id in banned_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"banned_ids holds token id {token_id}. Allowed: 0 to {vocab_size - 1}.", param="banned_ids"
            )


def _check_grammar(grammar: GrammarSpec, num_ids: int) -> None:
    try:
        num_bytes = len(grammar.text.encode("utf-8"))
    except UnicodeEncodeError:
        raise RequestError("The grammar holds a lone surrogate. Send whole characters.", param="grammar") from None
    if not 0 < num_bytes <= protocol.MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"The grammar has {num_bytes} bytes. Allowed: 1 to {protocol.MAX_GRAMMAR_BYTES}. Send fewer or smaller "
            "schemas.",
            param="grammar",
        )
    if grammar.trigger_id is not None and not 0 <= grammar.trigger_id < num_ids:
        raise RequestError(
            f"The grammar's trigger_id={grammar.trigger_id} is out of range. Allowed: 0 to {num_ids - 1}.",
            param="grammar",
        )


def _check_prompt(prompt_ids: list[int], num_ids: int) -> None:
    if not prompt_ids:
        raise RequestError("The prompt is empty. Give at least one token.", param="prompt")
    lowest, highest = min(prompt_ids), max(prompt_ids)
    if lowest < 0 or highest >= num_ids:
        wrong = lowest if lowest < 0 else highest
        raise RequestError(f"The prompt holds token id {wrong}. Allowed: 0 to {num_ids - 1}.", param="prompt")


def _check_context(num_prompt: int, max_tokens: int, max_model_len: int, num_cache_tokens: int) -> None:
    left = max_model_len - num_prompt
    if left < 1:
        raise RequestError(
            f"The prompt has {num_prompt} tokens and leaves no room to answer in the context of {max_model_len}. "
            "Shorten the prompt.",
            param="messages",
            code="context_length_exceeded",
        )
    if max_tokens > left:
        raise RequestError(
            f"max_tokens={max_tokens} exceeds the {left} left after a {num_prompt}-token prompt "
            f"(context {max_model_len}). Lower max_tokens to {left} or less, or shorten the prompt.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if num_prompt + max_tokens - 1 > num_cache_tokens:  # the last id is never computed
        raise RequestError(
            f"{num_prompt} prompt tokens and max_tokens={max_tokens} need a cache of {num_prompt + max_tokens - 1} "
            f"tokens; this server's holds {num_cache_tokens}. Lower max_tokens, or serve with a larger cache.",
            param="max_tokens",
            code="context_length_exceeded",
        )
