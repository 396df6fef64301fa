"""The presets' exact shapes, the name table against the module, and random weights."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lfm.config import ModelConfig
from lfm.model.full_forward import full_logits
from lfm.model.lfm2 import Lfm2
from lfm.model.names import checkpoint_slots, expected_slots, parameter_shapes
from lfm.model.presets import INIT_STD, PRESETS, fill_random
from lfm.model.sizes import num_active_parameters, num_parameters

CPU = torch.device("cpu")
TINY = PRESETS["tiny"]
VARIANTS = {
    **PRESETS,
    "untied, conv bias, no expert bias": replace(
        TINY, tie_word_embeddings=False, conv_bias=True, use_expert_bias=False
    ),
    "all dense": replace(TINY, num_dense_layers=8),
    "no dense": replace(TINY, num_dense_layers=0, head_dim=16),
}


def make_meta(config: ModelConfig) -> Lfm2:
    with torch.device("meta"):
        return Lfm2(config)


def make_random(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Lfm2:
    model = make_meta(config)
    fill_random(model, device=CPU, dtype=dtype, seed=seed)
    return model


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [("lfm2-24b-a2b", 23_843_661_440, 2_326_879_488), ("lfm2-8b-a1b", 8_339_930_560, 1_557_740_288)],
)
def test_published_parameter_counts(preset: str, total: int, active: int) -> None:
    config = PRESETS[preset]
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == total
    assert sum(math.prod(slot.shape) for slot in checkpoint_slots(config).values()) == total
    assert num_parameters(config) == total
    assert num_active_parameters(config) == active


def test_24b_checkpoint_has_7610_tensors() -> None:
    assert len(checkpoint_slots(PRESETS["lfm2-24b-a2b"])) == 7610


@pytest.mark.parametrize("name", VARIANTS)
def test_name_table_is_the_modules_own(name: str) -> None:
    state = make_meta(VARIANTS[name]).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == parameter_shapes(VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_slots_cover_every_element_of_every_parameter_once(name: str) -> None:
    config = VARIANTS[name]
    covered = dict.fromkeys(parameter_shapes(config), 0)
    places = set()
    for slot in checkpoint_slots(config).values():
        covered[slot.parameter] += math.prod(slot.shape)
        places.add((slot.parameter, slot.expert, slot.row))
    assert covered == {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    assert len(places) == len(checkpoint_slots(config))


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_a_fused_layout_is_recognised_by_its_names(suffix: str) -> None:
    fused = {name + suffix if "_proj" in name and ".experts." in name else name for name in parameter_shapes(TINY)}
    assert expected_slots(TINY, fused).keys() == fused


def test_tiny_has_everything_switched_on_and_is_small() -> None:
    assert num_parameters(TINY) < 3_000_000
    assert len(TINY.conv_layers) == 3 * len(TINY.attention_layers)
    assert 0 < TINY.num_moe_layers < TINY.num_hidden_layers
    assert TINY.num_experts_per_tok == 4 < TINY.num_experts
    assert TINY.use_expert_bias
    assert TINY.num_key_value_heads < TINY.num_attention_heads
    assert TINY.max_position_embeddings == 32_768
    assert TINY.vocab_size > 16 + 256  # special tokens and bytes, and ids beyond them that must be masked


def test_random_weights_are_normal_with_neutral_norms_and_biases() -> None:
    model = make_random(replace(TINY, conv_bias=True, tie_word_embeddings=False))
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        else:
            error = INIT_STD / math.sqrt(2 * tensor.numel())
            assert abs(tensor.std().item() - INIT_STD) < 5 * error, name
            assert abs(tensor.mean().item()) < 5 * INIT_STD / math.sqrt(tensor.numel()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_is_as_asked_but_expert_biases_stay_fp32(dtype: torch.dtype) -> None:
    for name, tensor in make_random(TINY, dtype).state_dict().items():
        assert tensor.dtype == (torch.float32 if "expert_bias" in name else dtype)


def test_a_seed_gives_the_same_weights_in_every_dtype_and_another_seed_others() -> None:
    first, wide, other = make_random(TINY), make_random(TINY, torch.float64), make_random(TINY, seed=1)
    for name, tensor in make_random(TINY).state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])
        assert torch.equal(tensor.double(), wide.state_dict()[name].double())
    embeddings = "model.embed_tokens.weight"
    assert not torch.equal(first.state_dict()[embeddings], other.state_dict()[embeddings])


def test_experts_of_one_layer_differ() -> None:
    experts = make_random(TINY).state_dict()["model.layers.2.feed_forward.experts.gate_up_proj"]
    assert not torch.equal(experts[0], experts[1])


def test_a_random_tiny_model_runs() -> None:
    logits = full_logits(make_random(TINY), [list(range(12))])[0]
    assert logits.shape == (12, TINY.vocab_size)
    assert logits.isfinite().all()


@pytest.mark.gpu
def test_random_weights_are_made_on_the_gpu() -> None:
    model = make_meta(TINY)
    fill_random(model, device=torch.device("cuda"), dtype=torch.bfloat16, seed=0)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}


@pytest.mark.slow
def test_presets_and_sources_load_no_torch() -> None:
    modules = "lfm.model.presets, lfm.model.source, lfm.model.hub, lfm.model.hf_config, lfm.model.checkpoint_files"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
