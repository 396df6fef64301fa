"""The short convolution with its state in the block pool: any split of a sequence gives what the whole gives."""

import pytest
import torch
from torch import Tensor

from lfm.kernels.short_conv import short_conv_packed, short_conv_ref
from lfm.kernels.weights import Linear
from tests.kernels.paged import batch_of, garbage

HIDDEN = 5


def naive(bcx: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One sequence, written as the formula."""
    b, c, x = bcx.chunk(3, dim=-1)
    u = b * x
    window = weight.shape[1]
    out = torch.zeros_like(u)
    for t in range(u.shape[0]):
        for j in range(window):
            if t - window + 1 + j >= 0:
                out[t] += weight[:, j] * u[t - window + 1 + j]
    return c * (out if bias is None else out + bias)


def inputs(length: int, window: int, *, has_bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(length * 10 + window)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return draw(length, 3 * HIDDEN), draw(HIDDEN, window), draw(HIDDEN) if has_bias else None


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_every_split_point_gives_the_whole(window: int, block_size: int) -> None:
    length = 9
    bcx, weight, bias = inputs(length, window, has_bias=window == 3)
    expected = naive(bcx, weight, bias)
    table = list(range(1, 1 + -(-length // block_size)))
    for split in range(1, length + 1):
        tails = garbage(len(table) + 1, window - 1, HIDDEN)
        parts = [
            short_conv_ref(bcx[begin:end], Linear(weight, bias), batch_of([(begin, end, table)], block_size), tails)
            for begin, end in ((0, split), (split, length))
            if end > begin
        ]
        torch.testing.assert_close(torch.cat(parts), expected)


@pytest.mark.parametrize("window", [2, 3, 5])
def test_token_by_token_is_in_place_on_one_block(window: int) -> None:
    bcx, weight, _ = inputs(8, window)
    tails = garbage(2, window - 1, HIDDEN)
    steps = [short_conv_ref(bcx[t : t + 1], Linear(weight), batch_of([(t, t + 1, [1])], 8), tails) for t in range(8)]
    torch.testing.assert_close(torch.cat(steps), naive(bcx, weight, None))


def test_a_tail_is_the_state_after_the_block_s_last_token() -> None:
    """Continuing after a full block from its tail alone, as a prefix hit does."""
    bcx, weight, _ = inputs(12, 3)
    tails = garbage(5, 2, HIDDEN)
    short_conv_ref(bcx, Linear(weight), batch_of([(0, 12, [1, 2, 3])], 4), tails)
    rest = short_conv_ref(bcx[8:], Linear(weight), batch_of([(8, 12, [1, 2, 4])], 4), tails)
    torch.testing.assert_close(rest, naive(bcx, weight, None)[8:])


def test_rows_do_not_see_each_other() -> None:
    first, weight, bias = inputs(7, 3, has_bias=True)
    second = inputs(5, 3)[0]
    chunks = [(0, 7, [1, 2]), (0, 5, [3, 4])]
    packed = torch.cat([first, second])
    expected = torch.cat([naive(first, weight, bias), naive(second, weight, bias)])
    paged = short_conv_ref(packed, Linear(weight, bias), batch_of(chunks, 4), garbage(5, 2, HIDDEN))
    torch.testing.assert_close(paged, expected)
    no_cache = short_conv_packed(packed, Linear(weight, bias), batch_of(chunks, 4), garbage(0))
    torch.testing.assert_close(no_cache, expected)


def test_strided_inputs_are_read_right() -> None:
    bcx, weight, _ = inputs(6, 3)
    wide = torch.zeros(6, 6 * HIDDEN, dtype=torch.float64)
    wide[:, ::2] = bcx
    result = short_conv_ref(wide[:, ::2], Linear(weight), batch_of([(0, 6, [1, 2])], 4), garbage(3, 2, HIDDEN))
    torch.testing.assert_close(result, naive(bcx, weight, None))


def test_bf16_rounds_at_u_and_at_the_convolution() -> None:
    bcx, weight, _ = inputs(32, 3)
    low = bcx.to(torch.bfloat16)
    got = short_conv_packed(low, Linear(weight.to(torch.bfloat16)), batch_of([(0, 32, [1])], 32), garbage(0))
    b, c, x = low.chunk(3, dim=-1)
    u = (b * x).float()
    conv = torch.nn.functional.conv1d(
        torch.nn.functional.pad(u.T, (2, 0))[None], weight.to(torch.bfloat16).float()[:, None], groups=HIDDEN
    )[0].T
    assert torch.equal(got, c * conv.to(torch.bfloat16))
