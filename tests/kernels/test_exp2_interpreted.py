"""Exponentials made of multiplications, as attention over chunks may take them, on a CPU."""

import pytest
import torch
from torch import Tensor

from lfm.kernels.paged_tiles import exp2_tile
from lfm.kernels.triton_guard import tl, triton
from tests.kernels.interpreted import IS_INTERPRETED, run_interpreted

if not IS_INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:

    @triton.jit
    def exp2_kernel(x, out, M: tl.constexpr, TILE: tl.constexpr, FMA_SHARE: tl.constexpr):
        at = tl.arange(0, M)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(out + at, exp2_tile(tl.load(x + at), FMA_SHARE))

    def power(x: Tensor, share: int) -> Tensor:
        out = torch.empty_like(x)
        exp2_kernel[(1,)](x, out, M=x.shape[0], TILE=x.shape[1], FMA_SHARE=share)
        return out

    @pytest.mark.parametrize("share", [0, 2, 4])
    def test_powers_in_their_own_columns(share: int) -> None:
        x = -torch.cat((torch.linspace(0, 30, 1024), torch.arange(512) / 4, torch.tensor([0.0, 0.5, 1.5, 126.0] * 128)))
        x = x.view(16, 128)
        torch.testing.assert_close(power(x, share), x.exp2(), rtol=1e-4, atol=2e-38)

    @pytest.mark.parametrize("share", [0, 2, 4])
    def test_very_small_ones_vanish(share: int) -> None:
        x = torch.full((16, 32), -1000.0)
        x[3] = -torch.inf
        assert bool((power(x, share) < 2e-38).all())

    @pytest.mark.parametrize("share", [2, 4])
    def test_one_column_in_so_many_is_made_of_multiplications(share: int) -> None:
        x = torch.full((16, 64), -0.3)
        differs = power(x, share) != power(x, 0)
        assert bool((differs.sum(1) == 64 // share).all())

    @pytest.mark.parametrize("share", [0, 2, 4])
    def test_nan_is_not_swallowed(share: int) -> None:
        x = torch.full((16, 32), float("nan"))
        assert not bool((power(x, share).abs() < 1e38).any())
