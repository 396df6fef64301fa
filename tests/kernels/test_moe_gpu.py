"""The router and the experts on a GPU, in bf16, against the references in float64.

A fast op may err 1.3 times as much as its reference in bf16 does, by the norm of the difference.
"""

import pytest
import torch
from torch import Tensor

from lfm.kernels import route_topk
from lfm.kernels.experts import experts, experts_ref
from lfm.kernels.router import route, route_ref
from lfm.kernels.weights import Norm, Router
from tests.kernels.moe import Layer, Sizes, make_layer

pytestmark = pytest.mark.gpu

LARGE = Sizes(hidden=2048, experts=64, width=1536, chosen=4)  # LFM2-24B
MEDIUM = Sizes(hidden=2048, experts=32, width=1792, chosen=4)  # LFM2-8B
TINY = Sizes(hidden=128, experts=8, width=64, chosen=2)
ALLOWED = 1.3


def layer_of(num_tokens: int, sizes: Sizes, *, popular: int | None = None, padding: int = 0) -> Layer:
    """A layer, with NaN in the memory that its intermediate results will get."""
    layer = make_layer(
        num_tokens, sizes, dtype=torch.bfloat16, device="cuda", popular=popular, padding=min(padding, num_tokens - 1)
    )
    for size in (1 << 10, 1 << 15, 1 << 20, 1 << 25, 1 << 28):
        torch.full((size,), float("nan"), device="cuda")
    return layer


def check(layer: Layer) -> None:
    exact = experts_ref(*(tensor if tensor.dtype == torch.int64 else tensor.double() for tensor in layer))
    added = exact - layer.h.double()

    def error(out: Tensor) -> float:
        return float((out.double() - exact).norm() / added.norm())

    fast, reference = error(experts(*layer)), error(experts_ref(*layer))
    assert fast <= ALLOWED * reference, f"{fast:.2e} against {reference:.2e}"


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 8, 16, 21, 64, 193, 385, 1021, 2049, 5000])
def test_experts_of_the_24b(num_tokens: int) -> None:
    check(layer_of(num_tokens, LARGE))


@pytest.mark.parametrize("num_tokens", [3, 16, 100, 250, 700, 3000])
def test_skewed_routing_with_padding_and_empty_experts(num_tokens: int) -> None:
    layer = layer_of(num_tokens, LARGE, popular=7, padding=3)
    layer.gate_up[7:] = layer.down[7:] = float("nan")
    check(layer)
    padding = layer.chosen[:, 0] == LARGE.experts
    assert torch.equal(experts(*layer)[padding], layer.h[padding])


@pytest.mark.parametrize("sizes", [MEDIUM, TINY])
@pytest.mark.parametrize("num_tokens", [1, 4, 9, 130, 600, 2500])
def test_experts_of_other_sizes(sizes: Sizes, num_tokens: int) -> None:
    check(layer_of(num_tokens, sizes, padding=1))


@pytest.mark.parametrize("num_tokens", [4, 40, 300, 2500])
def test_neighbours_do_not_change_a_token(num_tokens: int) -> None:
    layer = layer_of(num_tokens, LARGE)
    order = torch.randperm(num_tokens, device="cuda")
    shuffled = Layer(*(tensor[order] for tensor in layer[:4]), layer.gate_up, layer.down)
    assert torch.equal(experts(*layer)[order], experts(*shuffled))


def test_strided_input() -> None:
    layer = layer_of(10, LARGE)
    wide = torch.cat((layer.h, layer.x), dim=1)
    strided = layer._replace(h=wide[:, : LARGE.hidden], x=wide[:, LARGE.hidden :])
    assert torch.equal(experts(*strided), experts(*layer))


def router_of(num_tokens: int, sizes: Sizes, *, bias: bool) -> tuple[Tensor, Norm, Router]:
    generator = torch.Generator("cuda").manual_seed(num_tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    hidden, num_experts, _, num_chosen = sizes
    norm = Norm((1 + 0.1 * draw(hidden)).bfloat16(), 1e-5)
    gate = (draw(num_experts, hidden) * 0.02).bfloat16()
    router = Router(gate, 0.1 * draw(num_experts) if bias else None, num_chosen, True, 1.0)
    return (draw(num_tokens, hidden) * 3).bfloat16(), norm, router


@pytest.mark.parametrize("sizes", [LARGE, MEDIUM, TINY])
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33, 129, 384, 500, 5001])
@pytest.mark.parametrize("bias", [True, False])
def test_router_chooses_the_best_and_weighs_them_right(sizes: Sizes, num_tokens: int, bias: bool) -> None:
    h, norm, router = router_of(num_tokens, sizes, bias=bias)
    is_real = torch.arange(num_tokens, device="cuda") % 5 < 4 if bias else None
    x, chosen, weights = route(h, norm, router, None if is_real is None else is_real.long())
    expected_x, _, _ = route_ref(h, norm, router)
    # Two roundings, of the normalised value and of its product with the weight; a sum in another order can turn each.
    torch.testing.assert_close(x, expected_x, rtol=2**-6, atol=0)
    assert float((x != expected_x).double().mean()) < 1e-3
    if is_real is not None:
        assert bool((chosen[~is_real] == sizes.experts).all())
        x, chosen, weights = x[is_real], chosen[is_real], weights[is_real]
    scores = (x.double() @ router.gate.double().T).sigmoid()
    selection = scores if router.bias is None else scores + router.bias.double()
    worst_chosen = selection.gather(1, chosen).amin(1)
    best_left = selection.scatter(1, chosen, -torch.inf).amax(1)
    assert bool((worst_chosen >= best_left - 1e-5).all())
    assert bool((chosen.sort(1).values.diff(dim=1) > 0).all())
    exact = scores.gather(1, chosen)
    torch.testing.assert_close(weights.double(), exact / (exact.sum(1, keepdim=True) + 1e-6), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 5, 32])
def test_the_last_program_of_a_token_selects_with_the_same_bits(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many times, in a chain of launches that overlap: what the others wrote has to be seen."""
    h, norm, router = router_of(num_tokens, LARGE, bias=True)
    apart = route(h, norm, router)
    monkeypatch.setattr(route_topk, "MAX_SELECTING_TOKENS", 32)
    results = [route(h, norm, router) for _ in range(200)]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, apart, strict=True))
    assert not bool(route_topk.counters(h.device).any())


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 100, 1024])
def test_a_captured_layer_takes_new_inputs(num_tokens: int) -> None:
    h, norm, router = router_of(num_tokens, LARGE, bias=True)
    weights = layer_of(1, LARGE)

    def run() -> Tensor:
        return experts(h, *route(h, norm, router), weights.gate_up, weights.down)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        h.copy_(torch.randn(h.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"))
        graph.replay()
        assert torch.equal(captured, run())
