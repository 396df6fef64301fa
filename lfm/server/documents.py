"""`documents` of a chat request: which of their passages go into the prompt, and what an answer says of them.

The passages stand in the system turn, in front of the conversation, in the order of the request: questions about the
same documents share that prefix, and the engine finds it in its cache.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from lfm.chat.messages import Message
from lfm.chat.tokenizer import Tokenizer
from lfm.errors import RequestError
from lfm.search.packing import CONTEXT_TOKENS, Passage, SourceDocument, pack
from lfm.search.sources import CITE_INSTRUCTION, grounded
from lfm.server.schemas import ChatRequest
from lfm.server.search_annotations import Citations, Cited
from lfm.server.state import AppState

DEFAULT_TOKENS = CONTEXT_TOKENS["high"]
_ANSWER_TOKENS = 1_024  # left for an answer whose length the request does not limit
_MIN_TOKENS = 64  # less than the smallest passage with its fence


async def ground(
    request: ChatRequest, messages: Sequence[Message], citations: Citations, *, num_prompt_tokens: int, state: AppState
) -> list[Message]:
    """`messages` with the passages that fit and matter to the newest question; what can be cited goes to `citations`.

    `num_prompt_tokens` is the length of the conversation without documents. Raises RequestError if the documents hold
    text and none of it fits.
    """
    documents = request.documents
    budget_tokens = document_budget(
        request.max_document_tokens,
        num_prompt_tokens=num_prompt_tokens,
        token_limit=None if request.is_clamped else request.token_limit,
        max_model_len=state.backend.info.max_model_len,
    )
    async with state.packing:
        passages = await asyncio.to_thread(_pack, documents, _question(messages), state.tokenizer, budget_tokens)
    if not passages:
        if any(document.text.strip() for document in documents):
            raise RequestError(
                f"documents do not fit: the conversation and its answer leave them {max(0, budget_tokens)} tokens. "
                "Send a shorter conversation or a smaller max_tokens.",
                param="documents",
                code="context_length_exceeded",
            )
        return list(messages)
    for passage in passages:
        citations.add(_cited(passage, documents))
    text = grounded([passage.source for passage in passages])
    first = messages[0] if messages and messages[0].role in ("system", "developer") else None
    if first is None:
        return [Message(role="system", content=text), *messages]
    # The model was trained on one system turn, so theirs and ours are one.
    joined = replace(first, content=f"{first.text}\n\n{text}" if first.text else text)
    return [joined, *messages[1:]]


def document_budget(
    asked_tokens: int | None, *, num_prompt_tokens: int, token_limit: int | None, max_model_len: int
) -> int:
    """The tokens that passages may take: what was asked for or DEFAULT_TOKENS, and no more than is left.

    Args:
        num_prompt_tokens: of the conversation without documents.
        token_limit: of the answer, which must fit too; None: some room is kept for it.
    """
    left = max_model_len - num_prompt_tokens - _MIN_TOKENS
    kept = min(_ANSWER_TOKENS, left // 2) if token_limit is None else token_limit
    return min(DEFAULT_TOKENS if asked_tokens is None else asked_tokens, left - kept)


def _pack(
    documents: Sequence[SourceDocument], question: str, tokenizer: Tokenizer, budget_tokens: int
) -> list[Passage]:
    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    budget = budget_tokens - count_tokens(CITE_INSTRUCTION)
    return pack(documents, question, budget_tokens=budget, count_tokens=count_tokens) if budget > 0 else []


def _question(messages: Sequence[Message]) -> str:
    return next((message.text for message in reversed(messages) if message.role == "user"), "")


def _cited(passage: Passage, documents: Sequence[SourceDocument]) -> Cited:
    document = documents[passage.document]
    return Cited(
        source=replace(passage.source, url=document.url or f"document:{passage.document}"),
        document=passage.document,
        offset=passage.start,
    )
