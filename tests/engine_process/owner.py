"""A process with a supervisor, for the tests that kill it, and one with a client only. Run by test_supervisor.py.

`owner` starts an engine, prints its pid and waits. `client DIRECTORY` opens two endless streams and prints a
line for each reading.
"""

import asyncio
import sys
from pathlib import Path

from lfm.engine.process import EngineClient
from tests.engine_process.fakes import WAIT
from tests.engine_process.support import request, supervised


async def own() -> None:
    async with supervised() as (supervisor, _):
        await supervisor.wait_ready()
        print(supervisor.engine_pid, flush=True)
        await asyncio.Event().wait()


async def use(directory: Path) -> None:
    async with EngineClient(directory) as client:
        await client.wait_ready()
        stream = await client.submit([request("child-0", max_tokens=90_000), request("child-1", kind=WAIT)])
        while True:
            events = await stream.next_events()
            print(len(events), events[-1].error.code if events[-1].error else "token", flush=True)


if __name__ == "__main__":
    asyncio.run(own() if sys.argv[1] == "owner" else use(Path(sys.argv[2])))
