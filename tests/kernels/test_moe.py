"""Router and experts against the formula, one token and one expert at a time."""

import pytest
import torch
from torch import Tensor

from lfm.kernels.experts import experts, experts_ref
from lfm.kernels.norm import dense_ref, project_add_ref, rms_norm_ref
from lfm.kernels.router import route_ref
from lfm.kernels.weights import Linear, Norm, Router

TOKENS, HIDDEN, EXPERTS, WIDTH = 7, 6, 5, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for a in range(chosen.shape[1]):
            expert = int(chosen[t, a])
            gate, up = (gate_up[expert] @ x[t]).chunk(2)
            out[t] += weights[t, a] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("num_chosen", [1, 2, 5])
def test_experts_equal_the_formula(num_tokens: int, num_chosen: int) -> None:
    x, gate_up, down = draw(num_tokens, HIDDEN), draw(EXPERTS, 2 * WIDTH, HIDDEN, seed=1), draw(EXPERTS, HIDDEN, WIDTH)
    chosen = torch.stack([torch.randperm(EXPERTS)[:num_chosen] for _ in range(num_tokens)])
    weights = draw(num_tokens, num_chosen, seed=2).abs()
    expected = naive_experts(x, chosen, weights, gate_up, down)
    torch.testing.assert_close(experts_ref(x, x, chosen, weights, gate_up, down), x + expected)


def test_experts_that_nobody_chose_are_skipped() -> None:
    x, gate_up, down = draw(TOKENS, HIDDEN), draw(EXPERTS, 2 * WIDTH, HIDDEN, seed=1), draw(EXPERTS, HIDDEN, WIDTH)
    gate_up[0] = gate_up[4] = float("nan")
    chosen = torch.tensor([[1, 3]] * TOKENS)
    weights = torch.full((TOKENS, 2), 0.5, dtype=torch.float64)
    got = experts_ref(x, x, chosen, weights, gate_up, down)
    torch.testing.assert_close(got, x + naive_experts(x, chosen, weights, gate_up, down))


def test_a_token_s_result_does_not_depend_on_its_neighbours() -> None:
    x, gate_up, down = draw(TOKENS, HIDDEN), draw(EXPERTS, 2 * WIDTH, HIDDEN, seed=1), draw(EXPERTS, HIDDEN, WIDTH)
    chosen = torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(TOKENS)])
    weights = draw(TOKENS, 3, seed=2)
    together = experts_ref(x, x, chosen, weights, gate_up, down)
    order = torch.randperm(TOKENS)
    shuffled = experts_ref(x[order], x[order], chosen[order], weights[order], gate_up, down)
    torch.testing.assert_close(together[order], shuffled)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 1000])
def test_grouped_experts_equal_the_reference_on_a_gpu(num_tokens: int) -> None:
    """bf16, shapes of the 24B's experts; an expert without tokens among them. Both are held against float64."""
    generator = torch.Generator("cuda").manual_seed(0)

    def weights_of(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").mul_(shape[-1] ** -0.5).bfloat16()

    x, gate_up, down = weights_of(num_tokens, 2048) * 45, weights_of(16, 3072, 2048), weights_of(16, 2048, 1536)
    scores = torch.rand(num_tokens, 15, generator=generator, device="cuda")
    chosen = scores.topk(4).indices
    shares = torch.rand(num_tokens, 4, generator=generator, device="cuda")
    h = torch.zeros_like(x)
    exact = experts_ref(h.double(), x.double(), chosen, shares.double(), gate_up.double(), down.double())

    def error(result: Tensor) -> float:
        return float((result.double() - exact).norm() / exact.norm())

    allowed = 1.2 * error(experts_ref(h, x, chosen, shares, gate_up, down))
    assert error(experts(h, x, chosen, shares, gate_up, down)) <= allowed


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_bias_selects_but_does_not_weigh(normalise: bool, has_bias: bool) -> None:
    x, gate = draw(TOKENS, HIDDEN), draw(EXPERTS, HIDDEN, seed=1)
    bias = torch.tensor([0.0, 9.0, 0.0, 0.0, -9.0]) if has_bias else None
    norm = Norm(draw(HIDDEN, seed=2), 1e-5)
    normed, chosen, weights = route_ref(x, norm, Router(gate, bias, 2, normalise, 2.5))
    torch.testing.assert_close(normed, rms_norm_ref(x, norm))
    scores = torch.sigmoid(normed @ gate.T)
    for t in range(TOKENS):
        ranked = sorted(range(EXPERTS), key=lambda e: -float(scores[t, e] + (bias[e] if has_bias else 0)))
        assert chosen[t].tolist() == ranked[:2]
        raw = scores[t, chosen[t]]
        expected = raw / (raw.sum() + 1e-6) if normalise else raw
        torch.testing.assert_close(weights[t], expected * 2.5)
    if has_bias:
        assert (chosen == 1).any(dim=1).all()


def test_projection_and_dense_feed_forward_add_the_residual() -> None:
    h, x, weight = draw(3, HIDDEN), draw(3, 4, seed=1), draw(HIDDEN, 4, seed=2)
    torch.testing.assert_close(project_add_ref(h, x, Linear(weight, None)), h + x @ weight.T)
    norm = Norm(draw(HIDDEN, seed=3), 1e-5)
    gate_up, down = draw(2 * WIDTH, HIDDEN, seed=4), draw(HIDDEN, WIDTH, seed=5)
    normed = h / (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    gate, up = (normed @ gate_up.T).chunk(2, dim=-1)
    expected = h + (gate * gate.sigmoid() * up) @ down.T
    torch.testing.assert_close(dense_ref(h, norm, Linear(gate_up), Linear(down)), expected)


def test_a_bf16_norm_accumulates_in_fp32() -> None:
    x = (draw(4, 512) * 100).bfloat16()
    ones = torch.ones(512, dtype=torch.bfloat16)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(rms_norm_ref(x, Norm(ones, 1e-5)), exact.float().bfloat16())
