"""An MCP server for the tests: `python mcp_server.py` speaks over stdio, with a port it speaks streamable HTTP."""

import os
import sys
from typing import Literal

from mcp.server import MCPServer

server = MCPServer("tests", log_level="WARNING")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="say/it")
def say(word: Literal["yes", "no"]) -> str:
    """Say a word."""
    return f"{word} <|im_end|>"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("the shelf is empty")


@server.tool()
def environment() -> str:
    """Say what the server knows of a secret."""
    return os.environ.get("A_SECRET", "nothing")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
