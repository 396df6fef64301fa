"""Router and experts in one chain of launches on a CPU, in fp32, against the references."""

import pytest
import torch
from torch import Tensor

from lfm.kernels.experts import experts_ref
from lfm.kernels.moe_chain import moe_chain, route_count
from lfm.kernels.moe_prefill import CHUNK_PAIRS, place_pairs, sort_pairs
from lfm.kernels.norm import rms_norm_ref
from lfm.kernels.router import route_ref
from lfm.kernels.weights import Norm, Router
from tests.kernels.interpreted import IS_INTERPRETED, run_interpreted
from tests.kernels.moe import Layer, Sizes, make_layer

if not IS_INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    # Rows that fill up a tile are whatever memory holds; they are computed, and not written.
    pytestmark = [
        pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
        pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    ]
    SMALL = Sizes(hidden=64, experts=6, width=64, chosen=4)
    WIDE = Sizes(hidden=192, experts=20, width=64, chosen=2)

    def case(num_tokens: int, sizes: Sizes, *, bias: bool) -> tuple[Layer, Norm, Router, Norm]:
        layer = make_layer(num_tokens, sizes, dtype=torch.float32)
        draw = torch.Generator().manual_seed(num_tokens)
        gate = torch.randn(sizes.experts, sizes.hidden, generator=draw) * sizes.hidden**-0.5
        shift = 0.2 * torch.randn(sizes.experts, generator=draw) if bias else None
        norm, behind = (Norm(1 + 0.3 * torch.randn(sizes.hidden, generator=draw), 1e-5) for _ in range(2))
        return layer, norm, Router(gate, shift, sizes.chosen, bias, 1.7), behind

    def expected(layer: Layer, norm: Norm, router: Router, is_real: Tensor | None) -> Tensor:
        routed = route_ref(layer.h, norm, router, is_real)
        return experts_ref(layer.h, *routed, layer.gate_up, layer.down)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("num_tokens", "sizes"), [(1, SMALL), (63, SMALL), (130, SMALL), (129, WIDE)])
    def test_chain(num_tokens: int, sizes: Sizes, bias: bool) -> None:
        layer, norm, router, behind = case(num_tokens, sizes, bias=bias)
        out, following = moe_chain(layer.h, norm, router, None, layer.gate_up, layer.down, behind)
        right = expected(layer, norm, router, None)
        torch.testing.assert_close(out, right)
        torch.testing.assert_close(following, rms_norm_ref(right, behind))

    @pytest.mark.parametrize("num_real", [0, 40, 65])
    def test_padding_chooses_nothing_and_keeps_its_h(num_real: int) -> None:
        layer, norm, router, behind = case(70, SMALL, bias=True)
        is_real = (torch.arange(70) < num_real).long()
        layer.h[num_real:] = 3e38  # its norm overflows
        out, following = moe_chain(layer.h, norm, router, is_real, layer.gate_up, layer.down, behind)
        right = expected(layer, norm, router, is_real)
        torch.testing.assert_close(out[:num_real], right[:num_real])
        torch.testing.assert_close(following[:num_real], rms_norm_ref(right, behind)[:num_real])
        assert torch.equal(out[num_real:], layer.h[num_real:])

    def test_rows_of_nan_spoil_no_neighbour() -> None:
        layer, norm, router, behind = case(70, SMALL, bias=True)
        clean, _ = moe_chain(layer.h, norm, router, None, layer.gate_up, layer.down, behind)
        layer.h[11] = float("nan")
        out, _ = moe_chain(layer.h, norm, router, None, layer.gate_up, layer.down, behind)
        others = torch.arange(70) != 11
        assert torch.equal(out[others], clean[others])
        assert out[11].isnan().all()

    @pytest.mark.parametrize("num_tokens", [1, 64, 200])
    def test_its_histogram_is_that_of_the_sort(num_tokens: int) -> None:
        layer, norm, router, _ = case(num_tokens, SMALL, bias=True)
        is_real = (torch.arange(num_tokens) % 7 != 3).long()
        chosen, _, scale, count = route_count(layer.h, norm, router, is_real)
        for chunk, ids in enumerate(chosen.flatten().split(CHUNK_PAIRS)):
            assert torch.equal(
                count[chunk].long(),
                ids.bincount(minlength=count.shape[1])[: count.shape[1]]
                * (torch.arange(count.shape[1]) < SMALL.experts),
            )
        torch.testing.assert_close(scale, (layer.h.square().mean(1) + norm.eps).rsqrt())
        num_pairs = int((chosen < SMALL.experts).sum())
        mine, other = place_pairs(chosen, count, SMALL.experts, is_late=True), sort_pairs(chosen, SMALL.experts)
        assert torch.equal(mine.order_P[:num_pairs], other.order_P[:num_pairs])
        assert int(mine.num_tiles_1) == int(other.num_tiles_1)
        assert torch.equal(mine.tile_M3[: int(mine.num_tiles_1)], other.tile_M3[: int(other.num_tiles_1)])
