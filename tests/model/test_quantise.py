"""Weights in fp8: which, how exactly, and the same whether they come from a file, a preset or a model in memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lfm.kernels.fp8 import FP8, FP8_MAX, quantise_rows
from lfm.kernels.weights import scaled
from lfm.model.full_forward import full_logits
from lfm.model.lfm2 import Experts, Lfm2, Weight
from lfm.model.names import is_quantised
from lfm.model.pack import pack
from lfm.model.presets import PRESETS, fill_random
from lfm.model.quantise import quantise
from lfm.model.weights import load_weights, save_weights
from tests.engine.models import random_model, tiny_config

CPU = torch.device("cpu")
LEFT_ALONE = ("norm", "embed_tokens", "lm_head", "gate.weight", "conv.conv", "bias")


def state_of(model: Lfm2) -> dict[str, torch.Tensor]:
    """Every weight, and every scale under its weight's name."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Weight) and module.scale is not None:
            state[f"{name}.scale"] = module.scale
        if isinstance(module, Experts) and module.scales is not None:
            state |= {f"{name}.{part}_scale": scale for part, scale in module.scales._asdict().items()}
    return state


def assert_equal_states(model: Lfm2, other: Lfm2) -> None:
    ours, theirs = state_of(model), state_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.float(), theirs[name].float()), name


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 3e4])
def test_a_value_is_off_by_a_sixteenth_at_most(size: float) -> None:
    values = (torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * size).bfloat16()
    quantised, scale = quantise_rows(values)
    assert quantised.dtype == FP8
    assert torch.equal(quantised.float().abs().amax(1), torch.full((7,), FP8_MAX))
    error = (scaled(quantised, scale, torch.float64) - values.double()).abs()
    allowed = torch.maximum(values.double().abs() * 2**-4, scale.double()[:, None] * 2**-10)
    assert (error <= allowed * 1.0001).all()


def test_a_row_of_zeros_stays_zero() -> None:
    quantised, scale = quantise_rows(torch.zeros(2, 8))
    assert torch.equal(scaled(quantised, scale, torch.float32), torch.zeros(2, 8))
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_projections_and_experts_are_quantised_and_nothing_else(preset: str) -> None:
    with torch.device("meta"):
        model = Lfm2(PRESETS[preset])
    for name, parameter in model.named_parameters():
        assert is_quantised(name) != any(part in name for part in LEFT_ALONE), name
        assert not is_quantised(name) or parameter.dim() >= 2


def test_a_quantised_model_computes_with_the_rounded_weights() -> None:
    """Against the same model in float64 whose weights were rounded to fp8 and back."""
    model, rounded = random_model(tiny_config()), random_model(tiny_config())
    quantise(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if is_quantised(name):
                parameter.copy_(scaled(*quantise_rows(parameter), torch.float64))
    rows = [[1, 9, 10, 11, 30], [8]]
    for got, expected in zip(full_logits(model, rows), full_logits(rounded, rows), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_packing_keeps_the_scales_of_the_parts() -> None:
    model = quantise(random_model(tiny_config()))
    before = {name: tensor.clone() for name, tensor in state_of(model).items()}
    logits = full_logits(model, [[1, 9, 10, 11]])[0]
    pack(model)
    after = state_of(model)
    assert all(torch.equal(after[name].float(), before[name].float()) for name in before)
    torch.testing.assert_close(full_logits(model, [[1, 9, 10, 11]])[0], logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("staging_bytes", [None, 80])
def test_loading_quantises_as_quantising_after_loading(
    tmp_path: Path, dtype: torch.dtype, staging_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`staging_bytes`: fewer than a row of the files needs, so that rows come one by one."""
    config = replace(tiny_config(), tie_word_embeddings=False)
    save_weights(random_model(config, dtype=dtype), tmp_path)
    if staging_bytes is not None:
        monkeypatch.setattr("lfm.model.weights._STAGING_BYTES", staging_bytes)

    def loaded(*, is_quantised: bool) -> Lfm2:
        with torch.device("meta"):
            model = Lfm2(config)
        load_weights(model, tmp_path, device=CPU, dtype=dtype, quantise=is_quantised)
        return model.requires_grad_(False)

    model = loaded(is_quantised=True)
    assert model.model.layers[0].conv.in_proj.weight.dtype == FP8
    assert_equal_states(model, quantise(loaded(is_quantised=False)))


def test_random_weights_are_the_same_and_then_quantised() -> None:
    def made(*, is_quantised: bool) -> Lfm2:
        with torch.device("meta"):
            model = Lfm2(PRESETS["tiny"])
        fill_random(model, device=CPU, dtype=torch.bfloat16, seed=3, is_quantised=is_quantised)
        return model.requires_grad_(False)

    assert_equal_states(made(is_quantised=True), quantise(made(is_quantised=False)))
