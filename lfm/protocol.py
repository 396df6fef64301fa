"""The plain objects that travel between the stations of a request.

They are msgspec structs, so that the API process and the engine process exchange them as msgpack without pickle.
This module imports neither torch nor any other part of the package: `chat`, `engine` and `server` all stand on it.
"""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]

# The bounds of design section 8: here and nowhere else. A value outside gets a 400 that names field, value and bound.
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BANNED_IDS = 1024
MAX_TEMPERATURE = 2.0
MIN_REPETITION_PENALTY = 0.01  # logits are divided by it: near 0 they are no longer finite
MAX_REPETITION_PENALTY = 10.0
MAX_PRESENCE_FREQUENCY = 2.0
MAX_LOGIT_BIAS_VALUE = 100.0
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024
MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_HEADER_BYTES = 32 * 1024
MAX_PRIORITY = 1_000_000
MAX_TOOLS = 512
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMAS_BYTES = 1024 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_ENUM = 5000
MAX_GRAMMAR_BYTES = 4 * 1024 * 1024
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one sequence is sampled. Neutral by default; model-recommended values come from `lfm.chat.defaults`.

    top_k 0 means off. `logprobs` is the number of top alternatives to report besides the chosen token (None: report
    nothing). `prompt_logprobs` asks the same for every prompt token. `seed` None: a random one, made at admission.
    `banned_ids` are never sampled, whatever their logits and biases.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    banned_ids: tuple[int, ...] = ()


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the tokens of one sequence must spell: Lark in llguidance's dialect, or its list of several such.

    `trigger_id` None: the grammar holds from the first output token. Else all is free until that token is sampled, and
    the grammar begins with it. A finished grammar allows the stop tokens alone, and these then end the sequence.
    """

    text: str
    trigger_id: int | None = None


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate. A request with n choices is n of these (same prompt, seed + choice index).

    `request_id` is made by the server and unique; a client's own id is only a label and never reaches the engine.
    `tenant` salts the prefix cache: sequences of different tenants never share blocks. `priority`: lower runs first.
    `grammar` constrains the output; choices that share one object send it once. Who serves strangers has it tried
    first (`lfm.engine.grammar_worker`). Tokens that it forces are output tokens like others, and cost less to compute.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    tenant: str = ""
    priority: int = 0
    # None: the engine's own rule (ids of the tokenizer only). False lets ids beyond the tokenizer through (benchmarks).
    mask_padded_ids: bool = True
    grammar: GrammarSpec | None = None


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability of one token under the raw logits (fp32), with the `top` alternatives in falling order."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as it crosses a process boundary. `status` is the HTTP status that names whose fault it is."""

    message: str
    type: str = "server_error"
    param: str | None = None
    code: str | None = None
    status: int = 500
    retry_after_s: float | None = None


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What one step did for one sequence. Exactly one event of a request is terminal: it has a `finish_reason`.

    The first event of an accepted request has `is_accepted` and no tokens; a refused one gets only its terminal error.
    `token_ids` are the new output ids (a sampled stop token included, last). `num_cached_tokens` comes with the first
    token.
    """

    request_id: str
    is_accepted: bool = False
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine, sent with each step. Counters are totals since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
    block_size: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    corrupted_requests: int = 0
    steps: int = 0
    step_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    waiting_prompt_tokens: int = 0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process tells its clients once, when it is ready."""

    model_type: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_running: int
    max_queue: int
    device: str
    dtype: str
    load_s: float
    reasons: tuple[str, ...] = ()  # what was chosen for this machine and why (EnginePlan.reasons), for people to read
