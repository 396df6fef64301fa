"""MCP servers, over stdio and over streamable HTTP, as sources of tools."""

import asyncio
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm.agent import Agent, Endpoint, Tool, ToolError, mcp_tools
from lfm.errors import MachineError, UsageError
from tests.agent.fakes import calls, says, scripted
from tests.waiting import unused_port, wait_until

SERVER = Path(__file__).with_name("mcp_server.py")
COMMAND = shlex.join([sys.executable, str(SERVER)])

pytestmark = pytest.mark.slow


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    port = unused_port()
    with subprocess.Popen([sys.executable, str(SERVER), str(port)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: listens(port), what="the MCP server's port")
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            process.kill()


async def use(tools: list[Tool]) -> None:
    named = {tool.name: tool for tool in tools}
    assert sorted(named) == ["add", "environment", "fail", "say_it"]
    assert named["add"].description == "Add two numbers."
    assert named["add"].parameters["required"] == ["a", "b"]
    assert await named["add"].invoke({"a": 20, "b": 22}) == "42"
    assert await named["say_it"].invoke({"word": "yes"}) == "yes <|im_end|>"
    with pytest.raises(ToolError, match="Error executing tool fail"):
        await named["fail"].invoke({})
    with pytest.raises(ToolError, match="validation error"):
        await named["add"].invoke({"a": "x", "b": 1})


def test_a_command_gives_tools_and_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")

    async def scenario() -> None:
        async with mcp_tools(COMMAND) as tools:
            await use(tools)
            assert await next(tool for tool in tools if tool.name == "environment").invoke({}) == "nothing"

    asyncio.run(scenario())


def test_an_address_gives_tools_and_several_calls_run_at_once(address: str) -> None:
    async def scenario() -> None:
        async with mcp_tools(address) as tools:
            await use(tools)
            add = next(tool for tool in tools if tool.name == "add")
            sums = await asyncio.gather(*(add.invoke({"a": number, "b": 1}) for number in range(8)))
            assert sums == [str(number + 1) for number in range(8)]

    asyncio.run(scenario())


def test_an_agent_uses_two_servers_at_once(address: str) -> None:
    async def scenario(url: str) -> str:
        async with (
            mcp_tools(address, prefix="web_") as web,
            mcp_tools(address, prefix="shop_") as shop,
            Endpoint(url) as endpoint,
        ):
            return (await Agent(endpoint, tools=[*web, *shop]).run("Add")).text

    with scripted(calls(("web_add", {"a": 1, "b": 2}), ("shop_fail", {})), says("3")) as server:
        assert asyncio.run(scenario(server.url)) == "3"
    added, failed = server.last[-2:]
    assert added["content"] == "3"
    assert "Error executing tool fail" in failed["content"]


def test_an_error_within_the_block_comes_out_as_it_is(address: str) -> None:
    async def scenario() -> None:
        async with mcp_tools(address):
            raise UsageError("of the caller")

    with pytest.raises(UsageError, match="of the caller"):
        asyncio.run(scenario())


@pytest.mark.parametrize(
    ("target", "kind", "told"),
    [
        ("/no/such/command --key hunter2", MachineError, "MCP server /no/such/command cannot be used"),
        (f"{shlex.quote(sys.executable)} -c 1", MachineError, "cannot be used"),
        ("'unfinished", UsageError, "is no command line"),
        ("", UsageError, "is empty"),
    ],
    ids=["missing", "silent", "quote", "empty"],
)
def test_a_command_that_is_no_server_says_why(target: str, kind: type[Exception], told: str) -> None:
    async def scenario() -> None:
        async with mcp_tools(target):
            pass

    with pytest.raises(kind, match=told) as refused:
        asyncio.run(scenario())
    assert "hunter2" not in str(refused.value)


def test_an_address_without_a_server_says_so_without_its_password(free_port: int) -> None:
    async def scenario() -> None:
        async with mcp_tools(f"http://me:hunter2@127.0.0.1:{free_port}/mcp"):
            pass

    with pytest.raises(MachineError, match="cannot be used") as refused:
        asyncio.run(scenario())
    assert "hunter2" not in str(refused.value)
