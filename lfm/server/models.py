"""GET /v1/models and what Together's SDK calls instead: one model, told in each vendor's shape.

The default sampling stands in the item, since it is the model's own and not OpenAI's.
"""

from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from lfm.errors import OverloadedError
from lfm.server.admission import check_model
from lfm.server.asgi import send_json
from lfm.server.dialect import is_together
from lfm.server.state import AppState

Json = dict[str, object]


class ModelList:
    """OpenAI's list object; Together's clients get a bare array."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        items = [model_item(self._state)]
        await send_json(send, items if is_together(Headers(scope=scope)) else {"object": "list", "data": items})


class ModelDetail:
    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_model(scope["path_params"]["model"], self._state.model_name)
        await send_json(send, model_item(self._state))


class SupportedModels:
    """GET /v2/supported-models of Together's API."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, {"data": [supported_model_item(self._state)], "next_cursor": None})


class ProjectModels:
    """GET /v2/projects/{id}/models of Together's API: the models that a project uploaded, so: none."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, {"data": [], "next_cursor": None})


def model_item(state: AppState) -> Json:
    """OpenAI's fields and Together's in one object."""
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": _organization(state.model_name),
        "type": "chat",
        "display_name": state.model_name,
        "organization": _organization(state.model_name),
        "context_length": context_length(state),
        "pricing": {"hourly": 0, "input": 0, "output": 0, "base": 0, "finetune": 0},
        "default_sampling": state.defaults.as_dict(),
        "default_sampling_origin": state.defaults.origin,
    }


def supported_model_item(state: AppState) -> Json:
    created = datetime.fromtimestamp(state.created, UTC).isoformat()
    return {
        "id": state.model_name,
        "name": state.model_name,
        "displayName": state.model_name,
        "displayType": "chat",
        "publisher": _organization(state.model_name),
        "architecture": state.model_config.model_type,
        "contextLength": str(context_length(state)),
        "products": ["PRODUCT_SERVERLESS"],
        "capabilities": ["CAPABILITY_CHAT"],
        "features": [],
        "inputModalities": ["MODALITY_TEXT"],
        "outputModalities": ["MODALITY_TEXT"],
        "status": "SUPPORTED_MODEL_STATUS_SUPPORTED",
        "pricing": {"input": 0, "output": 0, "cachedInput": 0},
        "baseModel": "",
        "baseModelId": "",
        "deploymentProfiles": [],
        "createdAt": created,
        "updatedAt": created,
    }


def context_length(state: AppState) -> int:
    """The limit of the running engine; while it loads, that of the checkpoint."""
    try:
        return state.backend.info.max_model_len
    except OverloadedError:
        return state.model_config.max_position_embeddings


def _organization(model_name: str) -> str:
    return model_name.partition("/")[0] if "/" in model_name else "lfm"
