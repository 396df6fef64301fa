"""Which requests `bench serve` sends, and when: the scripts of its clients for each scenario."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lfm.cli.load_client import Script, Turn

Lengths = Literal["fixed", "lognormal"]
SIGMA = 0.8  # of the logarithm of a length: a tenth of the requests is 2 times the mean or longer
MOST_MEANS = 8  # a longer one is cut to so many means
BACKGROUND = "background"  # the kind of requests that disturb, and whose times are not the scenario's


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send. Exactly one of `concurrency` (closed loop) and `rate` (open loop, requests per second) is set.

    `tokens_per_word` is the server's; lengths are means where they are log-normal.
    """

    num_requests: int
    concurrency: int | None
    rate: float | None
    input_tokens: int
    output_tokens: int
    seed: int
    lengths: Lengths = "fixed"
    tokens_per_word: float = 1.0

    def num_words(self, tokens: float) -> int:
        return max(1, round(tokens / self.tokens_per_word))


def load_scripts(load: Load) -> list[Script]:
    """Open loop: one request per client, at random (Poisson) times, as real users come. Closed loop: each client sends
    its next request when the last one is answered."""
    turns = list(_turns(load))
    if load.rate is None:
        assert load.concurrency is not None
        return [Script(turns=turns[first :: load.concurrency]) for first in range(min(load.concurrency, len(turns)))]
    source, due_s = random.Random(f"{load.seed} arrivals"), 0.0
    scripts = []
    for turn in turns:
        due_s += source.expovariate(load.rate)
        scripts.append(Script(turns=[turn], start_s=due_s))
    return scripts


def _turns(load: Load) -> Iterator[Turn]:
    source = random.Random(f"{load.seed} lengths")
    for index in range(load.num_requests):
        scale_in = scale_out = 1.0
        if load.lengths == "lognormal":
            scale_in, scale_out = (min(MOST_MEANS, source.lognormvariate(-(SIGMA**2) / 2, SIGMA)) for _ in range(2))
        yield Turn(
            num_words=load.num_words(scale_in * load.input_tokens),
            max_tokens=max(1, math.ceil(scale_out * load.output_tokens)),
            seed=f"{load.seed} {index}",
        )


def long_prompt_scripts(load: Load, *, long_tokens: int, every_s: float, num_long: int) -> list[Script]:
    """`concurrency` streams, and a long prompt every `every_s` as their background, for all of whose time they run.

    A stream's next request follows at once; each has `output_tokens`, and `num_requests` in all are sent.
    """
    streams = load_scripts(load)
    disturbing = [
        Script(
            turns=[Turn(num_words=load.num_words(long_tokens), max_tokens=8, seed=f"{load.seed} long {index}")],
            start_s=every_s * (index + 1),
            kind=BACKGROUND,
        )
        for index in range(num_long)
    ]
    return streams + disturbing


def agent_scripts(load: Load, *, num_turns: int) -> list[Script]:
    """`concurrency` agents of `num_turns` turns: a task, and behind each answer a tool's result of as many tokens."""
    assert load.concurrency is not None
    return [
        Script(
            turns=[
                Turn(
                    num_words=load.num_words(load.input_tokens),
                    max_tokens=load.output_tokens,
                    seed=f"{load.seed} {agent} {turn}",
                    role="tool" if turn else "user",
                )
                for turn in range(num_turns)
            ],
            is_conversation=True,
        )
        for agent in range(load.concurrency)
    ]
