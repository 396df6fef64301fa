"""The real engine with a tiny random model in the engine process: the same ids as in this process."""

import pytest

from lfm.config import EngineConfig
from lfm.engine.process import EngineClient
from lfm.engine.supervisor import EngineSupervisor
from lfm.errors import ModelError, RequestError
from lfm.protocol import EngineRequest, SamplingParams
from tests.engine_process.support import read_all, run

pytestmark = pytest.mark.slow

CONFIG = EngineConfig(
    model="random:tiny", device="cpu", dtype="float32", max_model_len=256, max_running=8, block_size=16, num_blocks=64
)


def a_request(name: str, *, length: int) -> EngineRequest:
    sampling = SamplingParams(max_tokens=12, temperature=0.8, top_k=50, seed=length)
    return EngineRequest(request_id=name, prompt_ids=[1, *(20 + i % 100 for i in range(length - 1))], sampling=sampling)


def ids_in_this_process(requests: list[EngineRequest]) -> dict[str, list[int]]:
    from lfm.engine.build import build_engine

    engine = build_engine(CONFIG, on_phase=lambda text: None)
    for request in requests:
        engine.add(request)
    ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        for event in engine.step():
            ids[event.request_id] += event.token_ids
    return ids


def test_the_engine_process_gives_the_ids_of_the_engine() -> None:
    requests = [a_request(f"r-{length}", length=length) for length in (1, 16, 17, 60)]

    async def scenario() -> None:
        phases: list[str] = []
        async with (
            EngineSupervisor(CONFIG, stuck_seconds=60.0, on_phase=phases.append) as supervisor,
            EngineClient(supervisor.directory) as client,
        ):
            info = await supervisor.wait_ready()
            assert info.max_model_len == 256
            assert phases
            await client.wait_ready()
            stream = await client.submit(requests)
            events = await read_all(stream)
            assert {name: event.token_ids for name, event in events.items()} == ids_in_this_process(requests)
            with pytest.raises(RequestError):
                await client.submit([a_request("too long", length=300)])
            assert client.stats().num_running == 0
            assert client.stats().generated_tokens >= 12

    run(scenario())


def test_a_model_that_cannot_be_loaded_is_reported_as_such(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("empty")

    async def scenario() -> None:
        config = EngineConfig(model=str(folder), device="cpu")
        async with EngineSupervisor(config, stuck_seconds=60.0) as supervisor:
            with pytest.raises(ModelError, match=r"config\.json"):
                await supervisor.wait_ready()

    run(scenario())
