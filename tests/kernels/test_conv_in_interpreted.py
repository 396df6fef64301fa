"""The kernels of the short convolution on a CPU, in fp32, against the reference in fp64; the pool starts as NaN."""

import dataclasses

import pytest
import torch
from torch import Tensor

from lfm.kernels import norm as norm_ops
from lfm.kernels import short_conv, stream_gemm
from lfm.kernels.forward_batch import SCRATCH_BLOCK
from lfm.kernels.fp8 import quantise_rows
from lfm.kernels.short_conv import conv_in, conv_in_ref
from lfm.kernels.weights import Linear, Norm
from tests.kernels.interpreted import IS_INTERPRETED, run_interpreted
from tests.kernels.paged import batch_of, garbage

HIDDEN = 48
Chunks = list[tuple[int, int, list[int]]]

if not IS_INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN on purpose

    @pytest.fixture(autouse=True)
    def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
        """The public ops take the kernels, on a CPU and in fp32 too."""
        for module in (norm_ops, stream_gemm, short_conv):
            monkeypatch.setattr(module, "runs_triton", lambda _: True)

    def draw(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std

    class Layer:
        """One layer's weights, and its tails in fp32 for the kernels and in fp64 for the reference."""

        def __init__(self, window: int, num_blocks: int, *, has_bias: bool = False, is_fp8: bool = False) -> None:
            self.norm = Norm(1 + draw(HIDDEN, seed=1, std=0.1), 1e-5)
            biases = (draw(3 * HIDDEN, seed=4), draw(HIDDEN, seed=5)) if has_bias else (None, None)
            self.in_proj = Linear(draw(3 * HIDDEN, HIDDEN, seed=2, std=0.2), biases[0])
            if is_fp8:
                quantised, scale = quantise_rows(self.in_proj.weight)
                self.in_proj = Linear(quantised, biases[0], scale)
            self.conv = Linear(draw(HIDDEN, window, seed=3), biases[1])
            self.tails = garbage(num_blocks, window - 1, HIDDEN, dtype=torch.float32)
            self.exact_tails = self.tails.double()

        def step(self, h: Tensor, chunks: Chunks, block_size: int) -> Tensor:
            """y of the kernels, which must be the reference's, and leave the same tails."""
            batch = batch_of(chunks, block_size)
            got = conv_in(h, self.norm, self.in_proj, self.conv, batch, self.tails)
            norm, in_proj, conv = (
                type(item)(*(part.double() if isinstance(part, Tensor) else part for part in item))
                for item in (self.norm, self.in_proj, self.conv)
            )
            exact = conv_in_ref(h.double(), norm, in_proj, conv, batch, self.exact_tails)
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
            assert got.isfinite().all()
            tails = torch.arange(len(self.tails)) != SCRATCH_BLOCK
            torch.testing.assert_close(
                self.tails[tails].double(), self.exact_tails[tails], rtol=1e-5, atol=1e-5, equal_nan=True
            )
            return got

    @pytest.mark.parametrize(("window", "has_bias"), [(1, True), (2, False), (3, True), (3, False), (8, True)])
    def test_token_by_token(window: int, has_bias: bool) -> None:
        """Decode from position 0, over block ends, in place in between; rows of different ages."""
        layer = Layer(window, 12, has_bias=has_bias)
        tables = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        for step in range(9):
            chunks = [(step, step + 1, tables[0])]
            chunks += [(step - 2, step - 1, tables[1])] if step >= 2 else []
            layer.step(draw(len(chunks), HIDDEN, seed=step), chunks, 4)

    @pytest.mark.parametrize("tokens", [1, 9, 33])
    @pytest.mark.parametrize("is_fp8", [False, True])
    def test_decode_rows_of_every_kernel(tokens: int, is_fp8: bool) -> None:
        """Few rows are fused with the projection, many are not."""
        layer = Layer(3, tokens + 1, is_fp8=is_fp8)
        is_fused = stream_gemm.find_tile("conv_in", draw(tokens, HIDDEN), layer.in_proj.weight) is not None
        assert is_fused == (tokens <= 16)
        for position in (0, 1, 2):
            chunks = [(position, position + 1, [row + 1]) for row in range(tokens)]
            layer.step(draw(tokens, HIDDEN, seed=position), chunks, 8)

    @pytest.mark.parametrize(("window", "block_size"), [(1, 3), (3, 1), (3, 16), (8, 3)])
    def test_every_split_point(window: int, block_size: int) -> None:
        h, table = draw(9, HIDDEN), list(range(1, 10))
        whole = Layer(window, 10).step(h, [(0, 9, table)], block_size)
        for split in (1, 4, 8):
            layer = Layer(window, 10)
            parts = [layer.step(h[b:e], [(b, e, table)], block_size) for b, e in ((0, split), (split, 9))]
            torch.testing.assert_close(torch.cat(parts), whole)

    @pytest.mark.parametrize("window", [2, 3, 8])
    def test_decode_rows_and_chunks_share_a_step(window: int) -> None:
        """Also a row whose tail is read from a block that this step writes, with another block after it."""
        layer = Layer(window, 20)
        first = [(0, 5, [1, 2, 3]), (0, 3, [4, 5]), (0, 1, [6]), (0, 2, [7, 8, 9, 10])]
        layer.step(draw(11, HIDDEN), first, 4)
        second = [(5, 6, [1, 2, 3]), (3, 5, [4, 5]), (0, 20, [11, 12, 13, 14, 15]), (2, 16, [7, 8, 9, 10])]
        layer.step(draw(37, HIDDEN, seed=1), second, 4)

    def test_padding_rows_touch_only_the_scratch_block() -> None:
        """A captured step pads with tokens at position 0 that read and write block 0."""
        layer = Layer(3, 6)
        layer.step(draw(2, HIDDEN), [(0, 1, [1]), (0, 1, [2])], 4)
        chunks = [(1, 2, [1]), (1, 2, [2]), *[(0, 1, [SCRATCH_BLOCK])] * 3]
        layer.step(draw(5, HIDDEN, seed=1), chunks, 4)
        assert layer.tails[3:].isnan().all()

    def test_padding_tokens_behind_chunks_change_nothing() -> None:
        """Tokens at position 0 whose row is one that has begun long ago, as a padded step has them."""
        plain, padded = Layer(3, 6), Layer(3, 6)
        for layer in (plain, padded):
            layer.step(draw(6, HIDDEN), [(0, 6, [1, 2])], 4)
        h = draw(8, HIDDEN, seed=1)
        batch = batch_of([(6, 11, [1, 2, 3])], 4)
        expected = conv_in(h[:5], plain.norm, plain.in_proj, plain.conv, batch, plain.tails)
        batch = dataclasses.replace(
            batch,
            positions_T=torch.cat((batch.positions_T, torch.zeros(3, dtype=torch.int64))),
            rows_T=torch.cat((batch.rows_T, torch.zeros(3, dtype=torch.int64))),
            tail_write_W=torch.cat((batch.tail_write_W, torch.zeros(2, dtype=torch.int64))),
            tail_token_W=torch.cat((batch.tail_token_W, torch.tensor([5, 6]))),
        )
        got = conv_in(h, padded.norm, padded.in_proj, padded.conv, batch, padded.tails)
        assert torch.equal(got[:5], expected)
        torch.testing.assert_close(padded.tails[1:], plain.tails[1:], rtol=0, atol=0, equal_nan=True)
