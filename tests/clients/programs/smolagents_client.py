"""`smolagents`: a model of an OpenAI-compatible server, its tools, and an agent that calls them."""

import gc
import json

import openai
from common import (
    CITIES,
    FLAKY_URL,
    KEY,
    MODEL,
    QUESTION,
    SEEDS,
    V1,
    begin,
    check_arguments,
    did,
    raises,
    wait_for_running,
)
from smolagents import ChatMessage, LogLevel, MessageRole, OpenAIModel, Tool, ToolCallingAgent

begin("smolagents", "openai")
asked: list[str] = []


class Weather(Tool):
    name = "weather"
    description = "Say how warm it is."
    inputs = {  # noqa: RUF012 - as its documentation writes it
        "city": {"type": "string", "enum": list(CITIES), "description": "Where."},
        "days": {"type": "integer", "minimum": 0, "maximum": 9, "description": "From today."},
    }
    output_type = "string"

    def forward(self, city: str, days: int) -> str:
        check_arguments({"city": city, "days": days})
        asked.append(city)
        return "21 degrees"


def model(*, name=MODEL, url=V1, key=KEY, retries=0, **fields):
    fields = {"max_tokens": 600, **fields}
    return OpenAIModel(name, url, key, client_kwargs={"max_retries": retries}, retry=False, **fields)


user = ChatMessage(role=MessageRole.USER, content=QUESTION)

pieces = list(model(max_tokens=24, seed=1).generate_stream([user]))
whole = model(max_tokens=24, seed=1).generate([user])
assert "".join(piece.content or "" for piece in pieces) == whole.content
assert whole.token_usage.output_tokens <= 24
did("stream")

for seed in SEEDS:
    called = model(seed=seed).generate([user], tools_to_call_from=[Weather()])  # sends tool_choice "required"
    for call in called.tool_calls:
        arguments = call.function.arguments
        check_arguments(json.loads(arguments) if isinstance(arguments, str) else arguments)
    if len(called.tool_calls) > 1:
        break
else:
    raise AssertionError("no seed gave two calls")
did(f"parallel calls: {len(called.tool_calls)}")

deltas = [
    delta for piece in model(seed=seed).generate_stream([user], tools_to_call_from=[Weather()])
    for delta in piece.tool_calls or []
]  # fmt: skip
assert {delta.index for delta in deltas} == set(range(len(called.tool_calls)))
did("calls streamed")

# Its agents ask for calls in every step, until one of them is final_answer.
for seed in SEEDS:
    asked.clear()
    agent = ToolCallingAgent([Weather()], model(seed=seed), max_steps=6, verbosity_level=LogLevel.OFF)
    agent.run(QUESTION)
    steps = [step for step in agent.memory.steps if getattr(step, "tool_calls", None)]
    if asked and len(steps) > 1:
        break
else:
    raise AssertionError("no seed gave two steps with a call")
did(f"an agent of {len(steps)} steps, {len(asked)} tool results returned")

schema = {"type": "object", "properties": {"is_high": {"type": "boolean"}}, "required": ["is_high"]}
wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": {**schema, "additionalProperties": False}}}
structured = model(seed=1).generate([user], response_format=wanted)
assert set(json.loads(structured.content)) == {"is_high"}
did("structured output")

stopped = model(seed=1, max_tokens=200).generate([user], stop_sequences=["e", "a", " "])
assert not set(stopped.content) & set("ea ")
did("stop sequences")

with raises(openai.NotFoundError, MODEL):
    model(name="no/model").generate([user])
with raises(openai.AuthenticationError):
    model(key="wrong").generate([user])
did("errors")

assert model(url=f"{FLAKY_URL}/smolagents/v1", retries=1, max_tokens=4).generate([user]).role == MessageRole.ASSISTANT
did("retry after a 503")

stream = model(max_tokens=3000, extra_body={"ignore_eos": True})
running = stream.generate_stream([user])
next(running)
wait_for_running(1)
running.close()
gc.collect()  # it leaves the response to the garbage collector
wait_for_running(0)
did("cancel")
print("passed")
