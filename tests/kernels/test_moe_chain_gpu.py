"""Router and experts in one chain of launches on a GPU, in bf16, against the references in float64.

The chain may err 1.3 times as much as the references in bf16 do, by the norm of the difference.
"""

import pytest
import torch
from torch import Tensor

from lfm.kernels import moe as moe_module
from lfm.kernels.experts import experts_ref
from lfm.kernels.moe import moe
from lfm.kernels.moe_chain import moe_chain, route_count
from lfm.kernels.norm import rms_norm, rms_norm_ref
from lfm.kernels.router import route_ref
from lfm.kernels.weights import Norm, Router
from tests.kernels.moe import Layer, Sizes, make_layer

LARGE = Sizes(hidden=2048, experts=64, width=1536, chosen=4)  # LFM2-24B
MEDIUM = Sizes(hidden=2048, experts=32, width=1792, chosen=4)  # LFM2-8B
TINY = Sizes(hidden=128, experts=8, width=64, chosen=2)
ALLOWED = 1.3


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(), reason="needs compute capability 9.0")]


def case(num_tokens: int, sizes: Sizes, *, padding: int = 0) -> tuple[Layer, Norm, Router, Tensor, Norm]:
    """A layer, its norm and router, which tokens are real, the norm behind it; NaN in the memory that is free."""
    layer = make_layer(num_tokens, sizes, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(num_tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    norm, behind = (Norm((1 + 0.1 * draw(sizes.hidden)).bfloat16(), 1e-5) for _ in range(2))
    router = Router(
        (draw(sizes.experts, sizes.hidden) * 0.02).bfloat16(), 0.1 * draw(sizes.experts), sizes.chosen, True, 1.0
    )
    is_real = (torch.arange(num_tokens, device="cuda") < num_tokens - padding).long()
    for size in (1 << 10, 1 << 15, 1 << 20, 1 << 25, 1 << 28):
        torch.full((size,), float("nan"), device="cuda")
    return layer, norm, router, is_real, behind


def exact_scores(layer: Layer, norm: Norm, router: Router) -> Tensor:
    x = rms_norm_ref(layer.h.double(), Norm(norm.weight.double(), norm.eps))
    return (x @ router.gate.double().T).sigmoid()


def regret(chosen: Tensor, selection: Tensor) -> float:
    """How much better the best expert that was left out is than the worst one chosen."""
    left = selection.scatter(1, chosen, -torch.inf).amax(1)
    return float((left - selection.gather(1, chosen).amin(1)).clamp(min=0).max())


@pytest.mark.parametrize("sizes", [LARGE, MEDIUM, TINY])
@pytest.mark.parametrize("num_tokens", [1, 63, 900, 5001])
def test_router(sizes: Sizes, num_tokens: int) -> None:
    layer, norm, router, is_real, _ = case(num_tokens, sizes)
    chosen, weights, _, _ = route_count(layer.h, norm, router, is_real)
    _, plain_chosen, plain_weights = route_ref(layer.h, norm, router, is_real)
    scores = exact_scores(layer, norm, router)
    assert router.bias is not None
    selection = scores + router.bias.double()
    assert regret(chosen, selection) <= ALLOWED * regret(plain_chosen, selection) + 1e-3

    def error(chosen: Tensor, weights: Tensor) -> float:
        exact = scores.gather(1, chosen)
        return float((weights.double() - exact / (exact.sum(1, keepdim=True) + 1e-6)).norm())

    assert error(chosen, weights) <= ALLOWED * error(plain_chosen, plain_weights) + 1e-3  # four weights may be lucky
    assert bool((chosen.sort(1).values.diff(dim=1) > 0).all())


@pytest.mark.parametrize(("sizes", "num_tokens", "padding"), [
    (LARGE, 1, 0), (LARGE, 900, 3), (LARGE, 4096, 129), (LARGE, 8192, 0), (MEDIUM, 1500, 1), (TINY, 300, 7),
])  # fmt: skip
def test_chain(sizes: Sizes, num_tokens: int, padding: int) -> None:
    layer, norm, router, is_real, behind = case(num_tokens, sizes, padding=padding)
    args = layer.h, norm, router, is_real, layer.gate_up, layer.down
    out, following = moe_chain(*args, behind)
    assert all(torch.equal(moe_chain(*args, behind)[0], out) for _ in range(3)), "a moving result is a race"
    chosen, weights, _, _ = route_count(layer.h, norm, router, is_real)
    wide = layer.h.double()
    exact_x = rms_norm_ref(wide, Norm(norm.weight.double(), norm.eps))
    exact = experts_ref(wide, exact_x, chosen, weights.double(), layer.gate_up.double(), layer.down.double())
    plain = experts_ref(layer.h, rms_norm_ref(layer.h, norm), chosen, weights, layer.gate_up, layer.down)

    def error(got: Tensor) -> float:
        return float((got.double() - exact).norm())

    assert error(out) <= ALLOWED * error(plain)
    assert torch.equal(out[num_tokens - padding :], layer.h[num_tokens - padding :])
    torch.testing.assert_close(following, rms_norm(out, behind), rtol=2**-7, atol=0)


def test_a_captured_chain_takes_new_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_module, "MIN_CHAIN_TOKENS", 0)
    layer, norm, router, is_real, behind = case(1000, LARGE)

    def run() -> tuple[Tensor, Tensor | None]:
        return moe(layer.h, norm, router, is_real, layer.gate_up, layer.down, None, behind)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        layer.h.copy_(torch.randn(layer.h.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"))
        graph.replay()
        for mine, other in zip(captured, run(), strict=True):
            assert mine is not None
            assert other is not None
            assert torch.equal(mine, other)


@pytest.mark.parametrize("num_tokens", [900, 3000])
def test_neighbours_do_not_change_a_token(num_tokens: int) -> None:
    layer, norm, router, is_real, behind = case(num_tokens, LARGE)
    order = torch.randperm(num_tokens, device="cuda")
    out, following = moe_chain(layer.h, norm, router, is_real, layer.gate_up, layer.down, behind)
    other = moe_chain(layer.h[order], norm, router, is_real, layer.gate_up, layer.down, behind)
    assert torch.equal(out[order], other[0])
    assert torch.equal(following[order], other[1])
