"""The watch for a client that leaves, for streamed and for single answers alike."""

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive, Scope

from lfm.server.errors import ClientLeft
from lfm.server.state import AppState, record_of


async def run_while_connected(
    work: Coroutine[None, None, None], *, scope: Scope, receive: Receive, state: AppState
) -> None:
    """Run `work` and cancel it as soon as the client leaves. The request's body was read before.

    Servers tell about a lost connection only through `receive`. Raises what `work` raises, ClientLeft, or
    OverloadedError if the time to drain ran out; `work` releases what it holds in its `finally`, awaited here.
    """
    record = record_of(scope)
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    state.works.add(task)
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if record.is_complete:  # that ends `receive`, too
            await asyncio.wait((task,))
        has_left = not task.done()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.wait((task, watcher))
        state.works.discard(task)
    if has_left:
        raise ClientLeft
    if task.cancelled():
        raise state.draining_error()
    task.result()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
