"""`openai-agents` with a chat completions model: an agent whose tool is a Python function."""

import asyncio
import dataclasses
from typing import Annotated, Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)  # fmt: skip
from common import CITIES, FLAKY_URL, KEY, MODEL, QUESTION, SEEDS, V1, begin, did, raises, wait_for_running  # fmt: skip
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel, Field

begin("openai-agents", "openai")
set_tracing_disabled(True)
asked: list[tuple[str, int]] = []


class Place(BaseModel):
    name: Annotated[str, Field(max_length=10)]
    is_high: bool


@function_tool
def weather(city: Literal["Bern", "Thun"], days: Literal[0, 1, 2, 3]) -> str:
    """Say how warm it is."""
    assert city in CITIES
    assert days in range(4)
    asked.append((city, days))
    return "21 degrees"


def agent(seed, *, url=V1, retries=0, family=OpenAIChatCompletionsModel, **fields):
    client = openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=retries)
    settings = ModelSettings(tool_choice="required", max_tokens=600, extra_body={"seed": seed}, include_usage=True)
    settings = dataclasses.replace(settings, **fields.pop("settings", {}))
    return Agent(name="a", instructions="Be brief.", model=family(MODEL, client), model_settings=settings, **fields)


async def main() -> None:
    for seed in SEEDS:
        asked.clear()
        result = await Runner.run(agent(seed, tools=[weather], tool_use_behavior="stop_on_first_tool"), QUESTION)
        assert asked
        assert result.final_output == "21 degrees"
        if len(asked) > 1:
            break
    else:
        raise AssertionError("no seed gave two calls")
    did(f"parallel calls: {len(asked)}")

    asked.clear()
    result = await Runner.run(agent(seed, tools=[weather], settings={"max_tokens": 200}), QUESTION, max_turns=30)
    assert asked
    assert isinstance(result.final_output, str)
    did(f"results returned to the model, {len(result.raw_responses)} turns to an answer")

    asked.clear()
    streamed = Runner.run_streamed(agent(seed, tools=[weather], settings={"max_tokens": 200}), QUESTION, max_turns=30)
    kinds = [event.type async for event in streamed.stream_events()]
    assert asked
    assert streamed.is_complete
    assert "run_item_stream_event" in kinds
    did(f"run streamed in {len(kinds)} events")

    model = agent(seed, family=OpenAIResponsesModel, tools=[weather], tool_use_behavior="stop_on_first_tool")
    assert (await Runner.run(model, QUESTION)).final_output == "21 degrees"
    did("the same over /v1/responses")

    parsed = await Runner.run(agent(1, output_type=Place, settings={"tool_choice": None}), QUESTION)
    assert isinstance(parsed.final_output, Place)
    did("structured output")

    plain = {"tool_choice": None, "max_tokens": 16}
    with raises(openai.AuthenticationError):
        wrong = agent(1, settings=plain)
        wrong.model = OpenAIChatCompletionsModel(MODEL, openai.AsyncOpenAI(base_url=V1, api_key="no", max_retries=0))
        await Runner.run(wrong, QUESTION)
    with raises(openai.NotFoundError, MODEL):
        lost = agent(1, settings=plain)
        lost.model = OpenAIChatCompletionsModel("no/model", openai.AsyncOpenAI(base_url=V1, api_key=KEY, max_retries=0))
        await Runner.run(lost, QUESTION)
    did("errors")

    flaky = agent(1, url=f"{FLAKY_URL}/openai-agents/v1", retries=1, settings=plain)
    assert isinstance((await Runner.run(flaky, QUESTION)).final_output, str)
    did("retry after a 503")

    long = agent(1, settings={"tool_choice": None, "max_tokens": 3000, "extra_body": {"ignore_eos": True}})
    running = Runner.run_streamed(long, QUESTION)
    async for event in running.stream_events():
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
            break
    wait_for_running(1)
    running.cancel()
    async for _ in running.stream_events():
        pass
    await asyncio.to_thread(wait_for_running, 0)
    did("cancel")


asyncio.run(main())
print("passed")
