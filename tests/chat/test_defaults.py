"""Sampling defaults: table by shape, generation_config over it, the request over both."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lfm.chat.defaults import (
    RequestedSampling,
    SamplingDefaults,
    default_sampling,
    defaults_for_source,
    resolve_sampling,
)
from lfm.config import ModelConfig
from lfm.errors import ModelError
from lfm.protocol import SamplingParams
from tests.chat.checkpoints import tiny_config

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def published(
    model_type: str, *, layers: int, hidden: int = 2048, experts: int = 0, vocab_size: int = 65_536
) -> ModelConfig:
    return replace(
        tiny_config(vocab_size=vocab_size),
        model_type=model_type,
        num_hidden_layers=layers,
        layer_types=("conv",) * layers,
        hidden_size=hidden,
        num_dense_layers=2 if experts else layers,
        num_experts=experts,
        num_experts_per_tok=4 if experts else 0,
    )


LFM2_24B = published("lfm2_moe", layers=40, experts=64)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LFM2_24B, {"temperature": 0.1, "top_k": 50, "repetition_penalty": 1.05}),
        (
            published("lfm2_moe", layers=24, experts=32),
            {"temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
        ),
        (
            published("lfm2_moe", layers=24, experts=32, vocab_size=128_000),
            {"temperature": 0.2, "top_k": 80, "repetition_penalty": 1.05},
        ),
        *(
            (
                published("lfm2", layers=layers, hidden=hidden),
                {"temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
            )
            for layers, hidden in ((16, 1024), (16, 1536), (16, 2048), (30, 2048))
        ),
        (published("lfm2_moe", layers=40, experts=64, vocab_size=128_000), {}),
        (published("lfm2_moe", layers=4, hidden=64, experts=8), {}),
        (tiny_config(), {}),
    ],
)
def test_published_shapes_get_their_cards_values_and_others_none(
    config: ModelConfig, expected: dict[str, float]
) -> None:
    defaults = default_sampling(config)
    assert defaults.as_dict() == NEUTRAL | expected
    assert (defaults.origin == "neutral") == (expected == {})


def test_presets_are_neutral_even_in_a_published_shape() -> None:
    assert defaults_for_source(None, LFM2_24B) == SamplingDefaults()


def test_generation_config_wins_over_the_table() -> None:
    given = {"temperature": 0, "top_p": 0.9, "top_k": None, "eos_token_id": 7, "do_sample": True}
    defaults = default_sampling(LFM2_24B, given)
    assert defaults.as_dict() == NEUTRAL | {"temperature": 0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.05}
    assert defaults.origin == "generation_config.json over LFM2-24B-A2B's model card"
    assert default_sampling(tiny_config(), given).origin == "generation_config.json"


def test_a_generation_config_without_sampling_changes_nothing() -> None:
    given = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}
    assert default_sampling(LFM2_24B, given) == default_sampling(LFM2_24B)


def test_the_folders_file_is_read(tmp_path: Path) -> None:
    assert defaults_for_source(tmp_path, LFM2_24B) == default_sampling(LFM2_24B)
    (tmp_path / "generation_config.json").write_text(json.dumps({"min_p": 0.2}), encoding="utf-8")
    assert defaults_for_source(tmp_path, LFM2_24B).min_p == 0.2
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read as JSON"):
        defaults_for_source(tmp_path, LFM2_24B)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "0.1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 65_537),
        ("top_k", 5.0),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 10.1),
        ("repetition_penalty", [1.0]),
    ],
)
def test_values_that_no_request_may_have_are_refused(name: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json: {name}="):
        default_sampling(LFM2_24B, {name: value})


def test_omitted_fields_take_the_defaults() -> None:
    params = resolve_sampling(
        RequestedSampling(), defaults=default_sampling(LFM2_24B), max_tokens=9, stop_token_ids=(2, 7)
    )
    assert params == SamplingParams(
        max_tokens=9, temperature=0.1, top_k=50, repetition_penalty=1.05, stop_token_ids=(2, 7)
    )


def test_given_fields_are_taken_literally() -> None:
    requested = RequestedSampling(
        min_tokens=1,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={5: -100.0},
        seed=0,
        logprobs=0,
        prompt_logprobs=0,
    )
    params = resolve_sampling(requested, defaults=default_sampling(LFM2_24B), max_tokens=9, stop_token_ids=[7])
    assert params == SamplingParams(
        max_tokens=9,
        min_tokens=1,
        temperature=0.0,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={5: -100.0},
        seed=0,
        stop_token_ids=(7,),
        logprobs=0,
        prompt_logprobs=0,
    )


def test_greedy_keeps_the_models_penalty_unless_the_request_names_one() -> None:
    defaults = default_sampling(LFM2_24B)
    greedy = RequestedSampling(temperature=0)
    assert resolve_sampling(greedy, defaults=defaults, max_tokens=1, stop_token_ids=()).repetition_penalty == 1.05
    unpenalized = replace(greedy, repetition_penalty=1.0)
    assert resolve_sampling(unpenalized, defaults=defaults, max_tokens=1, stop_token_ids=()).repetition_penalty == 1.0
