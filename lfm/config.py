"""Every setting, as frozen dataclasses: the model's shape, the engine's limits, the server's manners.

Defaults live only here. Configs are never changed: `lfm.engine.resolve` makes a new one with the derived values.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lfm.errors import ModelError, UsageError

LayerType = Literal["conv", "full_attention"]
ARCHITECTURES = {"lfm2_moe": "Lfm2MoeForCausalLM", "lfm2": "Lfm2ForCausalLM"}
PRODUCT_CONTEXT = 32_768  # the model card's context; `max_position_embeddings` of the 24B says 128,000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of one LFM2 checkpoint, from its config.json. Nothing about it is hard-coded to a size.

    A dense `lfm2` is the same architecture with every layer dense: `num_dense_layers == num_hidden_layers`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    layer_types: tuple[LayerType, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_dense_layers: int
    moe_intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    use_expert_bias: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    conv_L_cache: int = 3
    conv_bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 128_000
    tie_word_embeddings: bool = True
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (7,)
    pad_token_id: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise ModelError(
                f"model_type={self.model_type!r} is not an LFM2 model. Allowed: {', '.join(ARCHITECTURES)}."
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ModelError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}."
            )
        for kind in self.layer_types:
            if kind not in ("conv", "full_attention"):
                raise ModelError(f"layer_types names {kind!r}. Allowed: conv, full_attention.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs.")
        if self.conv_L_cache < 1:
            raise ModelError(f"conv_L_cache={self.conv_L_cache} must be at least 1.")
        if self.num_moe_layers and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ModelError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie in 1..num_experts={self.num_experts}."
            )

    @property
    def num_moe_layers(self) -> int:
        return max(0, self.num_hidden_layers - self.num_dense_layers)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full_attention")

    @property
    def conv_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "conv")

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.num_dense_layers

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `config.json` of a model folder. Raises ModelError with the cause and the fix."""
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no config.json. Give a folder in Hugging Face layout, a hub id or random:PRESET."
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read as JSON ({error}). Download the model again.") from error
        if not isinstance(raw, dict):
            raise ModelError(f"{path} holds {type(raw).__name__}, not an object. Download the model again.")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Build from the keys of a Hugging Face config.json, older spellings included (`rope_theta` at top level,
        `torch_dtype`, `tie_embedding`, `full_attn_idxs`, `block_*` of the dense family)."""
        from lfm.model.hf_config import parse_hf_config  # keeps the table of spellings out of this file

        return parse_hf_config(raw)


Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float64"]
Quantize = Literal["none", "fp8"]
KvDtype = Literal["auto", "fp8"]


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"--{name.replace('_', '-')} {value} is not known. Allowed: {', '.join(map(str, allowed))}.")


def _in_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise UsageError(f"--{name.replace('_', '-')} {value} is out of range. Allowed: {low} to {high}.")


MAX_STEP_TOKENS = 65_536


BUILTIN_FOLDER = Path(__file__).parent / "builtin"  # the model that `builtin` means, where it comes with the package


def default_model() -> str:
    """What is served if nobody says what: `builtin`, or the tiny random model in a copy of the package without it."""
    return "builtin" if (BUILTIN_FOLDER / "config.json").is_file() else "random:tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What a user may choose about the engine; None means: chosen for this machine, and printed with the reason.

    `float64` serves the parity tests only. `num_blocks` overrides the memory rule (tests, benchmarks).
    `step_tokens_decoding` bounds a step while anything decodes, but where a long queue waits; `lfm.LLM`, where nobody
    waits for single tokens, sets it to the most.
    """

    model: str = field(default_factory=default_model)
    revision: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Quantize = "none"
    kv_dtype: KvDtype = "auto"
    max_model_len: int | None = None
    max_running: int | None = None
    step_tokens: int | None = None
    step_tokens_decoding: int | None = None
    block_size: int | None = None
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    max_queue: int = 4096
    plain_loop: bool = False
    prefix_caching: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float64"))
        _one_of("quantize", self.quantize, ("none", "fp8"))
        _one_of("kv_dtype", self.kv_dtype, ("auto", "fp8"))
        _in_range("max_model_len", self.max_model_len, 2, 1_048_576)
        _in_range("max_running", self.max_running, 1, 1024)
        _in_range("step_tokens", self.step_tokens, 1, MAX_STEP_TOKENS)
        _in_range("step_tokens_decoding", self.step_tokens_decoding, 1, MAX_STEP_TOKENS)
        _in_range("block_size", self.block_size, 1, 1024)
        _in_range("num_blocks", self.num_blocks, 1, 2**31 - 1)
        _in_range("memory_fraction", self.memory_fraction, 0.05, 0.99)
        _in_range("max_queue", self.max_queue, 0, 65_536)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """An EngineConfig with every value decided for one machine and one model, and the reason for each choice.

    Made by `lfm.engine.plan.plan_engine`. `num_blocks` None: measured after the weights are loaded (CUDA), from what
    `memory_fraction` of the device leaves. `step_tokens_decoding` is the token budget while any sequence decodes and
    no long queue waits.
    """

    device: str  # "cpu" or "cuda:0"
    dtype: Literal["float32", "bfloat16", "float64"]
    quantize: Quantize = "none"
    kv_dtype: KvDtype = "auto"
    max_model_len: int
    max_running: int
    step_tokens: int
    step_tokens_decoding: int
    block_size: int
    num_blocks: int | None
    memory_fraction: float
    max_queue: int
    plain_loop: bool
    prefix_caching: bool
    seed: int
    num_threads: int | None = None  # of CPU arithmetic; None: torch's own choice
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a user may choose about the HTTP service. The API key is masked in `repr`."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: str | None = None
    insecure: bool = False
    api_workers: int = 1
    drain_seconds: float = 30.0
    stuck_seconds: float = 60.0
    keepalive_seconds: float = 10.0
    stalled_reader_seconds: float = 60.0
    debug: bool = False

    def __post_init__(self) -> None:
        _in_range("port", self.port, 0, 65_535)
        _in_range("api_workers", self.api_workers, 1, 64)
        _in_range("drain_seconds", self.drain_seconds, 0, 3600)
        if self.api_key is not None and not self.api_key.strip():
            raise UsageError("--api-key is empty. Give a key, or leave the flag out.")
        if not self.is_loopback and self.api_key is None and not self.insecure:
            raise UsageError(
                f"--host {self.host} is reachable from other machines and there is no --api-key. "
                "Add --api-key KEY, or --insecure to serve without one."
            )

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def __repr__(self) -> str:
        shown = (
            (f.name, "***" if f.name == "api_key" and self.api_key else getattr(self, f.name)) for f in fields(self)
        )
        return f"ServerConfig({', '.join(f'{name}={value!r}' for name, value in shown)})"
