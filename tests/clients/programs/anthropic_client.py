"""The official `anthropic` package against /v1/messages."""

import anthropic
from common import (
    FLAKY_URL,
    KEY,
    MODEL,
    PARAMETERS,
    QUESTION,
    SEEDS,
    URL,
    begin,
    check_arguments,
    did,
    raises,
    wait_for_running,
)  # fmt: skip
from pydantic import BaseModel

begin("anthropic")
client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
tools = [{"name": "weather", "description": "Say how warm it is.", "input_schema": PARAMETERS}]
user = {"role": "user", "content": QUESTION}


class Place(BaseModel):
    name: str
    is_high: bool


def ask(seed, messages=(user,), **fields):
    fields = {"max_tokens": 600, "extra_body": {"seed": seed}, **fields}
    return client.messages.create(model=MODEL, messages=list(messages), **fields)


with client.messages.stream(model=MODEL, max_tokens=24, messages=[user], extra_body={"seed": 1}) as stream:
    text = "".join(stream.text_stream)
    message = stream.get_final_message()
assert "".join(block.text for block in message.content) == text
assert message.usage.output_tokens <= 24
did("stream")

for seed in SEEDS:
    called = ask(seed, tools=tools, tool_choice={"type": "any"})
    assert called.stop_reason == "tool_use", called
    uses = [block for block in called.content if block.type == "tool_use"]
    for use in uses:
        check_arguments(use.input)
    if len(uses) > 1:
        break
else:
    raise AssertionError("no seed gave two calls")
did(f"parallel calls: {len(uses)}")

one = ask(seed, tools=tools, tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True})
assert len([block for block in one.content if block.type == "tool_use"]) == 1
did("a named tool, one call alone")

results = [{"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees"} for use in uses]
answer = ask(
    1,
    [user, {"role": "assistant", "content": called.content}, {"role": "user", "content": results}],
    tools=tools,
    tool_choice={"type": "none"},
    max_tokens=16,
)
assert answer.stop_reason in ("end_turn", "max_tokens")
assert answer.usage.cache_read_input_tokens > 0
did("results returned, earlier turns read from the cache")

with client.messages.stream(
    model=MODEL, max_tokens=600, messages=[user], tools=tools, tool_choice={"type": "any"}, extra_body={"seed": seed}
) as stream:
    partial = [event.partial_json for event in stream if event.type == "input_json"]
    streamed = stream.get_final_message()
assert [block.input for block in streamed.content if block.type == "tool_use"] == [use.input for use in uses]
assert len(partial) > len(uses)
did(f"calls streamed in {len(partial)} pieces")

parsed = client.messages.parse(
    model=MODEL, max_tokens=900, messages=[user], output_format=Place, extra_body={"seed": 1}
)
assert isinstance(parsed.parsed_output, Place), parsed
did("structured parse")

count = client.messages.count_tokens(model=MODEL, messages=[user], tools=tools)
assert count.input_tokens == called.usage.input_tokens + (called.usage.cache_read_input_tokens or 0)
did("tokens counted")

with raises(anthropic.NotFoundError, MODEL):
    client.messages.create(model="no/such-model", max_tokens=1, messages=[user])
with raises(anthropic.BadRequestError, "max_tokens"):
    client.messages.create(model=MODEL, max_tokens=0, messages=[user])
with raises(anthropic.AuthenticationError):
    client.with_options(api_key="wrong").messages.create(model=MODEL, max_tokens=1, messages=[user])
did("errors")

flaky = anthropic.Anthropic(base_url=f"{FLAKY_URL}/anthropic", api_key=KEY, max_retries=1)
assert flaky.messages.create(model=MODEL, max_tokens=1, messages=[user]).usage.output_tokens == 1
did("retry after a 503")

stream = client.messages.create(
    model=MODEL, max_tokens=3000, messages=[user], stream=True, extra_body={"ignore_eos": True}
)
next(iter(stream))
wait_for_running(1)
stream.close()
wait_for_running(0)
did("cancel")
print("passed")
