"""`litellm`: the providers `openai/`, `together_ai/` and `anthropic/` pointed at our server."""

import asyncio
import json

import litellm
from common import (
    FLAKY_URL,
    KEY,
    MODEL,
    QUESTION,
    SEEDS,
    TOOL,
    URL,
    V1,
    begin,
    check_arguments,
    did,
    raises,
    wait_for_running,
)  # fmt: skip
from pydantic import BaseModel

begin("litellm", "openai")
litellm.telemetry = False
litellm.suppress_debug_info = True
messages = [{"role": "user", "content": QUESTION}]
PLACES = {"openai": V1, "together_ai": V1, "anthropic": URL}


class Place(BaseModel):
    name: str
    is_high: bool


def ask(provider="openai", *, model=MODEL, **fields):
    fields = {"api_base": PLACES[provider], "api_key": KEY, "max_tokens": 600, "num_retries": 0, **fields}
    fields = {"messages": messages, **fields}
    return litellm.completion(model=f"{provider}/{model}", **fields)


for provider in PLACES:
    seeded = {} if provider == "anthropic" else {"seed": 1}
    chunks = list(ask(provider, max_tokens=24, stream=True, stream_options={"include_usage": True}, **seeded))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    if seeded:
        assert text == ask(provider, max_tokens=24, **seeded).choices[0].message.content
    assert litellm.stream_chunk_builder(chunks, messages=messages).usage.completion_tokens <= 24
    did(f"{provider}: stream")

    for seed in SEEDS:
        seeded = {} if provider == "anthropic" else {"seed": seed}
        called = ask(provider, tools=[TOOL], tool_choice="required", **seeded).choices[0]
        assert called.finish_reason == "tool_calls", called
        calls = called.message.tool_calls
        for call in calls:
            check_arguments(json.loads(call.function.arguments))
        if len(calls) > 1:
            break
    else:
        raise AssertionError("no seed gave two calls")
    results = [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in calls]
    history = [*messages, called.message, *results]
    last = ask(provider, messages=history, tools=[TOOL], tool_choice="none", max_tokens=8)
    assert last.choices[0].finish_reason in ("stop", "length")
    assert last.usage.prompt_tokens_details.cached_tokens > 0
    did(f"{provider}: parallel calls: {len(calls)}; results returned; cached tokens counted")

    with raises(litellm.AuthenticationError):
        ask(provider, api_key="wrong")
    with raises(litellm.NotFoundError):
        ask(provider, model="no/model")
    did(f"{provider}: errors")

structured = ask(response_format=Place, seed=2)
Place.model_validate_json(structured.choices[0].message.content)
did("structured parse")

flaky = ask(api_base=f"{FLAKY_URL}/litellm/v1", num_retries=1, max_tokens=4)
assert flaky.usage.completion_tokens <= 4
did("retry after a 503")


async def cancel() -> None:
    stream = await litellm.acompletion(
        model=f"openai/{MODEL}", api_base=V1, api_key=KEY, messages=messages, max_tokens=3000, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    await anext(stream)
    await asyncio.to_thread(wait_for_running, 1)
    await stream.aclose()
    await asyncio.to_thread(wait_for_running, 0)


asyncio.run(cancel())
did("cancel")
print("passed")
