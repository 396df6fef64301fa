"""POST .../render of every API family: the prompt that such a request makes, as text and ids. Nothing is generated.

A request passes the same checks as the real one, the engine's included; only a full queue cannot refuse it.
"""

from typing import Generic

import msgspec
from starlette.types import Receive, Scope, Send

from lfm.server.admission import check_requests, shown_prompt
from lfm.server.asgi import read_json_object, send_json
from lfm.server.endpoint import Call, Family, R, plan_request
from lfm.server.refusals import as_warnings
from lfm.server.state import AppState, record_of


class Render(Generic[R]):
    """An ASGI app for one family."""

    def __init__(self, family: Family[R], state: AppState) -> None:
        self._family = family
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, family = self._state, self._family
        state.check_ready()
        body = await read_json_object(scope, receive, stalled_s=state.config.stalled_reader_seconds)
        call = Call(state=state, num_bytes=body.num_bytes, owner=record_of(scope).owner)
        plan = await plan_request(family, body.value, call=call)
        firsts = plan.engine_requests[:: plan.num_choices]
        check_requests(firsts, plan.request, prompt_field=family.prompt_field, state=state)
        sampling = {**msgspec.structs.asdict(firsts[0].sampling), "seed": plan.request.seed}
        answer = {
            "object": "rendered_prompt",
            "model": state.model_name,
            "n": plan.num_choices,
            "prompts": [
                {
                    "text": shown_prompt(request.prompt_ids, state.tokenizer),
                    "token_ids": request.prompt_ids,
                    "num_tokens": len(request.prompt_ids),
                }
                for request in firsts
            ],
            "sampling": msgspec.to_builtins(sampling, str_keys=True),
            "stop": list(plan.request.stop_strings),
            "warnings": as_warnings(family.rules.warnings(body.value) + plan.prepared.warnings),
        }
        await send_json(send, answer)
