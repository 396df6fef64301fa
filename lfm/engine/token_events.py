"""What a step's answer is to those who wait for one sequence. No torch here."""

from lfm.engine.sequence import Sequence
from lfm.protocol import ErrorInfo, FinishReason, TokenEvent, TokenLogprob

NOT_FINITE = ErrorInfo(
    message="The model produced numbers that are not finite for this request. Nothing of it was cached; try again.",
    type="server_error",
    code="model_error",
)


def token_event(
    sequence: Sequence,
    token_ids: tuple[int, ...],
    logprobs: tuple[TokenLogprob, ...],
    *,
    finish_reason: FinishReason | None = None,
    error: ErrorInfo | None = None,
) -> TokenEvent:
    """New ids that the sequence has taken in already; with the first ones, what its prompt was found to be."""
    is_first = bool(token_ids) and sequence.num_outputs == len(token_ids)
    wants_prompt = is_first and sequence.request.sampling.prompt_logprobs is not None
    return TokenEvent(
        request_id=sequence.id,
        token_ids=list(token_ids),
        logprobs=list(logprobs),
        prompt_logprobs=sequence.prompt_logprobs if wants_prompt else None,
        num_cached_tokens=sequence.num_cached if is_first else None,
        finish_reason=finish_reason,
        error=error,
    )
