"""Load balancing without an auxiliary loss, and what the recorder counts."""

import pytest
import torch

from lfm.kernels.router import route_ref
from lfm.kernels.weights import Norm, Router
from lfm.train.batches import collate
from lfm.train.ops import train_ops
from lfm.train.routing import RouteRecorder, balance_experts, load_entropy, route_train
from tests.train.models import ATTENTION, CONV, lively_model, random_rows, tiny_config

torch.set_num_threads(1)


def test_balancing_drives_the_load_of_skewed_data_toward_uniform() -> None:
    """Every token is near one direction, so a router without a bias sends nearly all of them to the same experts."""
    config = tiny_config((CONV, CONV), num_dense_layers=1, num_experts=16, num_experts_per_tok=2)
    model = lively_model(config)
    layer = model.model.layers[1]
    layer.feed_forward.expert_bias.zero_()
    generator = torch.Generator().manual_seed(0)
    h_TD = 2 * torch.randn(16, generator=generator) + torch.randn(2000, 16, generator=generator)
    recorder = RouteRecorder(config, torch.device("cpu"))
    balances = []
    for _ in range(150):
        recorder.reset_load()
        recorder.begin()
        moe = layer.feed_forward
        recorder.route(h_TD, layer.ffn_norm.norm, Router(moe.gate.weight, moe.expert_bias, 2, True, 1.0))
        recorder.end()
        balances.append(load_entropy(recorder.load_ME)[0])
        balance_experts(model, recorder.load_ME, rate=0.01)
    assert balances[0] < 0.8
    assert balances[-1] > 0.98
    assert moe.expert_bias.dtype == torch.float32


def test_a_bias_moves_against_the_load_by_the_rate() -> None:
    model = lively_model(tiny_config((CONV, ATTENTION)))
    moe = model.model.layers[1].feed_forward
    before = moe.expert_bias.clone()
    balance_experts(model, torch.tensor([[10, 0, 4, 4, 4, 2]]), rate=0.5)
    torch.testing.assert_close(moe.expert_bias - before, torch.tensor([-0.5, 0.5, 0.0, 0.0, 0.0, 0.5]))


def test_every_token_counts_once_per_layer_and_chosen_expert() -> None:
    config = tiny_config((CONV, ATTENTION, CONV))
    model = lively_model(config)
    recorder = RouteRecorder(config, torch.device("cpu"))
    batch = collate(random_rows([5, 9]))
    for _ in range(2):
        recorder.begin()
        model(batch.forward, None, train_ops(recorder))
        recorder.end()
    assert recorder.load_ME.sum(1).tolist() == [2 * batch.num_tokens * config.num_experts_per_tok] * 2
    recorder.reset_load()
    assert not recorder.load_ME.any()


def test_the_z_loss_is_the_mean_square_of_the_log_sum_of_the_logits() -> None:
    config = tiny_config((CONV, CONV), num_dense_layers=1)
    recorder = RouteRecorder(config, torch.device("cpu"))
    gate = torch.zeros(6, 16)
    recorder.begin()
    recorder.route(torch.randn(4, 16), Norm(torch.ones(16), 1e-5), Router(gate, None, 2, True, 1.0))
    z_loss = recorder.end()
    torch.testing.assert_close(z_loss, torch.tensor(6.0).log().square())


def test_a_model_without_experts_has_no_router_loss() -> None:
    config = tiny_config((CONV, ATTENTION), num_dense_layers=2)
    recorder = RouteRecorder(config, torch.device("cpu"))
    recorder.begin()
    assert recorder.end() is None


def test_the_entropy_tells_uniform_from_collapsed() -> None:
    uniform, collapsed = load_entropy(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]]))
    assert abs(uniform - 1) < 1e-12
    assert collapsed == 0
    assert load_entropy(torch.tensor([[7]])) == [1.0]


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_router_in_training_chooses_and_weighs_as_the_one_that_serves(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    h_TD, gate_ED = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((50, 16), (8, 16)))
    bias = torch.randn(8, generator=generator) if has_bias else None
    norm = Norm(torch.rand(16, generator=generator, dtype=torch.float64), 1e-5)
    router = Router(gate=gate_ED, bias=bias, num_chosen=3, normalise=True, scale=1.5)
    *mine, z_loss, load_E = route_train(h_TD, norm, router)
    theirs = route_ref(h_TD, norm, router)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert load_E.tolist() == torch.bincount(theirs[1].flatten(), minlength=8).tolist()
    logits_TE = theirs[0] @ gate_ED.T
    torch.testing.assert_close(z_loss, logits_TE.logsumexp(-1).square().mean())
