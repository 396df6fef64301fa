"""POST /v1/completions: the caller writes the whole prompt, control tokens included, as text or as ids."""

from collections.abc import Sequence
from functools import partial

from lfm.chat.output import Delta, TokenScore
from lfm.chat.tokenizer import Tokenizer
from lfm.server.admission import check_prompt_size, check_text_size, in_thread_if_long, shown_prompt
from lfm.server.answer import AnswerHead, ChunkShape, Json, Usage, chat_usage
from lfm.server.constraints import check_grammar, read_rules
from lfm.server.endpoint import Call, Prepared
from lfm.server.generation import Choice
from lfm.server.logprobs import completion_logprobs, token_arrays
from lfm.server.refusals import COMPLETION_RULES
from lfm.server.schemas import CompletionRequest


class Completions:
    """The family of text completions."""

    request_type = CompletionRequest
    id_prefix = "cmpl-"
    prompt_field = "prompt"
    rules = COMPLETION_RULES

    async def prepare(self, request: CompletionRequest, *, call: Call) -> Prepared:
        tokenizer = call.state.tokenizer
        for prompt in request.prompt:
            check_size = check_text_size if isinstance(prompt, str) else check_prompt_size
            check_size(len(prompt), call.state, param="prompt")
        encode = partial(_encode_all, tokenizer, request.prompt)
        prompts = await in_thread_if_long(encode, num_bytes=call.num_bytes)
        echoed = []
        if request.echo:
            for given, prompt_ids in zip(request.prompt, prompts, strict=True):
                echoed.append(given if isinstance(given, str) else shown_prompt(prompt_ids, tokenizer))
        rules = await read_rules((), request.output_fields, state=call.state)
        await check_grammar(rules, state=call.state, tenant=call.owner)
        shape = partial(CompletionShape, echoed=echoed, special_ids=tokenizer.special_ids)
        return Prepared(prompts, shape, list(rules.notes), rules)


def _encode_all(tokenizer: Tokenizer, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append(tokenizer.encode_raw(prompt, param="prompt"))
        else:
            tokenizer.check_ids(prompt, param="prompt")
            encoded.append(prompt)
    return encoded


class CompletionShape(ChunkShape):
    """The JSON of one completions answer. `echoed` has the text of each prompt, or nothing."""

    def __init__(self, head: AnswerHead, *, echoed: Sequence[str], special_ids: frozenset[int]) -> None:
        super().__init__(head)
        self._echoed = echoed
        self._special_ids = special_ids
        self._text_offsets: dict[int, int] = {}  # characters sent so far, by choice that had a chunk

    def opening(self, choices: Sequence[Choice]) -> list[Json]:
        return []

    def chunk(self, choice: Choice, delta: Delta, usage: Json | None) -> Json:
        has_begun = bool(self._text_offsets)
        chunk = self._head.fields(self._chunk_kind)
        chunk["choices"] = [self._choice(choice, delta)]
        if self._head.for_together:
            chunk |= self._together_fields(choice, delta)
        if self._head.has_usage_field:
            chunk["usage"] = usage
        return chunk if has_begun else chunk | self._extras([(choice, delta)])

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._head.fields(self._chunk_kind), "choices": [], "usage": usage}

    async def body(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Json:
        return {
            **self._head.fields("text.completion" if self._head.for_together else "text_completion"),
            "choices": [self._choice(choice, delta) for choice, delta in choices],
            "usage": chat_usage(usage),
            "prompt": [],
            **self._extras(choices[:: self._head.n]),
        }

    @property
    def _chunk_kind(self) -> str:
        return "completion.chunk" if self._head.for_together else "text_completion"

    def _choice(self, choice: Choice, delta: Delta) -> Json:
        text, scores, hides_first = delta.text, delta.logprobs, False
        if choice.index not in self._text_offsets and self._echoed and not self._head.for_together:
            echoed = self._echoed_text(choice)
            text, scores = echoed + text, (*(delta.prompt_logprobs or ()), *scores)
            hides_first = bool(delta.prompt_logprobs) and not echoed.startswith(scores[0].text)
        offset = self._text_offsets.get(choice.index, 0)
        self._text_offsets[choice.index] = offset + len(text)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": completion_logprobs(scores, text_offset=offset, hides_first=hides_first) if scores else None,
            "finish_reason": delta.finish_reason,
            "seed": choice.request.sampling.seed,
        }

    def _together_fields(self, choice: Choice, delta: Delta) -> Json:
        """Together repeats what the choice says at the top of the chunk, and names the newest token."""
        fields: Json = {"finish_reason": delta.finish_reason, "seed": choice.request.sampling.seed}
        if delta.token_ids:
            token_id = delta.token_ids[-1]
            logprob = delta.logprobs[-1].logprob if delta.logprobs else None
            is_special = token_id in self._special_ids
            fields["token"] = {"id": token_id, "text": delta.text, "logprob": logprob, "special": is_special}
        return fields

    def _extras(self, choices: Sequence[tuple[Choice, Delta]]) -> Json:
        """What stands once in an answer: in the body, or in the first chunk."""
        extras: Json = {"warnings": self._head.warnings} if self._head.warnings else {}
        if self._echoed:
            extras["prompt"] = [
                {"text": self._echoed_text(choice), "logprobs": _prompt_arrays(delta.prompt_logprobs)}
                for choice, delta in choices
            ]
        return extras

    def _echoed_text(self, choice: Choice) -> str:
        return self._echoed[choice.index // self._head.n]


def _prompt_arrays(scores: Sequence[TokenScore] | None) -> Json | None:
    return None if scores is None else token_arrays(scores)
