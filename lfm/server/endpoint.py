"""The path of one generation request, the same for every API family: read, validate, tokenize, submit, answer."""

import time
import uuid
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from lfm.chat.stop import StopStrings
from lfm.server.admission import check_model, make_requests, open_generation
from lfm.server.answer import AnswerHead, AnswerShape, send_events, send_whole
from lfm.server.asgi import JsonBody, read_json_object
from lfm.server.dialect import is_together
from lfm.server.disconnect import run_while_connected
from lfm.server.generation import Generation
from lfm.server.refusals import refuse_unsupported, warnings_for
from lfm.server.schemas import GenerationRequest, parse_request
from lfm.server.state import AppState, record_of

R = TypeVar("R", bound=GenerationRequest)


class Family(Protocol[R]):
    """What tells chat from completions. `prompt_field` names the field that holds the prompt."""

    request_type: type[R]
    id_prefix: str
    prompt_field: str

    async def prompts(self, request: R, *, state: AppState, num_bytes: int) -> list[list[int]]:
        """The ids of each prompt of a body of `num_bytes`. Raises RequestError for what no prompt can be built from."""

    def shape(self, request: R, prompts: Sequence[list[int]], *, head: AnswerHead, state: AppState) -> AnswerShape:
        """The JSON of the answer."""


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
        request = parse_request(family.request_type, body.value)
        check_model(request.model, state.model_name)
        refuse_unsupported(body.value)
        request.check_combinations()
        stop = StopStrings(request.stop or ())
        prompts = await family.prompts(request, state=state, num_bytes=body.num_bytes)
        request_id = f"{family.id_prefix}-{uuid.uuid4().hex}"
        engine_requests = make_requests(request, prompts, request_id=request_id, state=state)
        n = len(engine_requests) // len(prompts)
        generation = Generation(engine_requests, stop=stop, n=n, state=state, record=record)
        head = AnswerHead(
            request_id=request_id,
            created=int(time.time()),
            model=state.model_name,
            n=n,
            warnings=warnings_for(body.value),
            for_together=is_together(Headers(scope=scope)),
            includes_usage=request.includes_usage,
        )
        shape = family.shape(request, prompts, head=head, state=state)
        try:
            await open_generation(generation, request, prompt_field=family.prompt_field)
            if request.stream:
                keepalive_s = state.config.keepalive_seconds
                await send_events(send, generation, shape, head=head, record=record, keepalive_s=keepalive_s)
            else:
                await send_whole(send, generation, shape)
        finally:
            await generation.aclose()
