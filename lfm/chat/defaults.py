"""The sampling that a model's makers recommend, for the fields that a request omits.

LFM2 folders carry no sampling values of their own, so they come from a table by model type and shape (the model cards).
A folder's generation_config.json wins over the table, and the request over both. Folders of unknown shape and
`random:` presets are neutral: temperature 1, no filter, no penalty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lfm.chat.tokenizer_json import read_json_object
from lfm.config import ModelConfig
from lfm.errors import ModelError
from lfm.protocol import MAX_REPETITION_PENALTY, MAX_TEMPERATURE, MIN_REPETITION_PENALTY, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Values for omitted fields. `origin` says where they come from, for people to read."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    origin: str = "neutral"

    def as_dict(self) -> dict[str, float | int]:
        """The sampling values by the names of the request's fields."""
        values: dict[str, float | int] = asdict(self)
        del values["origin"]
        return values


@dataclass(frozen=True, slots=True)
class _Shape:
    """What tells the published checkpoints apart."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_experts: int
    vocab_size: int


_LFM2 = SamplingDefaults(temperature=0.3, min_p=0.15, repetition_penalty=1.05)
_BY_SHAPE = {
    _Shape("lfm2_moe", 40, 2048, 64, 65_536): replace(
        _LFM2, temperature=0.1, top_k=50, min_p=0.0, origin="LFM2-24B-A2B's model card"
    ),
    _Shape("lfm2_moe", 24, 2048, 32, 65_536): replace(_LFM2, origin="LFM2-8B-A1B's model card"),
    _Shape("lfm2_moe", 24, 2048, 32, 128_000): replace(
        _LFM2, temperature=0.2, top_k=80, min_p=0.0, origin="LFM2.5-8B-A1B's model card"
    ),
    _Shape("lfm2", 16, 1024, 0, 65_536): replace(_LFM2, origin="LFM2-350M's model card"),
    _Shape("lfm2", 16, 1536, 0, 65_536): replace(_LFM2, origin="LFM2-700M's model card"),
    _Shape("lfm2", 16, 2048, 0, 65_536): replace(_LFM2, origin="LFM2-1.2B's model card"),
    _Shape("lfm2", 30, 2048, 0, 65_536): replace(_LFM2, origin="LFM2-2.6B's model card"),
}


def defaults_for_source(folder: Path | None, config: ModelConfig) -> SamplingDefaults:
    """The defaults of a model folder; neutral for a `random:` preset (folder None). ModelError if a file is bad."""
    if folder is None:
        return SamplingDefaults()
    path = folder / "generation_config.json"
    return default_sampling(config, read_json_object(path) if path.is_file() else None)


def default_sampling(config: ModelConfig, generation_config: Mapping[str, object] | None = None) -> SamplingDefaults:
    """The defaults of a checkpoint. Raises ModelError if generation_config holds a value that no request could have."""
    shape = _Shape(
        config.model_type, config.num_hidden_layers, config.hidden_size, config.num_experts, config.vocab_size
    )
    known = _BY_SHAPE.get(shape, SamplingDefaults())
    given = _checked(generation_config or {}, max_top_k=config.vocab_size)
    if not given:
        return known
    origin = "generation_config.json" if known.origin == "neutral" else f"generation_config.json over {known.origin}"
    return replace(known, origin=origin, **given)


def _checked(given: Mapping[str, object], *, max_top_k: int) -> dict[str, Any]:
    """The sampling values that a generation_config names; null counts as not named, as Hugging Face reads it."""
    ranges = {  # name: (type, lowest, highest, whether the lowest itself is allowed)
        "temperature": (int | float, 0, MAX_TEMPERATURE, True),
        "top_k": (int, 0, max_top_k, True),
        "top_p": (int | float, 0, 1, False),
        "min_p": (int | float, 0, 1, True),
        "repetition_penalty": (int | float, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY, True),
    }
    values: dict[str, Any] = {}
    for name, (kind, low, high, has_low) in ranges.items():
        value: Any = given.get(name)
        if value is None:
            continue
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (value == low and not has_low):
            allowed = f"{'from' if has_low else 'above'} {low} to {high}"
            raise ModelError(
                f"generation_config.json: {name}={value!r} is wrong. Allowed: {allowed}. Correct the file."
            )
        values[name] = value
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedSampling:
    """The sampling fields of a request as it named them; None means omitted."""

    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


def resolve_sampling(
    requested: RequestedSampling, *, defaults: SamplingDefaults, max_tokens: int, stop_token_ids: Sequence[int]
) -> SamplingParams:
    """Fill what the request omits. Given values are taken literally, also wrong ones: the engine refuses those by name.

    Temperature 0 is greedy, with the penalties that the request names or else the defaults.
    """

    def pick(given: float | None, otherwise: float) -> float:
        return otherwise if given is None else given

    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=0 if requested.min_tokens is None else requested.min_tokens,
        temperature=pick(requested.temperature, defaults.temperature),
        top_k=defaults.top_k if requested.top_k is None else requested.top_k,
        top_p=pick(requested.top_p, defaults.top_p),
        min_p=pick(requested.min_p, defaults.min_p),
        repetition_penalty=pick(requested.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=pick(requested.presence_penalty, 0.0),
        frequency_penalty=pick(requested.frequency_penalty, 0.0),
        logit_bias=dict(requested.logit_bias or {}),
        seed=requested.seed,
        stop_token_ids=tuple(stop_token_ids),
        logprobs=requested.logprobs,
        prompt_logprobs=requested.prompt_logprobs,
    )
