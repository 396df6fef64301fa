"""The arithmetic on model shapes gives the published counts, and the limits that were computed independently of it."""

from dataclasses import replace

import pytest

from lfm.config import ModelConfig
from lfm.model.limits import PEAKS, Workload, experts_hit, limit_seconds
from lfm.model.presets import PRESETS
from lfm.model.sizes import (
    block_bytes,
    conv_state_bytes,
    format_bytes,
    kv_bytes_per_token,
    num_active_parameters,
    num_parameters,
    quantised_parameters,
    weight_bytes,
)

LFM2_24B, LFM2_8B = PRESETS["lfm2-24b-a2b"], PRESETS["lfm2-8b-a1b"]


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        pytest.param(LFM2_24B, 23_843_661_440, 2_326_879_488, id="LFM2-24B-A2B"),
        pytest.param(LFM2_8B, 8_339_930_560, 1_557_740_288, id="LFM2-8B-A1B"),
        pytest.param(replace(LFM2_8B, vocab_size=128_000), 8_467_856_832, 1_685_666_560, id="LFM2.5-8B-A1B"),
        pytest.param(replace(LFM2_24B, vocab_size=128_000), 23_971_587_712, 2_454_805_760, id="LFM2.5-24B-A2B"),
    ],
)
def test_parameter_counts_are_the_published_ones(config: ModelConfig, total: int, active: int) -> None:
    assert num_parameters(config) == total
    assert num_active_parameters(config) == active


def test_weight_bytes_are_the_checkpoint_s_with_selection_biases_in_fp32() -> None:
    checkpoint_bytes, num_biases = 47_687_322_880, 38 * 64
    assert weight_bytes(LFM2_24B, "bfloat16") == checkpoint_bytes + 2 * num_biases
    assert weight_bytes(LFM2_24B, "float32") == 4 * num_parameters(LFM2_24B)


def test_cache_bytes_are_the_published_ones() -> None:
    assert kv_bytes_per_token(LFM2_24B, "bfloat16") == 20_480
    assert conv_state_bytes(LFM2_24B, "bfloat16") == 245_760
    assert block_bytes(LFM2_24B, block_size=128, dtype="bfloat16") == 128 * 20_480 + 245_760
    assert kv_bytes_per_token(LFM2_8B, "bfloat16") == 12_288
    assert conv_state_bytes(LFM2_8B, "bfloat16") == 147_456


def dense_config(*, tied: bool = True, bias: bool = False) -> ModelConfig:
    return ModelConfig(
        model_type="lfm2",
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        layer_types=("conv", "full_attention"),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        num_dense_layers=2,
        conv_bias=bias,
        tie_word_embeddings=tied,
    )


def test_a_dense_model_is_counted_by_hand() -> None:
    conv = 12 * 4 + 4 * 4 + 4 * 3
    attention = 4 * 4 + 2 * (4 * 2) + 4 * 4 + 2 * 2
    feed_forwards, norms, embedding = 2 * 3 * 4 * 6, 5 * 4, 10 * 4
    total = conv + attention + feed_forwards + norms + embedding
    assert num_parameters(dense_config()) == num_active_parameters(dense_config()) == total
    assert num_parameters(dense_config(bias=True)) == total + 12 + 4 + 4


def test_an_untied_head_is_counted_and_the_embedding_lookup_is_not_active() -> None:
    tied, untied = dense_config(), dense_config(tied=False)
    assert num_parameters(untied) == num_parameters(tied) + 40
    assert num_active_parameters(untied) == num_active_parameters(tied)


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 4.0), (8, 25.8), (32, 55.9), (1024, 64.0)])
def test_uniform_routing_hits_the_expected_number_of_experts(num_tokens: int, expected: float) -> None:
    assert experts_hit(LFM2_24B, num_tokens) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("workload", "num_tokens", "published"),
    [
        pytest.param(Workload(name="b1", requests=1, input_tokens=128, output_tokens=512), 512, 920, id="b1"),
        pytest.param(Workload(name="b8", requests=8, input_tokens=128, output_tokens=256), 2048, 1_700, id="b8"),
        pytest.param(Workload(name="b32", requests=32, input_tokens=128, output_tokens=256), 8192, 3_300, id="b32"),
        pytest.param(Workload(name="p", requests=1, input_tokens=8192, output_tokens=1), 8192, 167_000, id="prefill"),
        pytest.param(
            Workload(name="b128", requests=128, input_tokens=1024, output_tokens=256), 128 * 1280, 43_000, id="b128"
        ),
        pytest.param(
            Workload(name="long", requests=16, input_tokens=30_000, output_tokens=256), 16 * 30_256, 96_000, id="long"
        ),
        pytest.param(
            Workload(name="agents", requests=256, input_tokens=256, output_tokens=64, shared_tokens=4096),
            256 * 64,
            14_700,
            id="agents",
        ),
    ],
)
def test_limits_agree_with_the_published_roofline(workload: Workload, num_tokens: int, published: float) -> None:
    """The published figures come from a separate script and are rounded: 4 % is what the two may differ by."""
    seconds = limit_seconds(LFM2_24B, workload, PEAKS["NVIDIA H200"])
    assert num_tokens / seconds == pytest.approx(published, rel=0.04)


def test_fewer_experts_hit_make_the_limit_faster() -> None:
    workload = Workload(name="b8", requests=8, input_tokens=128, output_tokens=256)
    uniform = limit_seconds(LFM2_24B, workload, PEAKS["NVIDIA H200"])
    skewed = limit_seconds(LFM2_24B, workload, PEAKS["NVIDIA H200"], decode_experts_hit=12.0)
    assert skewed < 0.7 * uniform


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(47_687_322_880, "47.7 GB"), (245_760, "245.8 kB"), (12, "12 B"), (3_400_000, "3.4 MB")]
)
def test_sizes_are_written_in_decimal_units(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_fp8_halves_bytes_and_operations_of_all_but_the_head() -> None:
    """Of the dossier's own figures: 1,709 tokens/s at batch 1 with the head in fp8 too, 299,000 of a prefill."""
    one = Workload(name="b1", requests=1, input_tokens=1, output_tokens=512)
    seconds = limit_seconds(LFM2_24B, one, PEAKS["NVIDIA H200"], quantize="fp8", kv_dtype="fp8")
    assert 512 / seconds == pytest.approx(1709, rel=0.05)
    prefill = Workload(name="prefill", requests=1, input_tokens=8192, output_tokens=1)
    seconds = limit_seconds(LFM2_24B, prefill, PEAKS["NVIDIA H200"], quantize="fp8")
    assert 8192 / seconds == pytest.approx(299_000, rel=0.03)


def test_weights_in_fp8_are_a_byte_each_and_four_per_row() -> None:
    in_bf16, in_fp8 = (weight_bytes(LFM2_24B, "bfloat16", quantize=kind) for kind in ("none", "fp8"))  # type: ignore[arg-type]
    count, rows = quantised_parameters(LFM2_24B)
    assert in_bf16 - in_fp8 == count - 4 * rows
    assert 24e9 < in_fp8 < 24.4e9
