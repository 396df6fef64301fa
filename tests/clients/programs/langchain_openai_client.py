"""`langchain-openai`: messages, bound tools, streaming, structured output."""

import asyncio
from typing import Annotated, Literal

import openai
from common import CITIES, FLAKY_URL, KEY, MODEL, QUESTION, SEEDS, V1, begin, did, raises, wait_for_running
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

begin("langchain-openai", "langchain-core", "openai")


class Place(BaseModel):
    """A place."""

    name: Annotated[str, Field(max_length=10)]
    is_high: bool


@tool
def weather(city: Literal["Bern", "Thun"], days: Literal[0, 1, 2, 3]) -> str:
    """Say how warm it is."""
    assert city in CITIES
    assert days in range(4)
    return "21 degrees"


def model(seed=1, **fields):
    fields = {"max_tokens": 600, "max_retries": 0, "base_url": V1, "api_key": KEY, **fields}
    return ChatOpenAI(model=fields.pop("model", MODEL), seed=seed, **fields)


pieces = list(model(max_tokens=24).stream(QUESTION))
assert "".join(piece.content for piece in pieces) == model(max_tokens=24).invoke(QUESTION).content
assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) <= 24
did("stream")

for seed in SEEDS:
    called = model(seed).bind_tools([weather], tool_choice="any").invoke(QUESTION)
    assert called.tool_calls
    assert not called.invalid_tool_calls
    if len(called.tool_calls) > 1:
        break
else:
    raise AssertionError("no seed gave two calls")
did(f"parallel calls: {len(called.tool_calls)}")

results = [weather.invoke(call) for call in called.tool_calls]
assert all(isinstance(result, ToolMessage) and result.content == "21 degrees" for result in results)
answer = (
    model(max_tokens=16).bind_tools([weather], tool_choice="none").invoke([HumanMessage(QUESTION), called, *results])
)
assert not answer.tool_calls
assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
did("results returned, earlier turns read from the cache")

merged = None
for piece in model(seed).bind_tools([weather], tool_choice="any").stream(QUESTION):
    merged = piece if merged is None else merged + piece
assert [call["args"] for call in merged.tool_calls] == [call["args"] for call in called.tool_calls]
did("calls streamed and merged")

for method in ("json_schema", "function_calling"):
    structured = model(2).with_structured_output(Place, method=method).invoke(QUESTION)
    assert isinstance(structured, Place), structured
did("structured output: json_schema and function_calling")

with raises(openai.NotFoundError, MODEL):
    model(model="no/model").invoke(QUESTION)
with raises(openai.AuthenticationError):
    model(api_key="wrong").invoke(QUESTION)
did("errors")

assert model(base_url=f"{FLAKY_URL}/langchain/v1", max_retries=1, max_tokens=4).invoke(QUESTION).response_metadata
did("retry after a 503")


async def cancel() -> None:
    stream = model(max_tokens=3000, extra_body={"ignore_eos": True}).astream(QUESTION)
    await anext(stream)
    await asyncio.to_thread(wait_for_running, 1)
    await stream.aclose()
    await asyncio.to_thread(wait_for_running, 0)


asyncio.run(cancel())
did("cancel")
print("passed")
