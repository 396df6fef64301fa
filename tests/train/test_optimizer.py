"""The schedule, clipping, Muon, and fp32 masters beside bf16 weights."""

import math
from itertools import pairwise

import pytest
import torch

from lfm.train.masters import MasterWeights
from lfm.train.models import build_model, random_weights
from lfm.train.optimizer import clip_gradients, gradient_norm, learning_rate_at, make_optimizers, orthogonalise
from lfm.train.recipe import OptimizerSettings, ScheduleSettings
from tests.train.models import lively_model, lively_weights, tiny_config

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_the_rate_warms_up_and_then_follows_a_cosine_to_its_last_value() -> None:
    schedule = ScheduleSettings(steps=110, warmup_steps=10, final_ratio=0.1)
    rates = [learning_rate_at(step, 2.0, schedule) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[109] == pytest.approx(0.2, rel=0.01)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_clipping_scales_all_gradients_by_one_factor() -> None:
    a, b = torch.zeros(2), torch.zeros(1)
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert gradient_norm([a, b]).item() == 5.0
    clip_gradients([a, b], norm=5.0, max_norm=1.0)
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.0]))
    clip_gradients([a, b], norm=1.0, max_norm=2.0)
    torch.testing.assert_close(b.grad, torch.tensor([0.8]))


def test_clipping_leaves_gradients_that_are_not_finite() -> None:
    a = torch.zeros(2)
    a.grad = torch.tensor([1.0, math.nan])
    norm = gradient_norm([a]).item()
    assert math.isnan(norm)
    clip_gradients([a], norm=norm, max_norm=0.1)
    assert a.grad[0] == 1.0


@pytest.mark.parametrize("shape", [(2, 8, 20), (2, 20, 8), (1, 6, 6)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    values = torch.linalg.svdvals(orthogonalise(update))
    assert values.min() > 0.4
    assert values.max() < 1.3


def test_every_parameter_is_optimised_once_and_hidden_matrices_by_muon() -> None:
    model = lively_model(tiny_config()).requires_grad_()
    parameters = dict(model.named_parameters())
    optimizers = make_optimizers(parameters, OptimizerSettings(learning_rate=0.1, name="muon"))
    adamw, muon = ([p for g in o.param_groups for p in g["params"]] for o in optimizers.all)
    names = {id(p): name for name, p in parameters.items()}
    assert sorted(names[id(p)] for p in [*adamw, *muon]) == sorted(parameters)
    by_adamw = {names[id(p)].partition("layers.")[2].partition(".")[2] or names[id(p)] for p in adamw}
    assert by_adamw == {
        "model.embed_tokens.weight", "model.embedding_norm.weight", "operator_norm.weight", "ffn_norm.weight",
        "conv.conv.weight", "self_attn.q_layernorm.weight", "self_attn.k_layernorm.weight",
        "feed_forward.gate.weight",
    }  # fmt: skip


def test_muon_gives_stacked_matrices_the_update_of_each_alone() -> None:
    """The experts, and gate and up of each, know nothing of each other; all layers of one shape go together."""
    config = tiny_config()
    model = lively_model(config).requires_grad_()
    parameters = dict(model.named_parameters())
    settings = OptimizerSettings(learning_rate=0.1, name="muon", weight_decay=0.0, momentum=0.0)
    optimizers = make_optimizers(parameters, settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    stacked = parameters["model.layers.1.feed_forward.experts.gate_up_proj"]
    before = stacked.detach().clone()
    optimizers.step(0.1)
    width = config.moe_intermediate_size
    up_of_expert_2 = slice(width, 2 * width)
    alone = orthogonalise(stacked.grad[2:3, up_of_expert_2])[0]
    expected = before[2, up_of_expert_2] - 0.1 * 0.2 * math.sqrt(config.hidden_size) * alone
    torch.testing.assert_close(stacked[2, up_of_expert_2], expected)


def test_masters_take_steps_that_bf16_cannot() -> None:
    """A thousand steps of 1e-4 on weights near 1: in bf16 alone each of them would be rounded away."""
    config = tiny_config()
    model = build_model(config, device=CPU, dtype=torch.bfloat16)
    masters = MasterWeights(model, random_weights(config, std=0.02, seed=0))
    norm = model.model.embedding_norm.weight
    for _ in range(1000):
        masters.tensors["model.embedding_norm.weight"] -= 1e-4
        masters.round_into_model()
    assert norm.dtype == torch.bfloat16
    torch.testing.assert_close(norm.float(), torch.full((16,), 0.9), atol=4e-3, rtol=0)


def test_gradients_of_a_bf16_model_add_up_in_fp32() -> None:
    config = tiny_config()
    model = build_model(config, device=CPU, dtype=torch.bfloat16)
    masters = MasterWeights(model, lively_weights(config))
    norm = model.model.embedding_norm.weight
    for scale in (256.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
        (norm * scale).sum().backward()
    gradient = masters.tensors["model.embedding_norm.weight"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert (gradient == 258).all()
    assert norm.grad is None
    masters.clear_gradients()
    assert not masters.tensors["model.embedding_norm.weight"].grad.any()


def test_an_fp32_model_is_its_own_master() -> None:
    config = tiny_config()
    model = build_model(config, device=CPU, dtype=torch.float32)
    weights = lively_weights(config)
    masters = MasterWeights(model, weights)
    assert masters.tensors["model.embed_tokens.weight"] is model.model.embed_tokens.weight
    torch.testing.assert_close(model.model.embed_tokens.weight.detach(), weights["model.embed_tokens.weight"])
