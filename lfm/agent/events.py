"""What happens in a run, as an agent's stream tells it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Json = dict[str, object]
StopReason = Literal["answer", "length", "max_steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one step or of a whole run. Cached tokens are prompt tokens that the server found in its cache."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            num_prompt_tokens=self.num_prompt_tokens + other.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens + other.num_cached_tokens,
            num_output_tokens=self.num_output_tokens + other.num_output_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model asks for. `arguments` None: what it wrote is no JSON object; it stands in `raw`."""

    id: str
    name: str
    arguments: Mapping[str, object] | None
    raw: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the model's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCalled:
    """The model asks for a call; approval and execution follow."""

    call: ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolReturned:
    """A call has ended. `content` is what the model reads: the result, or what went wrong."""

    call: ToolCall
    content: str
    is_error: bool
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnded:
    """The model has spoken and all calls of this step have ended. `messages`: what the conversation has gained."""

    messages: tuple[Json, ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished run; the last event of its stream.

    `messages` is the whole conversation without the instructions: a following run can begin with it. `stop_reason` is
    "length" if the last answer was cut at max_tokens, "max_steps" if the model wanted to go on calling.
    """

    text: str
    messages: tuple[Json, ...]
    usage: Usage
    num_steps: int
    stop_reason: StopReason


Event = TextDelta | ToolCalled | ToolReturned | StepEnded | Result
