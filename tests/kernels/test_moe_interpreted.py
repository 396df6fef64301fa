"""The kernels of the router and the experts on a CPU, in fp32, against the references."""

import pytest
import torch
from torch import Tensor

from lfm.kernels import moe_grouped, moe_grouped_fp8, moe_prefill_fp8, route_topk
from lfm.kernels.experts import experts_fp8_ref, experts_ref
from lfm.kernels.fp8 import quantise_rows
from lfm.kernels.moe_grouped import experts_grouped
from lfm.kernels.moe_grouped_fp8 import experts_grouped_fp8
from lfm.kernels.moe_prefill import experts_prefill, sort_pairs
from lfm.kernels.moe_prefill_fp8 import experts_prefill_fp8
from lfm.kernels.moe_small import experts_small
from lfm.kernels.route_topk import MAX_FEW_TOKENS, MAX_SPREAD_TOKENS, route_fast
from lfm.kernels.router import route_ref
from lfm.kernels.tuned import FOLDER, GroupedTiles, WeightKind, read_tables, replaced, tuned_for
from lfm.kernels.weights import ExpertScales, Norm, Router
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
    SMALL = Sizes(hidden=64, experts=6, width=128, chosen=3)

    def quantised(layer: Layer) -> tuple[object, ...]:
        """Arguments of `experts` with weights in fp8."""
        (gate_up, gate_up_scale), (down, down_scale) = quantise_rows(layer.gate_up), quantise_rows(layer.down)
        return *layer[:4], gate_up, down, ExpertScales(gate_up_scale, down_scale)

    @pytest.mark.parametrize("num_tokens", [1, 4])
    @pytest.mark.parametrize("sizes", [SMALL, Sizes(hidden=256, experts=3, width=64, chosen=2)])
    def test_pairs_one_by_one(num_tokens: int, sizes: Sizes) -> None:
        layer = make_layer(num_tokens, sizes, dtype=torch.float32)
        torch.testing.assert_close(experts_small(*layer), experts_ref(*layer))

    @pytest.mark.parametrize("num_tokens", [5, 70])
    @pytest.mark.parametrize("popular", [None, 3])
    def test_pairs_by_expert(num_tokens: int, popular: int | None) -> None:
        """`popular`: half of the experts have no pair, the others have more than one tile."""
        layer = make_layer(num_tokens, SMALL, dtype=torch.float32, popular=popular)
        torch.testing.assert_close(experts_grouped(*layer), experts_ref(*layer))

    TILES: list[tuple[WeightKind, GroupedTiles]] = sorted(
        {
            (kind, tiles._replace(tokens=1 << 62))
            for path in FOLDER.glob("*.json")
            for kind, table in read_tables(path).grouped.items()
            for tiles in table
        }
    )

    @pytest.mark.parametrize("has_copy_engine", [True, False])
    @pytest.mark.parametrize(("kind", "tiles"), TILES)
    def test_every_tile(
        kind: WeightKind, tiles: GroupedTiles, has_copy_engine: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(moe_grouped, "has_copy_engine", lambda device: has_copy_engine)
        layer = make_layer(27, Sizes(hidden=64, experts=4, width=64, chosen=2), dtype=torch.float32)
        args = quantised(layer) if kind == "fp8" else layer
        with replaced(tuned_for(torch.device("cpu"))._replace(grouped={"bf16": (tiles,), "fp8": (tiles,)})):
            torch.testing.assert_close(experts_grouped(*args), experts_ref(*args))

    @pytest.mark.parametrize(
        ("run", "num_tokens"), [(experts_small, 1), (experts_small, 4), (experts_grouped, 5), (experts_grouped, 70)]
    )
    def test_weights_in_fp8(run: object, num_tokens: int) -> None:
        """Half of the experts have no pair, two tokens are padding, and what padding names is NaN."""
        layer = make_layer(num_tokens, SMALL, dtype=torch.float32, popular=4, padding=min(2, num_tokens - 1))
        layer.gate_up[4:] = layer.down[4:] = float("nan")
        args = quantised(layer)
        got = run(*args)  # type: ignore[operator]
        torch.testing.assert_close(got, experts_ref(*args))
        assert torch.equal(run(*args), got)  # type: ignore[operator]

    @pytest.mark.parametrize("num_tokens", [7, 300])
    @pytest.mark.parametrize("popular", [None, 3])
    def test_many_pairs(num_tokens: int, popular: int | None) -> None:
        """900 pairs are four chunks of the sort; three experts have several tiles each, the others none."""
        layer = make_layer(num_tokens, SMALL, dtype=torch.float32, popular=popular, padding=2)
        torch.testing.assert_close(experts_prefill(*layer), experts_ref(*layer))

    @pytest.mark.parametrize("num_tokens", [7, 150])
    @pytest.mark.parametrize("run", [experts_prefill_fp8, experts_grouped_fp8])
    def test_both_operands_in_fp8(run: object, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter (3.7) loses the carry when it rounds to e4m3, so rounding itself is tested on a GPU."""
        for module in (moe_prefill_fp8, moe_grouped_fp8):
            monkeypatch.setattr(module, "quantise_tokens", quantise_rows)
        layer = make_layer(num_tokens, SMALL, dtype=torch.float32, popular=3, padding=2)
        args = quantised(layer)
        got, expected = run(*args), experts_fp8_ref(*args)  # type: ignore[operator]
        # An act next to a border of e4m3 may fall on its other side: off by 2^-4 of itself, in one of thousands. Where
        # the interpreter itself rounds act, a fiftieth of them loses its carry, and scales are per block.
        allowed = 2e-3 if run is experts_prefill_fp8 else 6e-2
        assert float((got - expected).norm() / expected.norm()) < allowed
        assert torch.equal(got[-2:], layer.h[-2:])

    @pytest.mark.parametrize("num_tokens", [1, 200])
    def test_many_pairs_are_sorted(num_tokens: int) -> None:
        chosen = make_layer(num_tokens, SMALL, dtype=torch.float32, padding=num_tokens // 9).chosen
        order, place, tiles, num_tiles = sort_pairs(chosen, SMALL.experts)
        flat = chosen.flatten()
        expected = flat.argsort(stable=True)[: int((flat < SMALL.experts).sum())].int()
        assert torch.equal(order[: len(expected)], expected)
        assert torch.equal(place[expected.long()], torch.arange(len(expected)).int())
        rows = [(expert, row) for expert, start, end in tiles[: int(num_tiles)].tolist() for row in range(start, end)]
        assert rows == [(int(flat[pair]), row) for row, pair in enumerate(expected)]

    @pytest.mark.parametrize("run", [experts_small, experts_grouped, experts_prefill])
    def test_padding_loads_no_expert_and_keeps_its_h(run: object) -> None:
        layer = make_layer(4, SMALL, dtype=torch.float32, padding=2, popular=4)
        layer.gate_up[4:] = layer.down[4:] = float("nan")
        got = run(*layer)  # type: ignore[operator]
        torch.testing.assert_close(got, experts_ref(*layer))
        assert torch.equal(got[2:], layer.h[2:])

    def test_only_padding() -> None:
        layer = make_layer(20, SMALL, dtype=torch.float32, padding=20)
        assert torch.equal(experts_grouped(*layer), layer.h)

    def routed(num_tokens: int, *, bias: bool, normalise: bool, padding: bool) -> tuple[tuple[Tensor, ...], ...]:
        """Fast and reference outputs; 6 experts, so that the tiles have rows to spare."""
        draw = torch.Generator().manual_seed(num_tokens)
        h = torch.randn(num_tokens, 128, generator=draw)
        norm = Norm(torch.rand(128, generator=draw) + 0.5, 1e-5)
        gate = torch.randn(6, 128, generator=draw) * 0.1
        bias_E = torch.randn(6, generator=draw) if bias else None
        router = Router(gate, bias_E, 3, normalise, 2.5)
        is_real = torch.randint(0, 2, (num_tokens,), generator=draw) if padding else None
        return route_fast(h, norm, router, is_real), route_ref(h, norm, router, is_real)

    @pytest.mark.parametrize("num_tokens", [1, 3, MAX_FEW_TOKENS, MAX_FEW_TOKENS + 1, MAX_SPREAD_TOKENS + 1])
    @pytest.mark.parametrize("bias", [True, False])
    def test_router(num_tokens: int, bias: bool) -> None:
        fast, reference = routed(num_tokens, bias=bias, normalise=bias, padding=bias)
        for got, expected in zip(fast, reference, strict=True):
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("num_tokens", [1, 3, MAX_FEW_TOKENS])
    def test_the_last_program_of_a_token_selects(num_tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        apart, _ = routed(num_tokens, bias=bias, normalise=bias, padding=bias)
        monkeypatch.setattr(route_topk, "MAX_SELECTING_TOKENS", MAX_FEW_TOKENS)
        for _ in range(2):
            together, _ = routed(num_tokens, bias=bias, normalise=bias, padding=bias)
            assert all(torch.equal(*pair) for pair in zip(together, apart, strict=True))
        assert not route_topk.counters(torch.device("cpu")).any()

    @pytest.mark.parametrize("num_tokens", [2, MAX_FEW_TOKENS + 2, MAX_SPREAD_TOKENS + 2])
    def test_equal_scores_go_to_the_lower_id_and_nan_to_no_expert(num_tokens: int) -> None:
        h = torch.ones(num_tokens, 64)
        h[-1, 5] = float("nan")
        gate = torch.zeros(6, 64)
        gate[4] = 1.0
        router = Router(gate, None, 3, True, 1.0)
        _, chosen, weights = route_fast(h, Norm(torch.ones(64), 1e-5), router)
        assert chosen[:-1].tolist() == [[4, 0, 1]] * (num_tokens - 1)
        assert chosen[-1].tolist() == [6, 6, 6]
        torch.testing.assert_close(weights[:-1].sum(1), torch.ones(num_tokens - 1))
