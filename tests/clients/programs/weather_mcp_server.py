"""An MCP server over stdio with one tool, for mcp_client.py."""

from typing import Literal

from mcp.server import MCPServer

server = MCPServer("weather", log_level="WARNING")


@server.tool()
def weather(city: Literal["Bern", "Thun"], days: Literal[0, 1, 2, 3]) -> str:
    """Say how warm it is."""
    return f"21 degrees in {city} in {days} days"


if __name__ == "__main__":
    server.run("stdio")
