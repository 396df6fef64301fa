"""POST /v1/chat/completions: messages to a prompt, deltas to chat JSON."""

from collections.abc import Callable, Sequence
from functools import partial

from lfm.chat.call_parser_stream import CallDelta
from lfm.chat.output import Delta, TokenScore
from lfm.server.admission import shown_prompt
from lfm.server.answer import AnswerHead, ChunkShape, Json, Usage, chat_usage
from lfm.server.constraints import plan_turn, with_messages
from lfm.server.documents import ground
from lfm.server.endpoint import Call, Prepared
from lfm.server.generation import Choice
from lfm.server.logprobs import chat_logprobs, token_arrays
from lfm.server.past_searches import cite_past
from lfm.server.refusals import CHAT_RULES
from lfm.server.schemas import ChatRequest
from lfm.server.server_tools import ServerTools

Annotate = Callable[[str], list[Json]]


class Chat:
    """The family of chat completions."""

    request_type = ChatRequest
    id_prefix = "chatcmpl-"
    prompt_field = "messages"
    rules = CHAT_RULES

    async def prepare(self, request: ChatRequest, *, call: Call) -> Prepared:
        server_tools = ServerTools(request.search_tools, memory=call.state.search.memory)
        citations = server_tools.citations
        messages = call.state.search.memory.restored(request.messages, tenant=call.owner)
        if not request.documents:
            messages = cite_past(messages, citations)
        turn = await plan_turn(
            messages,
            request.output_fields,
            state=call.state,
            tenant=call.owner,
            num_bytes=call.num_bytes,
            param="messages",
        )
        if request.documents:  # their passages are the first to be numbered
            num_tokens = len(turn.prompt_ids)
            messages = await ground(request, messages, citations, num_prompt_tokens=num_tokens, state=call.state)
            messages = cite_past(messages, citations)
            turn = await with_messages(turn, messages, state=call.state, num_bytes=call.num_bytes, param="messages")
        has_sources = bool(request.documents or server_tools.may_cite)
        annotate = citations.in_chat if has_sources and turn.rules.answer is None else None  # JSON has brackets, too
        echoed = shown_prompt(turn.prompt_ids, call.state.tokenizer) if request.echo else None
        shape = partial(ChatShape, echoed=echoed, annotate=annotate)
        return Prepared.of_turn(turn, shape, server_tools=server_tools)


class ChatShape(ChunkShape):
    """The JSON of one chat answer. `echoed` is the prompt as the model saw it, control tokens shown.

    `annotate` says what a whole text cites, where it was to answer from sources.
    """

    def __init__(self, head: AnswerHead, *, echoed: str | None, annotate: Annotate | None = None) -> None:
        super().__init__(head)
        self._echoed = echoed
        self._has_begun = False
        self._annotate = annotate
        self._texts: dict[int, list[str]] = {}  # of choices that will be annotated

    def opening(self, choices: Sequence[Choice]) -> list[Json]:
        """OpenAI's clients get the roles in front: its stream helper wants the choices to appear in their order."""
        if self._head.for_together:
            return []
        return [self._chunk(self._chunk_choice(choice, Delta(), {"role": "assistant"}), None) for choice in choices]

    def chunk(self, choice: Choice, delta: Delta, usage: Json | None) -> Json:
        role = {"role": "assistant"} if self._head.for_together else {}
        chunk = self._chunk(self._chunk_choice(choice, delta, role), usage)
        if not self._has_begun:
            self._has_begun = True
            chunk |= self._extras(delta.prompt_logprobs)
        return chunk

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._head.fields("chat.completion.chunk"), "choices": [], "usage": usage}

    async def body(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Json:
        return {
            **self._head.fields("chat.completion"),
            "choices": [self._body_choice(choice, delta) for choice, delta in choices],
            "usage": chat_usage(usage),
            "prompt": [],
            **self._extras(choices[0][1].prompt_logprobs),
        }

    def _chunk(self, choice: Json, usage: Json | None) -> Json:
        chunk: Json = {**self._head.fields("chat.completion.chunk"), "choices": [choice]}
        if self._head.has_usage_field:
            chunk["usage"] = usage
        return chunk

    def _chunk_choice(self, choice: Choice, delta: Delta, role: dict[str, str]) -> Json:
        content: Json = {**role, "content": delta.text} if delta.text or not delta.calls else {**role}
        if delta.calls:
            content["tool_calls"] = [self._call_delta(piece) for piece in delta.calls]
        if self._head.for_together and delta.token_ids:
            content["token_id"] = delta.token_ids[-1]
        if self._annotate is not None:
            content |= self._annotated(choice, delta, self._annotate)
        return {
            "index": choice.index,
            "delta": content,
            "logprobs": chat_logprobs(delta.logprobs) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
            "seed": choice.request.sampling.seed,
        }

    def _call_delta(self, piece: CallDelta) -> Json:
        """OpenAI's stream helper joins the strings of all deltas, so ids and names come once, as in OpenAI's streams.

        Together's types have the id and the type in every delta.
        """
        is_first = piece.name is not None
        function: Json = {"name": piece.name} if is_first else {}
        call: Json = {"index": piece.index, "function": {**function, "arguments": piece.arguments}}
        return call | {"id": piece.id, "type": "function"} if is_first or self._head.for_together else call

    def _whole_call(self, call: CallDelta) -> Json:
        function = {"name": call.name, "arguments": call.arguments}
        whole: Json = {"id": call.id, "type": "function", "function": function}
        return whole | {"index": call.index} if self._head.for_together else whole

    def _annotated(self, choice: Choice, delta: Delta, annotate: Annotate) -> Json:
        """The annotations of a streamed text, all in its last chunk: that is when it is known what it says."""
        texts = self._texts.setdefault(choice.index, [])
        texts.append(delta.text)
        annotations = annotate("".join(texts)) if delta.finish_reason is not None else []
        return {"annotations": annotations} if annotations else {}

    def _body_choice(self, choice: Choice, delta: Delta) -> Json:
        content = delta.text if delta.text or not delta.calls else None
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if delta.calls:
            message["tool_calls"] = [self._whole_call(call) for call in delta.calls]
        if self._annotate is not None:
            message["annotations"] = self._annotate(delta.text)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None if choice.request.sampling.logprobs is None else chat_logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
            "seed": choice.request.sampling.seed,
        }

    def _extras(self, prompt_scores: Sequence[TokenScore] | None) -> Json:
        """What stands once in an answer: in the body, or in the first chunk."""
        extras: Json = {"warnings": self._head.warnings} if self._head.warnings else {}
        if self._echoed is not None:
            scores = None if prompt_scores is None else token_arrays(prompt_scores)
            extras["prompt"] = [{"text": self._echoed, "logprobs": scores}]
        return extras
