"""The least time that a workload can take on one device, from bytes moved and operations done alone.

A step costs the larger of bytes / bandwidth and operations / rate: weights once per step (of the experts, those that
its tokens choose), the K/V of every decoding context, conv tails in and out, and two operations per weight and token.
A workload is simulated step by step, with chunks of prompts beside decoding sequences, for several token budgets; the
fastest counts. Nothing else costs time here: no launches, no host, no activations. Weights and cache are bfloat16, or
fp8 where that is asked for: then a projection's or expert's weight is one byte (the router is so small that it is
counted among them), and its operations run at the fp8 rate; head, attention and conv tails stay as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lfm.config import KvDtype, ModelConfig, Quantize
from lfm.model.sizes import conv_state_bytes, expert_parameters, kv_bytes_per_token, num_active_parameters

_WEIGHT_BYTES = 2
_STEP_BUDGETS = (2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device can do at best: bytes per second of its memory, dense bfloat16 and fp8 operations per second."""

    bytes_per_s: float
    operations_per_s: float
    fp8_operations_per_s: float


# Measured with plain streams and matrix products, not taken from a data sheet.
PEAKS = {"NVIDIA H200": Peak(4.3e12, 790e12, 1500e12)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests that are submitted together. `shared_tokens` is a prompt prefix common to all, beside `input_tokens`.

    `sampling` "default" is the 24B's own recommendation. `routing` "zipf" biases every router so that the popularity of
    experts falls with their rank. `is_decode_only`: timed from the moment when every request has its first token.
    """

    name: str
    requests: int
    input_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    sampling: Literal["greedy", "default"] = "greedy"
    routing: Literal["random", "zipf"] = "random"
    is_decode_only: bool = False

    @property
    def num_timed_tokens(self) -> int:
        """Output tokens that fall into the timed part."""
        return self.requests * (self.output_tokens - self.is_decode_only)


@dataclass(slots=True)
class _Group:
    """Sequences that decode in step: how many, their context, and the tokens that each still has to make."""

    num_sequences: int
    context: int
    num_left: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The prompt tokens of one step: how many, over how much context in sum, and how many prompts they complete."""

    num_tokens: int
    context_sum: float
    num_finished: int


def experts_hit(config: ModelConfig, num_tokens: int) -> float:
    """Distinct experts per layer that `num_tokens` tokens choose, expected under uniform routing."""
    if not config.num_moe_layers:
        return 0.0
    missed = (1 - config.num_experts_per_tok / config.num_experts) ** num_tokens
    return config.num_experts * (1 - missed)


def limit_seconds(
    config: ModelConfig,
    workload: Workload,
    peak: Peak,
    *,
    decode_experts_hit: float | None = None,
    quantize: Quantize = "none",
    kv_dtype: KvDtype = "auto",
) -> float:
    """The least seconds from submit to the last token.

    `decode_experts_hit` is the measured mean per layer and decode step; None: what uniform routing would choose.
    """
    step = _Step(config, peak, decode_experts_hit, quantize=quantize, kv_dtype=kv_dtype)
    return min(_simulate(workload, step, budget) for budget in _STEP_BUDGETS)


class _Step:
    """The cost of one step of one model on one device."""

    def __init__(
        self,
        config: ModelConfig,
        peak: Peak,
        decode_experts_hit: float | None,
        *,
        quantize: Quantize,
        kv_dtype: KvDtype,
    ) -> None:
        is_fp8 = quantize == "fp8"
        self._body_bytes = 1 if is_fp8 else _WEIGHT_BYTES
        self._body_operations_per_s = peak.fp8_operations_per_s if is_fp8 else peak.operations_per_s
        self._config = config
        self._peak = peak
        self._decode_experts_hit = decode_experts_hit
        chosen = config.num_moe_layers * config.num_experts_per_tok * expert_parameters(config)
        self._head = config.vocab_size * config.hidden_size
        self._body = num_active_parameters(config) - self._head
        self._shared = self._body - chosen  # read in every step, whatever the routing
        self._kv_bytes = kv_bytes_per_token(config, "bfloat16", kv_dtype=kv_dtype)
        self._tail_bytes = conv_state_bytes(config, "bfloat16")
        self._attention_operations = 4 * config.num_attention_heads * config.head_dim * len(config.attention_layers)

    def seconds(self, groups: list[_Group], chunk: _Chunk, *, shared_tokens: int) -> float:
        """Time of one step. Contexts that share a prefix read its K/V once."""
        rows = sum(group.num_sequences for group in groups)
        contexts = sum(group.num_sequences * group.context for group in groups)
        tokens = rows + chunk.num_tokens
        heads = rows + chunk.num_finished
        hit = experts_hit(self._config, tokens)
        if self._decode_experts_hit is not None and not chunk.num_tokens:
            hit = self._decode_experts_hit
        weights = self._shared + hit * self._config.num_moe_layers * expert_parameters(self._config)
        read_context = contexts - max(0, rows - 1) * shared_tokens
        num_bytes: float = weights * self._body_bytes + (self._head if heads else 0) * _WEIGHT_BYTES
        num_bytes += (read_context + tokens) * self._kv_bytes + rows * 2 * self._tail_bytes
        others: float = 2 * heads * self._head + self._attention_operations * (contexts + chunk.context_sum)
        seconds = 2 * tokens * self._body / self._body_operations_per_s + others / self._peak.operations_per_s
        return max(num_bytes / self._peak.bytes_per_s, seconds)


def _simulate(workload: Workload, step: _Step, budget: int) -> float:
    chunks = _Prompts(workload)
    groups: list[_Group] = []
    if workload.is_decode_only:
        context = workload.shared_tokens + workload.input_tokens + 1
        groups, chunks = [_Group(workload.requests, context, workload.output_tokens - 1)], _Prompts(workload, done=True)
    seconds = 0.0
    while groups or not chunks.is_done:
        rows = sum(group.num_sequences for group in groups)
        chunk = chunks.take(max(0, budget - rows))
        seconds += step.seconds(groups, chunk, shared_tokens=workload.shared_tokens)
        for group in groups:
            group.context += 1
            group.num_left -= 1
        if chunk.num_finished:
            context = workload.shared_tokens + workload.input_tokens + 1
            groups.append(_Group(chunk.num_finished, context, workload.output_tokens - 1))
        groups = [group for group in groups if group.num_left]
    return seconds


class _Prompts:
    """The prompts of a workload, taken in order; the first one computes the shared prefix for all."""

    def __init__(self, workload: Workload, *, done: bool = False) -> None:
        self._shared = workload.shared_tokens
        self._input = workload.input_tokens
        self._num_left = 0 if done else workload.requests
        self._done = 0  # tokens of the current prompt that are computed
        self._start = 0  # where the current prompt starts computing: behind the prefix for all but the first

    @property
    def is_done(self) -> bool:
        return self._num_left == 0

    def take(self, room: int) -> _Chunk:
        num_tokens, context_sum, num_finished = 0, 0.0, 0
        for taken, context, is_finished in self._pieces(room):
            num_tokens += taken
            context_sum += taken * (context + taken / 2)
            num_finished += is_finished
        return _Chunk(num_tokens, context_sum, num_finished)

    def _pieces(self, room: int) -> Iterator[tuple[int, int, bool]]:
        total = self._shared + self._input
        while room > 0 and self._num_left:
            context = self._start + self._done
            taken = min(room, total - context)
            room -= taken
            self._done += taken
            is_finished = context + taken == total
            if is_finished:
                self._num_left -= 1
                self._start, self._done = self._shared, 0
            yield taken, context, is_finished
