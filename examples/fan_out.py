"""Many agents with one system prompt: how much of their prompts the server finds in its cache, and how fast it answers.

    python examples/fan_out.py --url http://127.0.0.1:8000     # at a server that runs
    python examples/fan_out.py                                 # starts one of random:tiny for itself

Every agent gets the same instructions and tools and a question of its own, must look something up, and answers. The
server computes the common part of the prompts once; the first question of each agent shows it, and so does each later
step, which finds all that the agent has said and heard before.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence

from lfm.agent import Agent, Endpoint, Result, Usage
from lfm.errors import LfmError

INSTRUCTIONS = """You help the visitors of a museum of clocks. Answer in one sentence, from what the catalogue says.
Look every clock up before you speak of it. Do not guess a year, a maker or a room. If the catalogue does not know
a clock, say so and name the desk at the entrance, where a person can help.
""" + "".join(f"Room {room} shows the clocks numbered {room * 100} to {room * 100 + 99}.\n" for room in range(1, 21))


async def catalogue(number: int) -> dict[str, object]:
    """Look a clock up.

    Args:
        number: The clock's number, from its label.
    """
    return {"number": number, "room": number // 100, "maker": "unknown", "year": 1700 + number % 200}


async def fan_out(url: str, *, num_agents: int, max_tokens: int, api_key: str | None) -> tuple[list[Result], float]:
    """Run the agents at once; returns their results and the seconds that they took together."""
    async with Endpoint(url, api_key=api_key) as endpoint:
        agents = [
            Agent(
                endpoint,
                tools=[catalogue],
                instructions=INSTRUCTIONS,
                tool_choice="required",
                max_steps=3,
                options={"max_tokens": max_tokens, "seed": number},
            )
            for number in range(num_agents)
        ]
        start_s = time.perf_counter()
        runs = [agent.run(f"Where is clock {100 + number}?") for number, agent in enumerate(agents)]
        return list(await asyncio.gather(*runs)), time.perf_counter() - start_s


def report(results: Sequence[Result], duration_s: float) -> dict[str, float]:
    """Print what happened, for people and as one line of JSON; returns the numbers."""
    usage = sum((result.usage for result in results), Usage())
    numbers = {
        "agents": len(results),
        "steps": sum(result.num_steps for result in results),
        "prompt_tokens": usage.num_prompt_tokens,
        "cached_tokens": usage.num_cached_tokens,
        "prefix_hit_rate": round(usage.num_cached_tokens / usage.num_prompt_tokens, 4),
        "output_tokens": usage.num_output_tokens,
        "duration_s": round(duration_s, 3),
        "output_tokens_per_s": round(usage.num_output_tokens / duration_s, 1),
        "total_tokens_per_s": round((usage.num_prompt_tokens + usage.num_output_tokens) / duration_s, 1),
        "agents_per_s": round(len(results) / duration_s, 2),
    }
    print(
        f"{len(results)} agents, {numbers['steps']} steps, {duration_s:.2f} s: "
        f"{numbers['prefix_hit_rate']:.1%} of {usage.num_prompt_tokens:,} prompt tokens came from the cache, "
        f"{numbers['output_tokens_per_s']:,.0f} output tok/s, {numbers['total_tokens_per_s']:,.0f} total tok/s"
    )
    print(json.dumps(numbers))
    return numbers


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs; without it one is started for this run")
    parser.add_argument("--model", default="random:tiny", help="what to serve, without --url")
    parser.add_argument("--agents", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64, help="of each step")
    given = parser.parse_args(args)
    with contextlib.ExitStack() as stack:
        url = given.url
        if url is None:
            from lfm.cli.own_server import own_server

            url = stack.enter_context(own_server(given.model, {}))
        api_key = os.environ.get("LFM_API_KEY")
        running = fan_out(url, num_agents=given.agents, max_tokens=given.max_tokens, api_key=api_key)
        report(*asyncio.run(running))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LfmError as error:
        sys.exit(f"error: {error}")
