"""Log-probabilities in the shapes of both vendors, in one object: OpenAI's `content`, Together's parallel arrays."""

from collections.abc import Sequence

from lfm.chat.output import TokenScore

Json = dict[str, object]


def chat_logprobs(scores: Sequence[TokenScore]) -> Json:
    """Both SDKs read their own keys and ignore the other's."""
    return {"content": logprob_entries(scores), "refusal": None, **token_arrays(scores)}


def completion_logprobs(scores: Sequence[TokenScore], *, text_offset: int, hides_first: bool) -> Json:
    """OpenAI's completions have the parallel arrays, too, and the offset of each token in the text.

    `hides_first`: the first token (a BOS that the server put in front) is no part of the text.
    """
    offsets = []
    for index, score in enumerate(scores):
        offsets.append(text_offset)
        text_offset += 0 if hides_first and index == 0 else len(score.text)
    return {**token_arrays(scores), "text_offset": offsets}


def token_arrays(scores: Sequence[TokenScore]) -> Json:
    return {
        "tokens": [score.text for score in scores],
        "token_ids": [score.token_id for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_alternatives(score) for score in scores],
    }


def _alternatives(score: TokenScore) -> dict[str, float | None] | None:
    """Text to logprob; of two tokens that read the same (parts of characters) the likelier stays. None: no logprob."""
    if score.logprob is None:
        return None
    alternatives: dict[str, float | None] = {}
    for top in score.top:  # in falling order
        alternatives.setdefault(top.text, top.logprob)
    return alternatives


def logprob_entries(scores: Sequence[TokenScore]) -> list[Json]:
    """One object per token, as OpenAI's chat and responses have it."""
    return [
        {
            "token": score.text,
            "logprob": score.logprob,
            "bytes": score.bytes,
            "top_logprobs": [{"token": top.text, "logprob": top.logprob, "bytes": top.bytes} for top in score.top],
        }
        for score in scores
    ]
