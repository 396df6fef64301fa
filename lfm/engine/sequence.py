"""One sequence on its way through the engine. No torch here.

num_computed   positions whose K, V and tails are in the cache or in a launched step
len(ids)       tokens whose ids the host knows: prompt, and outputs read back
num_pending    ids sampled by launched steps that the host has not read yet, and will not know before it reads them
num_tokens     len(ids) + num_pending: how far num_computed has to catch up
"""

from enum import Enum

from lfm.engine.constraint import Constraint
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
        "constraint",
        "finish_reason",
        "ids",
        "is_held",
        "leader_waits",
        "max_num_tokens",
        "num_cached",
        "num_computed",
        "num_dropped",
        "num_in_flight",
        "num_indexed",
        "num_pending",
        "num_prompt",
        "prompt_logprobs",
        "quiet_end",
        "request",
        "root_hash",
        "row",
        "status",
        "stop_ids",
        "unmarked",
        "unsent",
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
        self.num_dropped = 0  # samples in flight whose ids the host knew before they were drawn
        self.is_held = False  # not to be admitted yet: its grammar is being compiled
        self.constraint: Constraint | None = None
        self.unsent: list[int] = []  # the first output ids, known before anything was computed
        self.unmarked: list[int] = []  # output ids that were not sampled and that the device row has not seen
        self.num_in_flight = 0
        self.quiet_end = 0  # an id sampled after fewer tokens fills no block, is not the first nor the last allowed
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

    def accept(self, token_id: int) -> list[int]:
        """Take an id that was sampled, and those that the grammar forces after it, up to the end. Returns all of them.

        If a launched step is about to sample the first of those, that sample is dropped when it is read.
        """
        new = [token_id]
        if self.constraint is not None and token_id not in self.stop_ids:
            new += self.constraint.advance(token_id)
            new = new[: self.max_num_tokens - len(self.ids)]
            end = next((index for index, one in enumerate(new) if one in self.stop_ids), len(new))
            del new[end + 1 :]
            forced = new[1:]
            if forced and self.num_pending:
                self.num_pending -= 1
                self.num_dropped += 1
                del forced[0]  # the sampler marks it
            self.unmarked += forced
        self.ids += new
        return new

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities are still missing; prefix hits are bypassed then."""
        return self.request.sampling.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt
