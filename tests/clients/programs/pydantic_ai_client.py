"""`pydantic-ai`: an agent with tools, typed output and streams. It validates every response strictly."""

import asyncio
from typing import Annotated, Literal

from common import CITIES, FLAKY_URL, KEY, MODEL, QUESTION, SEEDS, V1, begin, did, raises, wait_for_running
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelResponse, ToolCallPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

begin("pydantic-ai-slim", "openai")
asked: list[str] = []


class Place(BaseModel):
    name: Annotated[str, Field(max_length=10)]
    is_high: bool


def weather(city: Literal["Bern", "Thun"], days: Literal[0, 1, 2, 3]) -> str:
    """Say how warm it is.

    Args:
        city: Where.
        days: From today.
    """
    assert city in CITIES
    assert days in range(4)
    asked.append(city)
    return "21 degrees"


def model(*, name=MODEL, url=V1, key=KEY, retries=0):
    client = AsyncOpenAI(base_url=url, api_key=key, max_retries=retries)
    return OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))


async def main() -> None:
    plain = Agent(model(), model_settings={"max_tokens": 24, "seed": 1})
    async with plain.run_stream(QUESTION) as run:
        pieces = [piece async for piece in run.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces) == (await plain.run(QUESTION)).output
    did("stream")

    # Output that only a tool can give: the model must call, either a tool or the output's own.
    for seed in SEEDS:
        asked.clear()
        agent = Agent(model(), tools=[weather], output_type=ToolOutput(Place), retries=20)
        result = await agent.run(QUESTION, model_settings={"max_tokens": 600, "seed": seed})
        assert isinstance(result.output, Place)
        responses = [message for message in result.all_messages() if isinstance(message, ModelResponse)]
        most = max(sum(isinstance(part, ToolCallPart) for part in response.parts) for response in responses)
        if most > 1 and asked and len(responses) > 1:
            break
    else:
        raise AssertionError("no seed gave two calls at once, and a turn that heard their results")
    did(f"parallel calls: {most}; results returned over {len(responses)} turns; typed output by a tool")

    native = Agent(model(), output_type=NativeOutput(Place))
    result = await native.run(QUESTION, model_settings={"max_tokens": 600, "seed": 2})
    assert isinstance(result.output, Place)
    async with native.run_stream(QUESTION, model_settings={"max_tokens": 600, "seed": 2}) as run:
        partial = [output async for output in run.stream_output(debounce_by=None)]
    assert partial[-1] == result.output
    did(f"structured output, whole and streamed in {len(partial)} parts")

    with raises(ModelHTTPError, "404"):
        await Agent(model(name="no/model")).run(QUESTION)
    with raises(ModelHTTPError, "401"):
        await Agent(model(key="wrong")).run(QUESTION)
    did("errors")

    flaky = Agent(model(url=f"{FLAKY_URL}/pydantic-ai/v1", retries=1), model_settings={"max_tokens": 8, "seed": 1})
    assert isinstance((await flaky.run(QUESTION)).output, str)
    did("retry after a 503")

    long = Agent(model(), model_settings={"max_tokens": 3000, "extra_body": {"ignore_eos": True}})
    task = asyncio.create_task(long.run(QUESTION))
    await asyncio.to_thread(wait_for_running, 1)
    task.cancel()
    with raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(wait_for_running, 0)
    did("cancel")


asyncio.run(main())
print("passed")
