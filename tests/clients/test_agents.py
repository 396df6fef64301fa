"""Our own agents against a served model: tools that are surely called, and the fan-out example."""

import asyncio
import json
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from examples.fan_out import INSTRUCTIONS, fan_out, report
from lfm.agent import Agent, Endpoint, Result, ToolReturned
from tests.clients.served import Served

pytestmark = pytest.mark.slow

NUM_AGENTS = 8


class Place(BaseModel):
    city: Literal["Bern", "Thun"]
    days: Annotated[int, Field(ge=0, le=9)]


def weather(place: Place, unit: Literal["C", "F"] = "C") -> dict[str, object]:
    """Say how warm it is.

    Args:
        place: Where, and in how many days.
        unit: Either unit.
    """
    return {"city": place.city, "days": place.days, "unit": unit}


def test_an_agent_calls_its_tools_and_hears_them(served: Served) -> None:
    async def scenario() -> list[object]:
        async with Endpoint(served.url, api_key=served.api_key) as endpoint:
            agent = Agent(
                endpoint, tools=[weather], tool_choice="required", options={"max_tokens": 400, "seed": 3}, max_steps=4
            )
            return [event async for event in agent.stream("How warm is it?")]

    events = asyncio.run(scenario())
    returned = [event for event in events if isinstance(event, ToolReturned)]
    assert returned
    assert not any(event.is_error for event in returned)
    assert all(json.loads(event.content)["city"] in ("Bern", "Thun") for event in returned)
    result = events[-1]
    assert isinstance(result, Result)
    assert result.num_steps > 1
    assert result.stop_reason in ("answer", "length")
    assert result.usage.num_cached_tokens > 0


def test_agents_with_one_system_prompt_share_it_in_the_cache(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    running = fan_out(served.url, num_agents=NUM_AGENTS, max_tokens=24, api_key=served.api_key)
    results, duration_s = asyncio.run(running)
    numbers = report(results, duration_s)
    assert numbers == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["agents"] == NUM_AGENTS
    assert numbers["steps"] >= NUM_AGENTS
    # All of the common part but its last block is computed once: the hits are at least the others' share of it.
    common = served.count_tokens(INSTRUCTIONS)
    assert numbers["cached_tokens"] >= (NUM_AGENTS - 1) * (common - 64)
