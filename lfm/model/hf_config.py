"""Hugging Face config.json <-> ModelConfig: every spelling that LFM2 checkpoints have used, in one place.

The rules are those of transformers (configuration_lfm2.py, configuration_lfm2_moe.py, Lfm2MLP in modeling_lfm2.py):
which key wins where two say the same, and how the dense family adjusts its feed-forward width. Where transformers would
fall back to a default size, this refuses: a guessed size is never right. Nothing here imports torch.
"""

import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

from lfm.config import ARCHITECTURES, LayerType, ModelConfig
from lfm.errors import ModelError

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32", "float64")
_MAX_SIZE = 2**24  # of any dimension or count: far above every real model, far below what would hang a loop
_MAX_LAYERS = _MAX_EXPERTS = 1024  # each expert of each layer has names of its own

# Keys that change nothing in the maths of inference. Any other key that is not read gets a warning.
_IGNORED_KEYS = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "block_mlp_init_scale",
    "block_out_init_scale",
    "block_use_xavier_init",
    "chunk_size_feed_forward",
    "conv_use_xavier_init",
    "experts_implementation",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "model_name",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}

# Keys that would change the maths: only this value (or null) means the architecture that is implemented here.
_FIXED_KEYS: dict[str, object] = {
    "block_use_swiglu": True,
    "use_pos_enc": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "num_shared_experts": 0,
    "sliding_window": None,
    "per_layer_config": None,
    "quantization_config": None,
    "quantization": None,
}

# Keys that repeat another key. Engines disagree about which of the two they read, so the values must agree.
_REPEATED_KEYS = {
    "block_dim": "hidden_size",
    "conv_dim": "hidden_size",
    "conv_dim_out": "hidden_size",
    "num_heads": "num_attention_heads",
    "block_norm_eps": "norm_eps",
}


