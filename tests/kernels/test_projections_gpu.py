"""The kernels of projections and of the short convolution on a GPU, in bf16, at the 24B's sizes and others.

Allowed: 1.3 times the error that the reference in bf16 has against float64.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lfm.kernels import norm as ops
from lfm.kernels.forward_batch import SCRATCH_BLOCK
from lfm.kernels.short_conv import conv_in, conv_in_ref
from lfm.kernels.weights import Linear, Norm
from tests.kernels.paged import batch_of, garbage

pytestmark = pytest.mark.gpu
FACTOR = 1.3
TOKENS = [1, 7, 8, 9, 16, 17, 32, 33, 130]
FEW = [1, 9, 33]
HIDDEN = 2048


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") * std).bfloat16()


def a_norm(size: int) -> Norm:
    return Norm(1 + normal(size, seed=9, std=0.1), 1e-5)


def doubled(item: object) -> object:
    if isinstance(item, Norm | Linear):
        return type(item)(*(doubled(part) for part in item))
    return item.double() if isinstance(item, Tensor) else item


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def assert_as_good_as_reference(op: Callable[..., Tensor], reference: Callable[..., Tensor], *args: object) -> None:
    exact = reference(*(doubled(arg) for arg in args))
    expected = reference(*args)
    got = op(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in args))
    assert got.shape == exact.shape
    assert error(got, exact) <= FACTOR * error(expected, exact)


@pytest.mark.parametrize(
    ("inputs", "outputs", "tokens"),
    [(inputs, outputs, tokens) for inputs, outputs in ((2048, 2048), (2048, 3072), (11776, 2048)) for tokens in TOKENS]
    + [(inputs, outputs, tokens) for inputs, outputs in ((1536, 1000), (1000, 520)) for tokens in FEW],
)
def test_projections(inputs: int, outputs: int, tokens: int) -> None:
    x, h = normal(tokens, inputs), normal(tokens, outputs, seed=1)
    linear = Linear(normal(outputs, inputs, seed=2, std=0.02))
    biased = Linear(linear.weight, normal(outputs, seed=3))
    assert_as_good_as_reference(ops.rms_norm, ops.rms_norm_ref, x, a_norm(inputs))
    assert_as_good_as_reference(ops.project, ops.project_ref, x, biased)
    assert_as_good_as_reference(ops.project_add, ops.project_add_ref, h, x, linear)
    assert_as_good_as_reference(ops.project_add, ops.project_add_ref, h, x, biased)
    assert_as_good_as_reference(ops.norm_project, ops.norm_project_ref, x, a_norm(inputs), linear)


@pytest.mark.parametrize("tokens", [1, 8, 16, 33])
def test_head(tokens: int) -> None:
    weight = Linear(normal(65536, HIDDEN, std=0.02))
    assert_as_good_as_reference(ops.project, ops.project_ref, normal(tokens, HIDDEN, seed=1), weight)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 33])
@pytest.mark.parametrize(("hidden", "width"), [(2048, 11776), (1024, 1000)])
def test_dense_feed_forward(tokens: int, hidden: int, width: int) -> None:
    gate_up, down = (Linear(normal(*shape, std=0.02)) for shape in ((2 * width, hidden), (hidden, width)))
    h = normal(tokens, hidden, seed=2)
    assert_as_good_as_reference(ops.dense, ops.dense_ref, h, a_norm(hidden), gate_up, down)


class Layer:
    """A short convolution with its tails: of the kernels in bf16, of the reference in bf16 and in fp64."""

    def __init__(self, hidden: int, window: int, num_blocks: int, *, has_bias: bool = False) -> None:
        biases = (normal(3 * hidden, seed=4), normal(hidden, seed=5)) if has_bias else (None, None)
        in_proj = Linear(normal(3 * hidden, hidden, seed=2, std=0.02), biases[0])
        conv = Linear(normal(hidden, window, seed=3, std=0.5), biases[1])
        self.weights = a_norm(hidden), in_proj, conv
        self.tails = garbage(num_blocks, window - 1, hidden, dtype=torch.bfloat16, device="cuda")
        self.low_tails, self.exact_tails = self.tails.clone(), self.tails.double()

    def step(self, h: Tensor, chunks: list[tuple[int, int, list[int]]], block_size: int) -> None:
        batch = batch_of(chunks, block_size, "cuda")
        got = conv_in(h, *self.weights, batch, self.tails)
        low = conv_in_ref(h, *self.weights, batch, self.low_tails)
        exact = conv_in_ref(h.double(), *(doubled(item) for item in self.weights), batch, self.exact_tails)
        assert error(got, exact) <= FACTOR * error(low, exact)
        written = batch.tail_write_W[batch.tail_write_W != SCRATCH_BLOCK]
        if self.tails.shape[1]:
            exact_tails = self.exact_tails[written]
            assert error(self.tails[written], exact_tails) <= FACTOR * error(self.low_tails[written], exact_tails)
        untouched = self.low_tails.isnan()
        untouched[SCRATCH_BLOCK] = False
        assert torch.equal(self.tails.isnan() & untouched, untouched)


@pytest.mark.parametrize("rows", [1, 5, 8, 13, 40])
@pytest.mark.parametrize(("hidden", "window", "has_bias"), [(2048, 3, False), (1536, 4, True), (1000, 8, False)])
def test_decode_steps_of_the_convolution(rows: int, hidden: int, window: int, has_bias: bool) -> None:
    """From position 0, in place and over a block's end, with padding rows behind."""
    layer = Layer(hidden, window, 2 * rows + 1, has_bias=has_bias)
    for position in range(5):
        chunks = [(position, position + 1, [1 + row, 1 + rows + row]) for row in range(rows)]
        chunks += [(0, 1, [SCRATCH_BLOCK])] * (rows % 3)
        layer.step(normal(len(chunks), hidden, seed=position), chunks, 4)


