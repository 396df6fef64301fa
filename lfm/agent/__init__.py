"""An agent loop: Python functions and MCP servers as tools of a model behind an OpenAI-compatible endpoint.

    async with Endpoint("http://127.0.0.1:8000") as endpoint:
        agent = Agent(endpoint, tools=[weather], instructions="Answer in one sentence.")
        print((await agent.run("How warm is it in Bern?")).text)

It knows HTTP and nothing of the engine: any server of that form will do. See docs/agents.md.
"""

from lfm.agent.agent import Agent
from lfm.agent.calls import Approve
from lfm.agent.endpoint import Endpoint
from lfm.agent.events import Event, Result, StepEnded, TextDelta, ToolCall, ToolCalled, ToolReturned, Usage
from lfm.agent.load import load_tools
from lfm.agent.mcp_tools import mcp_tools
from lfm.agent.tools import Tool, ToolError, tool

__all__ = [
    "Agent",
    "Approve",
    "Endpoint",
    "Event",
    "Result",
    "StepEnded",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolCalled",
    "ToolError",
    "ToolReturned",
    "Usage",
    "load_tools",
    "mcp_tools",
    "tool",
]
