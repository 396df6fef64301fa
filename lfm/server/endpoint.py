"""The path of one generation request, the same for every API family: read, validate, tokenize, submit, answer."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from lfm.chat.stop import StopStrings
from lfm.protocol import EngineRequest
from lfm.server.admission import check_model, make_requests, num_context_tokens, open_generation
from lfm.server.answer import AnswerHead, AnswerShape, send_events, send_whole
from lfm.server.asgi import JsonBody, read_json_object
from lfm.server.constraints import FREE, OutputRules, Turn
from lfm.server.dialect import is_together
from lfm.server.disconnect import run_while_connected
from lfm.server.generation import DeltaSource, Generation
from lfm.server.refusals import FieldRules, as_warnings
from lfm.server.schemas import SamplingRequest, parse_request
from lfm.server.server_tools import ServerTools
from lfm.server.server_tools_loop import ToolLoop
from lfm.server.state import AppState, RequestRecord, record_of

R = TypeVar("R", bound=SamplingRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request as a family sees it. `num_bytes` is the size of its body, `owner` a digest of its key."""

    state: AppState
    num_bytes: int
    owner: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a family makes of a request: the ids of each prompt, the form of the answer, and what it has to warn of.

    `rules` hold for the output of every prompt. `turn` is the conversation that the prompt was made of, if it was.
    `server_tools` are those of its tools that run here.
    """

    prompts: list[list[int]]
    shape: Callable[[AnswerHead], AnswerShape]
    warnings: list[str] = field(default_factory=list)
    rules: OutputRules = FREE
    turn: Turn | None = None
    server_tools: ServerTools | None = None

    @staticmethod
    def of_turn(
        turn: Turn,
        shape: Callable[[AnswerHead], AnswerShape],
        warnings: Sequence[str] = (),
        server_tools: ServerTools | None = None,
    ) -> "Prepared":
        """One turn of a conversation, with what its rules have to warn of."""
        return Prepared([turn.prompt_ids], shape, [*warnings, *turn.rules.notes], turn.rules, turn, server_tools)


class Family(Protocol[R]):
    """What tells the API families apart. `prompt_field` names the field that holds the prompt."""

    request_type: type[R]
    id_prefix: str
    prompt_field: str
    rules: FieldRules

    async def prepare(self, request: R, *, call: Call) -> Prepared:
        """Build the prompts. Raises RequestError for what no prompt can be built from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Generic[R]):
    """A request with everything that the engine needs; `num_choices` is that of each prompt."""

    request: R
    request_id: str
    prepared: Prepared
    stop: StopStrings
    engine_requests: list[EngineRequest]

    @property
    def num_choices(self) -> int:
        return len(self.engine_requests) // len(self.prepared.prompts)


async def plan_request(family: Family[R], body: dict[str, object], *, call: Call) -> Planned[R]:
    """Everything before the engine. Raises RequestError for whatever is wrong with the request."""
    request = parse_request(family.request_type, body)
    check_model(request.model, call.state.model_name)
    family.rules.refuse(body)
    request.check_combinations()
    stop = StopStrings(request.stop_strings, param=request.stop_field)
    prepared = await family.prepare(request, call=call)
    request_id = f"{family.id_prefix}{uuid.uuid4().hex}"
    return Planned(
        request=request,
        request_id=request_id,
        prepared=prepared,
        stop=stop,
        engine_requests=_engine_requests(request, prepared.prompts, prepared.rules, request_id=request_id, call=call),
    )


def _engine_requests(
    request: SamplingRequest, prompts: Sequence[list[int]], rules: OutputRules, *, request_id: str, call: Call
) -> list[EngineRequest]:
    call_start = call.state.tokenizer.special.tool_call_start
    return make_requests(
        request,
        prompts,
        request_id=request_id,
        tenant=call.owner,
        state=call.state,
        grammar=rules.grammar,
        banned_ids=() if call_start is None or not rules.bans_calls else (call_start,),
    )


def make_source(plan: Planned[R], *, param: str, call: Call, record: RequestRecord) -> DeltaSource:
    """Where the deltas of an answer come from. Nothing runs before its `open`. `param` is what holds the messages."""
    prepared = plan.prepared
    first = Generation(
        plan.engine_requests,
        stop=plan.stop,
        n=plan.num_choices,
        state=call.state,
        record=record,
        reads_calls=prepared.rules.reads_calls,
    )
    has_tools = prepared.server_tools is not None and prepared.server_tools.tools
    if prepared.server_tools is None or not has_tools or prepared.turn is None or not prepared.rules.reads_calls:
        return first
    return ToolLoop(
        first,
        turn=prepared.turn,
        server_tools=prepared.server_tools,
        generate=partial(_next_generation, plan, call=call, record=record),
        state=call.state,
        record=record,
        tenant=call.owner,
        param=param,
    )


def _next_generation(plan: Planned[R], turn: Turn, max_tokens: int, *, call: Call, record: RequestRecord) -> Generation:
    """A later turn of the same answer, sampled with the same seed."""
    requests = _engine_requests(
        plan.request, [turn.prompt_ids], turn.rules, request_id=f"{plan.request_id}-{len(turn.messages)}", call=call
    )
    left = max(1, num_context_tokens(call.state) - len(turn.prompt_ids))
    seed = plan.engine_requests[0].sampling.seed
    sampling = msgspec.structs.replace(requests[0].sampling, max_tokens=min(max_tokens, left), seed=seed)
    return Generation(
        [msgspec.structs.replace(requests[0], sampling=sampling)],
        stop=plan.stop,
        n=1,
        state=call.state,
        record=record,
        reads_calls=turn.rules.reads_calls,
    )


class GenerationEndpoint(Generic[R]):
    """An ASGI app for one family."""

    def __init__(self, family: Family[R], state: AppState) -> None:
        self._family = family
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._state.check_ready()
        body = await read_json_object(scope, receive, stalled_s=self._state.config.stalled_reader_seconds)
        await run_while_connected(self._answer(body, scope, send), scope=scope, receive=receive, state=self._state)

    async def _answer(self, body: JsonBody, scope: Scope, send: Send) -> None:
        family, state, record = self._family, self._state, record_of(scope)
        call = Call(state=state, num_bytes=body.num_bytes, owner=record.owner)
        plan = await plan_request(family, body.value, call=call)
        source = make_source(plan, param=family.prompt_field, call=call, record=record)
        head = AnswerHead(
            request_id=plan.request_id,
            created=int(time.time()),
            model=state.model_name,
            n=plan.num_choices,
            warnings=as_warnings(family.rules.warnings(body.value) + plan.prepared.warnings),
            for_together=is_together(Headers(scope=scope)),
            includes_usage=plan.request.includes_usage,
            runs_usage=plan.request.runs_usage,
        )
        shape = plan.prepared.shape(head)
        try:
            await open_generation(source, plan.request, prompt_field=family.prompt_field)
            if plan.request.stream:
                await send_events(send, source, shape, record=record, keepalive_s=state.config.keepalive_seconds)
            else:
                await send_whole(send, source, shape)
        finally:
            await source.aclose()