@pytest.mark.parametrize(("hidden", "window"), [(2048, 3), (1000, 8)])
def test_chunks_and_decode_rows_share_a_step(hidden: int, window: int) -> None:
    layer = Layer(hidden, window, 40)
    table = list(range(4, 30))
    layer.step(normal(55, hidden), [(0, 3, [1]), (0, 1, [2]), (0, 50, table), (0, 1, [3])], 16)
    layer.step(normal(152, hidden, seed=1), [(3, 4, [1]), (1, 2, [2]), (50, 199, table), (1, 2, [3])], 16)


@pytest.mark.parametrize("tokens", [1, 8, 16, 40])
def test_captured_steps_repeat_bit_for_bit(tokens: int) -> None:
    """Inside a CUDA graph; replays give the same bits, also with other kernels started early beside them."""
    layer = Layer(HIDDEN, 3, tokens + 1)
    out = Linear(normal(HIDDEN, HIDDEN, seed=6, std=0.02))
    gate_up, down = Linear(normal(2 * 1024, HIDDEN, seed=7, std=0.02)), Linear(normal(HIDDEN, 1024, seed=8, std=0.02))
    batch = batch_of([(7, 8, [row + 1]) for row in range(tokens)], 16, "cuda")
    h, tails = normal(tokens, HIDDEN), normal(tokens + 1, 2, HIDDEN, seed=11)

    pools = [torch.empty_like(tails) for _ in range(4)]  # tails are read early: no layer runs twice in a step

    def step() -> Tensor:
        for pool in pools:
            pool.copy_(tails)
        h_TD = h.clone()
        for pool in pools:
            y = conv_in(h_TD, *layer.weights, batch, pool)
            h_TD = ops.project_add(h_TD, y, out)
            h_TD = ops.dense(h_TD, layer.weights[0], gate_up, down)
        return torch.cat((h_TD.flatten(), *(pool[1:].flatten() for pool in pools)))

    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)
