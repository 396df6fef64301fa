"""POST /v1/responses, and what was stored of it: GET and DELETE /v1/responses/{id}, GET .../input_items."""

import re
from functools import partial

import orjson
from starlette.datastructures import QueryParams
from starlette.types import Receive, Scope, Send

from lfm.chat.messages import Message
from lfm.errors import NotFoundError, RequestError
from lfm.server.answer import Json
from lfm.server.asgi import send_bytes, send_json
from lfm.server.constraints import plan_turn
from lfm.server.endpoint import Call, Prepared
from lfm.server.past_searches import cite_past
from lfm.server.refusals import NO_REASONING, RESPONSES_RULES
from lfm.server.responses_input import Item, ResponsesRequest, to_messages
from lfm.server.responses_shape import ResponseShape
from lfm.server.schemas import shown
from lfm.server.server_tools import ServerTools
from lfm.server.state import AppState, record_of
from lfm.service.responses_store import StoredResponse

MAX_PAGE = 100
DEFAULT_PAGE = 20


class Responses:
    """The family of responses."""

    request_type = ResponsesRequest
    id_prefix = "resp_"
    prompt_field = "input"
    rules = RESPONSES_RULES

    async def prepare(self, request: ResponsesRequest, *, call: Call) -> Prepared:
        past = await _past_items(request, call=call)
        items = [*past, *request.input.items]
        server_tools = ServerTools(request.search_tools)
        messages = cite_past(to_messages(items), server_tools.citations)
        if request.instructions is not None:  # those of earlier responses are not carried over
            messages.insert(0, Message(role="system", content=request.instructions))
        num_bytes = call.num_bytes + sum(len(message.text) for message in messages)
        turn = await plan_turn(
            messages, request.output_fields, state=call.state, tenant=call.owner, num_bytes=num_bytes, param="input"
        )

        async def store(response: Json, found: Json) -> None:
            await call.state.responses.put(
                StoredResponse(
                    response_id=str(response["id"]),
                    owner=call.owner,
                    response=orjson.dumps(response),
                    conversation=orjson.dumps({"input": [item.value for item in items], "found": found}),
                )
            )

        has_reasoning = request.input.num_reasoning > 0
        warnings = [f"input[] of type reasoning has no effect: {NO_REASONING}."] if has_reasoning else []
        shape = partial(
            ResponseShape,
            request=request,
            store=store,
            call_start_id=call.state.tokenizer.special.tool_call_start,
            annotate=server_tools.citations.in_response
            if server_tools.may_cite and turn.rules.answer is None
            else None,
        )
        return Prepared.of_turn(turn, shape, warnings, server_tools)


async def _past_items(request: ResponsesRequest, *, call: Call) -> list[Item]:
    """Everything up to the previous response, itself included. Each response holds its whole past."""
    response_id = request.previous_response_id
    if response_id is None:
        return []
    stored = await call.state.responses.get(response_id, owner=call.owner)
    if stored is None:
        raise RequestError(
            f"previous_response_id={shown(response_id)} is not stored here. It may be older than a day, deleted, made "
            "with store=false or with another key. Send the whole conversation as input.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    conversation = orjson.loads(stored.conversation)
    found: dict[str, Json] = conversation["found"]  # by its searches, shown or not
    output = [item | found.get(item["id"], {}) for item in orjson.loads(stored.response)["output"]]
    # A call that max_tokens cut is no call that a result could answer.
    whole = [item for item in output if item["type"] != "function_call" or item["status"] == "completed"]
    return [Item(item, "previous_response_id") for item in [*conversation["input"], *whole]]


class StoredResponses:
    """GET and DELETE /v1/responses/{response_id}."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response_id: str = scope["path_params"]["response_id"]
        if scope["method"] == "DELETE":
            if not await self._state.responses.delete(response_id, owner=record_of(scope).owner):
                raise _not_found(response_id)
            await send_json(send, {"id": response_id, "object": "response", "deleted": True})
            return
        if QueryParams(scope["query_string"]).get("stream", "false") != "false":
            raise RequestError(
                "stream is not supported for stored responses. Leave it out.",
                param="stream",
                code="unsupported_parameter",
            )
        await send_bytes(send, (await _stored(response_id, scope, self._state)).response)


class InputItemList:
    """GET /v1/responses/{response_id}/input_items: what the response answered, newest first."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = QueryParams(scope["query_string"])
        limit, order, after = _page_size(query.get("limit")), query.get("order", "desc"), query.get("after")
        if order not in ("asc", "desc"):
            raise RequestError(f"order={shown(order)} is not known. Allowed: asc, desc.", param="order")
        stored = await _stored(scope["path_params"]["response_id"], scope, self._state)
        items: list[Json] = orjson.loads(stored.conversation)["input"]
        if order == "desc":
            items.reverse()
        start = _position_after(items, after)
        page = items[start : start + limit]
        body = {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + limit < len(items),
        }
        await send_json(send, body)


async def _stored(response_id: str, scope: Scope, state: AppState) -> StoredResponse:
    stored = await state.responses.get(response_id, owner=record_of(scope).owner)
    if stored is None:
        raise _not_found(response_id)
    return stored


def _not_found(response_id: str) -> NotFoundError:
    return NotFoundError(
        f"Response {shown(response_id)} is not stored here. It may be older than a day, deleted, made with store=false "
        "or with another key.",
        code="response_not_found",
    )


def _page_size(given: str | None) -> int:
    if given is None:
        return DEFAULT_PAGE
    if re.fullmatch(r"[0-9]{1,3}", given) and 1 <= int(given) <= MAX_PAGE:
        return int(given)
    raise RequestError(f"limit={shown(given)} is not valid. Allowed: 1 to {MAX_PAGE}.", param="limit")


def _position_after(items: list[Json], after: str | None) -> int:
    if after is None:
        return 0
    for position, item in enumerate(items):
        if item["id"] == after:
            return position + 1
    raise RequestError(f"after={shown(after)} is the id of no input item of this response.", param="after")
