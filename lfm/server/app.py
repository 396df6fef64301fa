"""The application: which path leads where, and the order of what stands in front of every route.

RequestContext      request id, every exception's answer, access log, metrics
  Guard             header size, Host and Origin, API key
    routes
"""

from typing import Never

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lfm.chat.defaults import SamplingDefaults
from lfm.chat.tokenizer import Tokenizer
from lfm.config import ModelConfig, ServerConfig
from lfm.engine.client import EngineBackend
from lfm.server.chat import Chat
from lfm.server.completions import Completions
from lfm.server.context import RequestContext
from lfm.server.endpoint import Family, GenerationEndpoint, R
from lfm.server.errors import from_http_exception
from lfm.server.grammars import Grammars, Trial
from lfm.server.guard import Guard
from lfm.server.health import Liveness, Readiness
from lfm.server.messages import Messages, TokenCount
from lfm.server.metrics import Metrics, MetricsPage
from lfm.server.models import ModelDetail, ModelList, ProjectModels, SupportedModels
from lfm.server.openapi import OpenApi
from lfm.server.render import Render
from lfm.server.responses import InputItemList, Responses, StoredResponses
from lfm.server.search import Search
from lfm.server.search_service import SearchService
from lfm.server.state import AppState, record_of
from lfm.server.tokenize import Detokenize, Tokenize
from lfm.service.data_folder import data_folder
from lfm.service.responses_store import ResponsesStore

# Users give a base URL with /v1 to clients that add it themselves, and one without it to clients that do not.
V1_PREFIXES = ("/v1", "/v1/v1", "")
V2_PREFIXES = ("/v2", "/v1/v2")


def create_app(
    *,
    backend: EngineBackend,
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    model_name: str,
    defaults: SamplingDefaults,
    config: ServerConfig,
    worker: int = 0,
    responses: ResponsesStore | None = None,
    grammar_trial: Trial | None = None,
    search: SearchService | None = None,
) -> Starlette:
    """Make the ASGI app of one API process; its `AppState` is `app.state.lfm`.

    Args:
        model_name: the name that requests must use (`ServerConfig.served_model_name`, else the model source's name).
        worker: number of this API process, for the metrics' label.
        responses: where responses are stored; by default in the user's data folder.
        grammar_trial: what tries clients' grammars; by default a process, started when it is first needed.
        search: what searches; by default a local index that is not there.
    """
    search = search or SearchService()
    state = AppState(
        backend=backend,
        tokenizer=tokenizer,
        model_config=model_config,
        model_name=model_name,
        defaults=defaults,
        config=config,
        metrics=Metrics(backend, model_name=model_name, worker=worker, searches=search.outcomes),
        responses=responses or ResponsesStore(data_folder() / "responses.sqlite3"),
        grammars=Grammars(backend, tokenizer, trial=grammar_trial),
        search=search,
    )
    app = Starlette(
        routes=_routes(state),
        middleware=[Middleware(RequestContext, state=state), Middleware(Guard, config=config)],
        exception_handlers={HTTPException: _raise_ours},
    )
    app.router.redirect_slashes = False  # a redirect would be built from the client's Host header
    app.state.lfm = state
    return app


def _routes(state: AppState) -> list[Route]:
    routes = [
        _route("GET", "/livez", Liveness()),
        _route("GET", "/readyz", Readiness(state)),
        _route("GET", "/health", Readiness(state)),
        _route("GET", "/metrics", MetricsPage(state.metrics)),
        _route("GET", "/openapi.json", OpenApi(state)),
    ]
    for prefix in V1_PREFIXES:
        routes += [
            *_generation_routes(f"{prefix}/chat/completions", Chat(), state),
            *_generation_routes(f"{prefix}/completions", Completions(), state),
            *_generation_routes(f"{prefix}/responses", Responses(), state),
            *_generation_routes(f"{prefix}/messages", Messages(), state),
            _route("GET DELETE", f"{prefix}/responses/{{response_id}}", StoredResponses(state)),
            _route("GET", f"{prefix}/responses/{{response_id}}/input_items", InputItemList(state)),
            _route("POST", f"{prefix}/messages/count_tokens", TokenCount(state)),
            _route("POST", f"{prefix}/search", Search(state)),
            _route("POST", f"{prefix}/tokenize", Tokenize(state)),
            _route("POST", f"{prefix}/detokenize", Detokenize(state)),
            _route("GET", f"{prefix}/models", ModelList(state)),
            _route("GET", f"{prefix}/models/{{model:path}}", ModelDetail(state)),
        ]
    for prefix in V2_PREFIXES:
        routes += [
            _route("GET", f"{prefix}/supported-models", SupportedModels(state)),
            _route("GET", f"{prefix}/projects/{{project}}/models", ProjectModels()),
        ]
    return routes


def _generation_routes(path: str, family: Family[R], state: AppState) -> list[Route]:
    return [
        _route("POST", path, GenerationEndpoint(family, state)),
        _route("POST", f"{path}/render", Render(family, state)),
    ]


def _route(methods: str, path: str, endpoint: ASGIApp) -> Route:
    return Route(path, _Named(path, endpoint), methods=methods.split())


class _Named:
    """Tells the request's record which route it took; logs and metrics never show a path that a client made up."""

    def __init__(self, path: str, endpoint: ASGIApp) -> None:
        self._path = path
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record_of(scope).route = self._path
        await self._endpoint(scope, receive, send)


async def _raise_ours(request: Request, error: Exception) -> Never:
    """The router's 404 and 405 in our own words; `RequestContext` answers them."""
    assert isinstance(error, HTTPException)
    raise from_http_exception(error, request.scope["path"])
