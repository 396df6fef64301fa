"""The official `mcp` package: the tools of a server over stdio, offered to the model, called, and answered."""

import asyncio
import json
import sys
from pathlib import Path

import openai
from common import KEY, MODEL, QUESTION, SEEDS, V1, begin, did
from mcp import Client, StdioServerParameters

SERVER = Path(__file__).with_name("weather_mcp_server.py")


async def main() -> None:
    begin("mcp", "openai")
    command = StdioServerParameters(command=sys.executable, args=[str(SERVER)])
    async with Client(command) as client, openai.AsyncOpenAI(base_url=V1, api_key=KEY, max_retries=0) as model:
        listed = (await client.list_tools()).tools
        tools = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
            }
            for tool in listed
        ]
        did(f"listed: {', '.join(tool.name for tool in listed)}")
        messages = [{"role": "user", "content": QUESTION}]
        for seed in SEEDS:
            answer = await model.chat.completions.create(
                model=MODEL, messages=messages, tools=tools, tool_choice="required", max_tokens=600, seed=seed
            )
            calls = answer.choices[0].message.tool_calls
            if len(calls) > 1:
                break
        else:
            raise AssertionError("no seed gave two calls")
        arguments = [json.loads(call.function.arguments) for call in calls]
        made = zip(calls, arguments, strict=True)
        results = await asyncio.gather(*(client.call_tool(call.function.name, given) for call, given in made))
        for result, given in zip(results, arguments, strict=True):
            assert not result.is_error
            assert result.content[0].text == f"21 degrees in {given['city']} in {given['days']} days"
        did(f"parallel calls: {len(calls)}, each accepted by the server's own schema")
        messages.append(answer.choices[0].message.model_dump(exclude_none=True))
        for call, result in zip(calls, results, strict=True):
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result.content[0].text})
        last = await model.chat.completions.create(
            model=MODEL, messages=messages, tools=tools, tool_choice="none", max_tokens=8
        )
        assert last.choices[0].finish_reason in ("stop", "length")
        did("results returned")
    print("passed")


asyncio.run(main())