class _Fields:
    """Typed access to the raw keys. Collects what is missing or wrong, so that one error can name all of it."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.read: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def take(self, *names: str) -> tuple[str, Any]:
        """The first of `names` that has a value, with its name; (names[0], None) if none has."""
        self.read.update(names)
        return next(((name, self.raw[name]) for name in names if self.raw.get(name) is not None), (names[0], None))

    def refuse(self, name: str, value: object, allowed: str) -> None:
        self.wrong.append(f"{name}={_shown(value)}, which is not {allowed}")

    def size(self, *names: str, low: int = 1, high: int = _MAX_SIZE, default: int | None = None) -> int:
        """An integer. `high` stands in for a missing or wrong one, so that what depends on it is not refused too."""
        name, value = self.take(*names)
        if value is None and default is not None:
            return default
        if value is None:
            self.missing.append(name)
        elif isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, value, f"an integer in {low}..{high}")
        else:
            return value
        return high

    def number(self, name: str, *, default: float) -> float:
        value = self.take(name)[1]
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            self.refuse(name, value, "a positive number")
            return default
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        name, value = self.take(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
            return default
        return value

    def check(self) -> None:
        """Raise ModelError if anything was missing or wrong."""
        problems = [f"lacks {', '.join(self.missing)}"] if self.missing else []
        problems += [f"has {'; '.join(self.wrong)}"] if self.wrong else []
        if problems:
            raise ModelError(f"config.json {' and '.join(problems)}. Download the model again, or correct the file.")


def parse_hf_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Build a ModelConfig from the keys of a config.json. Unknown keys are named in one warning.

    Raises ModelError for another architecture, and one that lists every missing key and every wrong value.
    """
    model_type = _check_architecture(raw)
    fields = _Fields(raw)
    fields.read.add("model_type")
    is_moe = model_type == "lfm2_moe"
    num_layers = fields.size("num_hidden_layers", high=_MAX_LAYERS)
    vocab_size = fields.size("vocab_size")
    values: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": fields.size("hidden_size"),
        "vocab_size": vocab_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": fields.size("num_attention_heads"),
        "num_key_value_heads": fields.size("num_key_value_heads"),
        "conv_L_cache": fields.size("conv_L_cache", default=3),
        "conv_bias": fields.flag("conv_bias", default=False),
        "norm_eps": fields.number("norm_eps", default=1e-5),
        "rope_theta": _rope_theta(fields),
        "max_position_embeddings": fields.size("max_position_embeddings", high=2**31, default=128_000),
        "tie_word_embeddings": fields.flag("tie_embedding", "tie_word_embeddings", default=True),
        "bos_token_id": fields.size("bos_token_id", low=0, high=vocab_size - 1, default=1),
        "eos_token_ids": _eos_token_ids(fields, vocab_size),
        "pad_token_id": fields.size("pad_token_id", low=0, high=vocab_size - 1, default=0),
        "dtype": _dtype(fields),
        "layer_types": _layer_types(fields, num_layers),
    }
    values |= _moe_widths(fields) if is_moe else _dense_widths(fields, num_layers)
    values["head_dim"] = _head_dim(fields, values["hidden_size"], values["num_attention_heads"])
    _check_fixed_and_repeated(fields, values)
    fields.check()
    _warn_of_unknown_keys(fields)
    return ModelConfig(**values)


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, as transformers reads it back: the inverse of `parse_hf_config`."""
    eos = config.eos_token_ids
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": list(config.layer_types),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "conv_L_cache": config.conv_L_cache,
        "conv_bias": config.conv_bias,
        "norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        # Both spellings: transformers 5 reads the first, version 4 and older engines only the second.
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "dtype": config.dtype,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raw["head_dim"] = config.head_dim
    if config.model_type == "lfm2":
        raw["block_auto_adjust_ff_dim"] = False  # intermediate_size above is the width that is used
        return raw
    return raw | {
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_dense_layers": config.num_dense_layers,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "use_expert_bias": config.use_expert_bias,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor,
    }


def _check_architecture(raw: Mapping[str, Any]) -> str:
    """The model type, once it and the class name are known to be ours."""
    model_type, names = raw.get("model_type"), raw.get("architectures")
    if isinstance(model_type, str) and model_type in ARCHITECTURES and names in (None, [ARCHITECTURES[model_type]]):
        return model_type
    allowed = ", ".join(f"{kind} with {name}" for kind, name in ARCHITECTURES.items())
    raise ModelError(
        f"config.json says model_type {_shown(model_type)} with architectures {_shown(names)}. Allowed: {allowed}. "
        "Give a folder or hub id of a text model of the LFM2 family."
    )


def _rope_theta(fields: _Fields) -> float:
    """The rotary base: nested, or at top level as version 4 wrote it. Every rope type but "default" is refused."""
    theta = fields.number("rope_theta", default=1_000_000.0)
    name, nested = fields.take("rope_scaling", "rope_parameters")
    if nested is None:
        return theta
    if not isinstance(nested, Mapping):
        fields.refuse(name, nested, "an object")
        return theta
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default":
        fields.refuse(f"{name}.rope_type", kind, "'default', the only one that exists here")
    elif unknown := sorted(set(nested) - {"rope_theta", "rope_type", "type"}):
        fields.refuse(f"{name} with", ", ".join(map(str, unknown)), "known for rope type 'default'")
    nested_fields = _Fields(nested)
    theta = nested_fields.number("rope_theta", default=theta)
    fields.wrong += [f"{name}.{text}" for text in nested_fields.wrong]
    return theta


def _layer_types(fields: _Fields, num_layers: int) -> tuple[LayerType, ...]:
    """Kind of every layer: `layer_types`, or the attention indices of the first dense checkpoints."""
    kinds, indices = fields.take("layer_types")[1], fields.take("full_attn_idxs")[1]
    if kinds is not None:
        if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds):
            return tuple(kinds)  # ModelConfig checks the number and the words
        fields.refuse("layer_types", kinds, "a list of 'conv' and 'full_attention'")
    elif indices is None:
        fields.missing.append("layer_types")
    elif isinstance(indices, list) and all(type(i) is int and 0 <= i < num_layers for i in indices):
        attention = set(indices)
        return tuple("full_attention" if i in attention else "conv" for i in range(num_layers))
    else:
        fields.refuse("full_attn_idxs", indices, f"a list of layer numbers below {num_layers}")
    return ()


def _eos_token_ids(fields: _Fields, vocab_size: int) -> tuple[int, ...]:
    """The stop ids. None in the file means that the tokenizer alone knows them."""
    value = fields.take("eos_token_id")[1]
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if all(type(i) is int and 0 <= i < vocab_size for i in ids):
        return tuple(ids)
    fields.refuse("eos_token_id", value, f"an id, or a list of ids, in 0..{vocab_size - 1}")
    return ()


def _dtype(fields: _Fields) -> str:
    name, value = fields.take("dtype", "torch_dtype")
    dtype = value.removeprefix("torch.") if isinstance(value, str) else value
    if dtype is None:
        return "bfloat16"
    if dtype not in DTYPES:
        fields.refuse(name, value, f"one of {', '.join(DTYPES)}")
    return str(dtype)


def _head_dim(fields: _Fields, hidden: int, num_heads: int) -> int:
    """The width of one head: its own key, or an equal share of the hidden size."""
    if fields.raw.get("head_dim") is None and not fields.missing and not fields.wrong and hidden % num_heads:
        fields.refuse("hidden_size", hidden, f"a multiple of num_attention_heads={num_heads}; there is no head_dim")
    return fields.size("head_dim", default=hidden // num_heads)


def _moe_widths(fields: _Fields) -> dict[str, Any]:
    return {
        "intermediate_size": fields.size("intermediate_size"),
        "moe_intermediate_size": fields.size("moe_intermediate_size"),
        "num_dense_layers": fields.size("num_dense_layers", low=0),
        "num_experts": fields.size("num_experts", high=_MAX_EXPERTS),
        "num_experts_per_tok": fields.size("num_experts_per_tok", high=_MAX_EXPERTS),
        "use_expert_bias": fields.flag("use_expert_bias", default=True),
        "norm_topk_prob": fields.flag("norm_topk_prob", default=True),
        "routed_scaling_factor": fields.number("routed_scaling_factor", default=1.0),
    }


def _dense_widths(fields: _Fields, num_layers: int) -> dict[str, Any]:
    """The dense family's feed-forward width: `block_ff_dim` wins, then Lfm2MLP shrinks and rounds it by default."""
    width = fields.size("block_ff_dim", "intermediate_size")
    adjusts = fields.flag("block_auto_adjust_ff_dim", default=True)
    multiple = fields.size("block_multiple_of", default=256)
    has_multiplier = fields.raw.get("block_ffn_dim_multiplier", 1.0) is not None
    multiplier = fields.number("block_ffn_dim_multiplier", default=1.0)
    if adjusts:
        width = int(2 * width / 3)
        if has_multiplier:  # null switches the rounding off too
            width = math.ceil(int(multiplier * width) / multiple) * multiple
    return {"intermediate_size": width, "num_dense_layers": num_layers}


def _check_fixed_and_repeated(fields: _Fields, values: Mapping[str, Any]) -> None:
    for name, only in _FIXED_KEYS.items():
        value = fields.take(name)[1]
        if value is not None and value != only:
            fields.refuse(name, value, "supported" if only is None else f"{only!r}, the only form that exists here")
    for name, original in _REPEATED_KEYS.items():
        value = fields.take(name)[1]
        if value is not None and value != values[original]:
            fields.refuse(name, value, f"{original}={values[original]!r}")


def _warn_of_unknown_keys(fields: _Fields) -> None:
    unknown = sorted(set(fields.raw) - fields.read - _IGNORED_KEYS)
    if unknown:
        logger.warning("config.json has keys that are not known here and have no effect: %s", ", ".join(unknown))


def _shown(value: object) -> str:
    """A value as an error shows it: on one line, and not longer than a line can bear."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
