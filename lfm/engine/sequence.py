"""One sequence on its way through the engine. No torch here.

num_computed   positions whose K, V and tails are in the cache or in a launched step
len(ids)       tokens whose ids the host knows: prompt, and outputs read back
num_pending    ids sampled by launched steps that the host has not read yet
num_tokens     len(ids) + num_pending: how far num_computed has to catch up
"""

from enum import Enum

from lfm.protocol import EngineRequest, FinishReason, TokenLogprob


class Status(Enum):
    """Where a sequence is. PREEMPTED and FINISHED may still be named by launched steps; their blocks wait for those."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Sequence:
    """The state of one sequence. The scheduler alone changes it."""

    __slots__ = (
        "arrival",
        "awaited_hash",
        "block_hashes",
        "block_table",
        "finish_reason",
        "ids",
        "leader_waits",
        "max_num_tokens",
        "num_cached",
        "num_computed",
        "num_in_flight",
        "num_indexed",
        "num_pending",
        "num_prompt",
        "prompt_logprobs",
        "request",
        "root_hash",
        "row",
        "status",
        "stop_ids",
    )

    def __init__(self, request: EngineRequest, *, arrival: int, root_hash: bytes) -> None:
        self.request = request
        self.arrival = arrival
        self.ids = list(request.prompt_ids)
        self.num_prompt = len(self.ids)
        self.max_num_tokens = self.num_prompt + request.sampling.max_tokens
        self.stop_ids = frozenset(request.sampling.stop_token_ids)
        self.root_hash = root_hash
        self.status = Status.WAITING
        self.num_computed = 0
        self.num_pending = 0
        self.num_in_flight = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_indexed = 0
        self.row = -1
        self.num_cached: int | None = None  # prompt tokens of the first admission's prefix hit
        self.leader_waits = 0
        self.awaited_hash: bytes | None = None  # the next block, while a running sequence computes it
        self.prompt_logprobs: list[TokenLogprob | None] = [None]  # the first prompt token has no probability
        self.finish_reason: FinishReason | None = None

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def key(self) -> tuple[int, int]:
        """Scheduling order: priority, then arrival."""
        return (self.request.priority, self.arrival)

    @property
    def num_tokens(self) -> int:
        return len(self.ids) + self.num_pending

    @property
    def num_remaining(self) -> int:
        """Positions to compute before the next id can be sampled; 0 when every id that may be sampled is in flight."""
        return 0 if self.num_tokens >= self.max_num_tokens else self.num_tokens - self.num_computed

    @property
    def num_outputs(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def is_decoding(self) -> bool:
        return self.num_computed >= self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities are still missing; prefix hits are bypassed then."""
        return self.request.sampling.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt
