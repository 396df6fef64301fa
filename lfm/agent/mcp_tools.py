"""The tools of an MCP server: a command that speaks over its stdin and stdout, or an address (streamable HTTP).

Needs the official `mcp` package, which the extra `agent` brings. A server's names, descriptions and results are data
of strangers: they reach the model as text, and calls go through the same approval and limits as all others.
"""

import asyncio
import contextlib
import json
import logging
import re
import shlex
import sys
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING

import httpx2

from lfm.agent.tools import Tool, ToolError
from lfm.errors import MachineError, UsageError

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult
    from mcp.types import Tool as McpTool

logger = logging.getLogger(__name__)

CONNECT_S = 30.0
MAX_PAGES = 100


@contextlib.asynccontextmanager
async def mcp_tools(target: str, *, prefix: str = "") -> AsyncGenerator[list[Tool]]:
    """Connect to a server and yield its tools, which work until the end of the block.

    Args:
        target: an address that begins with http:// or https://, or a command line (no shell reads it). A command gets
            only harmless variables of the environment (PATH, HOME ...); give it more with `env NAME=VALUE COMMAND`.
        prefix: put before each tool's name, to tell servers apart.

    Enter and leave it in one task. Raises UsageError without the `mcp` package or for a command that cannot be split,
    MachineError if the server cannot be reached.
    """
    failure: Exception | None = None
    try:
        async with contextlib.AsyncExitStack() as stack:
            listed = await _connect(client := _client(target), stack, target)
            try:
                yield [_to_tool(client, item, prefix=prefix) for item in listed]
            except Exception as error:
                failure = error
                raise
    except BaseExceptionGroup:
        if failure is None:
            raise
        raise failure from None  # the block's own error, which the client's task groups have wrapped


async def _connect(client: "Client", stack: contextlib.AsyncExitStack, target: str) -> "list[McpTool]":
    try:
        async with asyncio.timeout(CONNECT_S):
            await stack.enter_async_context(client)
            return await _list_tools(client)
    except (Exception, BaseExceptionGroup) as error:
        logger.debug("connecting to the MCP server failed", exc_info=True)
        reason = f"no answer within {CONNECT_S:g} s" if isinstance(error, TimeoutError) else _reason(error)
        raise MachineError(f"The MCP server {_shown(target)} cannot be used: {reason}.") from error


def _client(target: str) -> "Client":
    try:
        from mcp import Client, StdioServerParameters, stdio_client
    except ImportError as error:
        raise UsageError("MCP servers need the mcp package. Install it: pip install 'lfm-serve[agent]'.") from error
    if target.startswith(("http://", "https://")):
        return Client(target)
    try:
        words = shlex.split(target)
    except ValueError as error:
        raise UsageError(f"The MCP server {target!r} is no command line: {error}.") from error
    if not words:
        raise UsageError("An MCP server is empty. Give a command line or an http:// address.")
    parameters = StdioServerParameters(command=words[0], args=words[1:])
    return Client(stdio_client(parameters, errlog=sys.__stderr__ or sys.stderr))


async def _list_tools(client: "Client") -> "list[McpTool]":
    tools: list[McpTool] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return tools
    raise MachineError(f"it lists more than {MAX_PAGES} pages of tools")


def _to_tool(client: "Client", item: "McpTool", *, prefix: str) -> Tool:
    async def invoke(arguments: Mapping[str, object]) -> str:
        return _to_text(await client.call_tool(item.name, dict(arguments)))

    name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{prefix}{item.name}")[:64]
    return Tool(
        name=name, description=item.description or item.title or "", parameters=item.input_schema, invoke=invoke
    )


def _to_text(result: "CallToolResult") -> str:
    """The text of a result. Raises ToolError with it if the server says that it is an error."""
    pieces = [_block_text(block.model_dump(mode="json")) for block in result.content]
    if not pieces and result.structured_content is not None:
        pieces.append(json.dumps(result.structured_content, ensure_ascii=False))
    text = "\n".join(pieces)
    if result.is_error:
        raise ToolError(text or "the tool failed without a word")
    return text


def _block_text(block: Mapping[str, object]) -> str:
    if block["type"] == "text":
        return str(block["text"])
    resource = block.get("resource")
    if isinstance(resource, dict) and "text" in resource:
        return str(resource["text"])
    if block["type"] == "resource_link":
        return str(block["uri"])
    return f"[{block['type']}, which this model cannot read]"


def _reason(error: BaseException) -> str:
    """The first cause in a group of errors, on one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(".")


def _shown(target: str) -> str:
    """The target without a password in its address and without a command's arguments, which may hold secrets."""
    if target.startswith(("http://", "https://")):
        url = httpx2.URL(target)
        return f"{url.scheme}://{url.netloc.decode().rpartition('@')[2]}{url.path}"
    return shlex.split(target)[0]
