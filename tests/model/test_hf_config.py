"""config.json in all its spellings, with transformers as the oracle of what they mean."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Lfm2Config, Lfm2ForCausalLM, Lfm2MoeConfig

from lfm.config import ModelConfig
from lfm.errors import ModelError
from lfm.model.hf_config import parse_hf_config, to_hf_config
from lfm.model.presets import PRESETS

CONV, ATTENTION = "conv", "full_attention"
TINY = PRESETS["tiny"]
DENSE = replace(
    TINY,
    model_type="lfm2",
    num_dense_layers=8,
    moe_intermediate_size=0,
    num_experts=0,
    num_experts_per_tok=0,
)

# The published file, as transformers 5 wrote it.
RAW_24B: dict[str, Any] = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": 7,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11776,
    "layer_types": [ATTENTION if layer % 4 == 2 else CONV for layer in range(40)],
    "max_position_embeddings": 128000,
    "model_type": "lfm2_moe",
    "moe_intermediate_size": 1536,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_dense_layers": 2,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "routed_scaling_factor": 1.0,
    "transformers_version": "5.0.0",
    "use_cache": True,
    "use_expert_bias": True,
    "vocab_size": 65536,
}

# The first dense checkpoints, as version 4 wrote them: block_ff_dim is not the width that is used.
RAW_DENSE: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_dim": 1024,
    "block_ff_dim": 6656,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 1024,
    "conv_dim_out": 1024,
    "conv_use_xavier_init": True,
    "eos_token_id": 7,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4608,
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "tie_embedding": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": True,
    "use_pos_enc": True,
    "vocab_size": 65536,
}


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in names}


def error_of(raw: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        parse_hf_config(raw)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_published_24b_config_is_the_preset(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse_hf_config(RAW_24B) == PRESETS["lfm2-24b-a2b"]
    assert caplog.text == ""


def test_first_dense_config_reads_as_transformers_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = parse_hf_config(RAW_DENSE)
    assert caplog.text == ""
    oracle = Lfm2Config(**RAW_DENSE)
    assert config.layer_types == tuple(oracle.layer_types)
    assert config.intermediate_size == 4608
    assert config.attention_layers == (2, 5, 8, 10, 12, 14)
    assert config.num_moe_layers == 0
    assert config.head_dim == 64


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"block_auto_adjust_ff_dim": False},
        {"block_ff_dim": None, "intermediate_size": 100},
        {"block_ff_dim": 100, "intermediate_size": 77},
        {"block_ffn_dim_multiplier": 1.3},
        {"block_multiple_of": 1, "block_ff_dim": 101},
        {"block_multiple_of": 64, "block_ff_dim": 96},
    ],
)
def test_dense_width_is_the_width_of_transformers_mlp(change: dict[str, Any]) -> None:
    small = {"num_hidden_layers": 1, "full_attn_idxs": [0], "vocab_size": 32, "block_dim": 64, "conv_dim": 64}
    small |= {"hidden_size": 64, "num_attention_heads": 4, "num_heads": 4, "conv_dim_out": 64, "num_key_value_heads": 4}
    raw = {key: value for key, value in (RAW_DENSE | small | change).items() if value is not None}
    model = Lfm2ForCausalLM(Lfm2Config(**raw))
    assert parse_hf_config(raw).intermediate_size == model.model.layers[0].feed_forward.w1.weight.shape[0]


def test_dense_width_without_a_multiplier_is_not_rounded() -> None:
    """As Lfm2MLP does; transformers 5 itself no longer lets the key be null, but version 4 did."""
    assert parse_hf_config(RAW_DENSE | {"block_ffn_dim_multiplier": None}).intermediate_size == 4437


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_parameters": None, "rope_theta": 5e6}, {"rope_theta": 5e6}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e6}, {"rope_theta": 5e6}),
        ({"rope_parameters": {"rope_theta": 5000000, "rope_type": "default"}, "rope_theta": 1.0}, {"rope_theta": 5e6}),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 3.0}, {"rope_theta": 3.0}),
        ({"rope_parameters": None}, {"rope_theta": 1e6}),
        ({"tie_embedding": False}, {"tie_word_embeddings": False}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ({"tie_embedding": False, "tie_word_embeddings": True}, {"tie_word_embeddings": False}),
        ({"dtype": None, "torch_dtype": "float16"}, {"dtype": "float16"}),
        ({"dtype": "float32", "torch_dtype": "float16"}, {"dtype": "float32"}),
        ({"eos_token_id": [7, 2]}, {"eos_token_ids": (7, 2)}),
        ({"eos_token_id": None}, {"eos_token_ids": ()}),
        ({"head_dim": 128}, {"head_dim": 128}),
        ({"head_dim": None}, {"head_dim": 64}),
        ({"norm_eps": 1}, {"norm_eps": 1.0}),
        ({"num_dense_layers": 0}, {"num_dense_layers": 0}),
        ({"layer_types": None, "full_attn_idxs": [0, 39]}, {"layer_types": (ATTENTION, *[CONV] * 38, ATTENTION)}),
    ],
)
def test_spellings(change: dict[str, Any], expected: dict[str, Any]) -> None:
    raw = {key: value for key, value in (RAW_24B | change).items() if value is not None or key == "eos_token_id"}
    assert parse_hf_config(raw) == replace(PRESETS["lfm2-24b-a2b"], **expected)


@pytest.mark.parametrize(
    "change", [{"rope_theta": 5e6}, {"tie_embedding": False}, {"tie_embedding": False, "rope_theta": 2.0}]
)
def test_transformers_gives_the_same_precedence(change: dict[str, Any]) -> None:
    raw = RAW_24B | {"tie_word_embeddings": True} | change
    oracle, config = Lfm2MoeConfig(**json.loads(json.dumps(raw))), parse_hf_config(raw)
    assert config.rope_theta == oracle.rope_parameters["rope_theta"]
    assert config.tie_word_embeddings == oracle.tie_word_embeddings


CASES = {
    **PRESETS,
    "dense": DENSE,
    "everything else": replace(
        TINY,
        conv_L_cache=5,
        conv_bias=True,
        tie_word_embeddings=False,
        use_expert_bias=False,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
        rope_theta=5e6,
        eos_token_ids=(7, 2),
        bos_token_id=3,
        pad_token_id=4,
        head_dim=16,
        norm_eps=1e-6,
        dtype="float32",
        num_dense_layers=0,
    ),
    "no eos": replace(TINY, eos_token_ids=()),
}


@pytest.mark.parametrize("name", CASES)
def test_config_survives_the_round_trip(name: str, caplog: pytest.LogCaptureFixture) -> None:
    raw = json.loads(json.dumps(to_hf_config(CASES[name])))
    assert parse_hf_config(raw) == CASES[name]
    assert caplog.text == ""


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(config)))
    oracle = AutoConfig.from_pretrained(tmp_path)
    assert oracle.model_type == config.model_type
    for field in ("hidden_size", "intermediate_size", "conv_L_cache", "norm_eps", "vocab_size", "tie_word_embeddings"):
        assert getattr(oracle, field) == getattr(config, field), field
    assert oracle.rope_parameters["rope_theta"] == config.rope_theta
    assert getattr(oracle, "head_dim", oracle.hidden_size // oracle.num_attention_heads) == config.head_dim
    oracle.save_pretrained(tmp_path / "again")
    assert ModelConfig.from_folder(tmp_path / "again") == config


@pytest.mark.parametrize(
    ("model_type", "architectures"),
    [
        ("lfm2_vl", ["Lfm2VlForConditionalGeneration"]),
        ("lfm3", ["Lfm3ForCausalLM"]),
        ("llama", ["LlamaForCausalLM"]),
        (None, None),
        (["lfm2"], None),
        ("lfm2_moe", ["Lfm2ForCausalLM"]),
        ("lfm2_moe", "Lfm2MoeForCausalLM"),
    ],
)
def test_another_architecture_is_refused_with_what_is_allowed(model_type: object, architectures: object) -> None:
    text = error_of(RAW_24B | {"model_type": model_type, "architectures": architectures})
    assert repr(model_type) in text
    assert repr(architectures) in text
    assert "lfm2_moe with Lfm2MoeForCausalLM, lfm2 with Lfm2ForCausalLM" in text


def test_all_missing_keys_are_listed_at_once() -> None:
    missing = ["vocab_size", "hidden_size", "moe_intermediate_size", "num_experts", "layer_types", "num_hidden_layers"]
    text = error_of(without(RAW_24B, *missing))
    assert all(name in text.split("lacks ")[1].split(".")[0] for name in missing)
    assert "has " not in text  # nothing is called wrong that only depends on what is missing


def test_all_wrong_values_are_listed_at_once() -> None:
    wrong = {"hidden_size": "2048", "conv_bias": 0, "norm_eps": "small", "num_experts": True, "eos_token_id": "</s>"}
    text = error_of(RAW_24B | wrong)
    assert all(f"{name}={value!r}" in text for name, value in wrong.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 10**30),
        ("vocab_size", 65536.0),
        ("num_hidden_layers", 10**9),
        ("num_experts", 10**6),
        ("hidden_size", -1),
        ("norm_eps", float("nan")),
        ("norm_eps", float("inf")),
        ("norm_eps", 10**400),
        ("norm_eps", 0),
        ("routed_scaling_factor", True),
        ("layer_types", "conv"),
        ("layer_types", [["conv"]] * 40),
        ("eos_token_id", [7, 65536]),
        ("eos_token_id", [[7]]),
        ("eos_token_id", -1),
        ("bos_token_id", 65536),
        ("dtype", "int8"),
        ("dtype", ["bfloat16"]),
        ("tie_word_embeddings", "yes"),
        ("rope_parameters", "default"),
        ("rope_theta", "1e6"),
        ("sliding_window", 4096),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("quantization_config", {"bits": 4, "quant_method": "awq"}),
        ("quantization", {"bits": 4}),
        ("num_heads", 16),
        ("block_dim", 1024),
        ("block_norm_eps", 1e-6),
        ("head_dim", 0),
    ],
)
def test_a_wrong_value_is_named(name: str, value: object) -> None:
    text = error_of(RAW_24B | {name: value})
    assert f"has {name}=" in text
    assert len(text) < 400


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "llama3", "longrope", 3])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_types_that_do_not_exist_are_refused_by_name(key: str, kind: object) -> None:
    assert f"{key}.rope_type={kind!r}" in error_of(RAW_24B | {key: {"rope_type": kind, "factor": 4.0}})


def test_a_default_rope_with_further_parameters_is_refused() -> None:
    nested = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    assert "partial_rotary_factor" in error_of(RAW_24B | {"rope_parameters": nested})


def test_attention_index_beyond_the_layers_is_refused() -> None:
    assert "full_attn_idxs=[40]" in error_of(without(RAW_24B, "layer_types") | {"full_attn_idxs": [40]})


def test_hidden_size_that_the_heads_do_not_divide_is_refused() -> None:
    assert "hidden_size=2050" in error_of(RAW_24B | {"hidden_size": 2050})


def test_a_wrong_number_of_layer_types_is_refused() -> None:
    assert "layer_types has 39 entries" in error_of(RAW_24B | {"layer_types": [CONV] * 39})


def test_a_huge_wrong_value_is_cut_in_the_message() -> None:
    assert len(error_of(RAW_24B | {"dtype": "x" * 100_000})) < 400


def test_unknown_keys_are_named_in_one_warning_and_known_harmless_ones_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parse_hf_config(RAW_24B | {"mystery_scale": 2.0, "auto_map": {}, "use_cache": False, "model_name": "x"})
    assert len(caplog.records) == 1
    assert "auto_map, mystery_scale" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '"config"'])
def test_a_file_that_is_no_json_object_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)
