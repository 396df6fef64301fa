"""GET /livez, /readyz, /health: the only paths that need no key.

Alive: the event loop answers. Ready: the model is loaded, steps make progress, and nothing drains.
"""

from starlette.types import Receive, Scope, Send

from lfm.server.asgi import send_json
from lfm.server.state import AppState


class Liveness:
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, {"status": "ok"})


class Readiness:
    def __init__(self, state: AppState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._state.check_ready()  # raises the 503 that says why
        await send_json(send, {"status": "ok"})
