"""Kernels with weights, activations or K and V in fp8 on a GPU, at the 24B's sizes, against float64 on the same values.

With bf16 activations e4m3 weights are exact in registers, so the error allowed is that of bf16: 1.3 times what the
reference errs when it computes in bf16. Where activations become e4m3 too, the reference does the same rounding.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lfm.kernels import norm as ops
from lfm.kernels.attention import attend, attend_ref, qkv, qkv_ref, rope_tables, write_kv_ref
from lfm.kernels.experts import experts, experts_fp8_ref, experts_ref
from lfm.kernels.fp8 import FP8, quantise_rows
from lfm.kernels.fp8_gemm import fp8_project, fp8_project_ref, quantise_tokens
from lfm.kernels.kv_fp8 import as_bytes
from lfm.kernels.kv_layout import num_rows
from lfm.kernels.moe_grouped import experts_grouped
from lfm.kernels.moe_grouped_fp8 import experts_grouped_fp8
from lfm.kernels.moe_small import experts_small
from lfm.kernels.short_conv import conv_in, conv_in_ref
from lfm.kernels.tuned import tuned_for
from lfm.kernels.weights import ExpertScales, Linear, Norm, scaled
from tests.kernels.moe import Sizes, make_layer
from tests.kernels.paged import batch_of

LARGE = Sizes(hidden=2048, experts=64, width=1536, chosen=4)  # LFM2-24B
HIDDEN, DENSE = 2048, 11776
FACTOR = 1.3


def has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_fp8(), reason="needs a GPU of compute capability 8.9 or later"),
]


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") * std).bfloat16()


def in_fp8(outputs: int, inputs: int, seed: int = 0) -> Linear:
    weight, scale = quantise_rows(normal(outputs, inputs, seed=seed, std=0.02))
    return Linear(weight, scale=scale)


def a_norm(size: int) -> Norm:
    return Norm(1 + normal(size, seed=9, std=0.1), 1e-5)


def widened(item: object) -> object:
    """The same values in float64; what is in fp8 as what it stands for."""
    if isinstance(item, Linear):
        bias = None if item.bias is None else item.bias.double()
        return Linear(item.plain(torch.float64).double(), bias)
    if isinstance(item, Norm):
        return Norm(item.weight.double(), item.eps)
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


def rounded(item: object) -> object:
    return Linear(item.plain(torch.bfloat16), item.bias) if isinstance(item, Linear) else item


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def assert_as_good_as_bf16(op: Callable[..., Tensor], reference: Callable[..., Tensor], *args: object) -> None:
    exact = reference(*(widened(arg) for arg in args))
    expected = reference(*(rounded(arg) for arg in args))
    got = op(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in args))
    assert error(got, exact) <= FACTOR * error(expected, exact)


def streams(what: str, tokens: int) -> bool:
    """Whether bf16 activations are kept, by the tables in force."""
    slots = max(8, 1 << (tokens - 1).bit_length())
    return (what, slots) in tuned_for(torch.device("cuda", 0)).stream["fp8"]


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17, 32])
def test_streams_of_fp8_weights(tokens: int) -> None:
    h, x, wide = normal(tokens, HIDDEN), normal(tokens, HIDDEN, seed=1), normal(tokens, DENSE, seed=2)
    square, biased = in_fp8(HIDDEN, HIDDEN), in_fp8(HIDDEN, HIDDEN)._replace(bias=normal(HIDDEN, seed=3))
    if streams("project_add", tokens):
        assert_as_good_as_bf16(ops.project_add, ops.project_add_ref, h, x, square)
        assert_as_good_as_bf16(ops.project_add, ops.project_add_ref, h, x, biased)
    if streams("norm_project", tokens):
        assert_as_good_as_bf16(ops.norm_project, ops.norm_project_ref, h, a_norm(HIDDEN), in_fp8(3072, HIDDEN))
    if streams("down", tokens):
        assert_as_good_as_bf16(ops.project_add, ops.project_add_ref, h, wide, in_fp8(HIDDEN, DENSE))
    if streams("gate_up", tokens) and streams("down", tokens):
        both = in_fp8(2 * DENSE, HIDDEN), in_fp8(HIDDEN, DENSE)
        assert_as_good_as_bf16(ops.dense, ops.dense_ref, h, a_norm(HIDDEN), *both)
    if streams("conv_in", tokens):
        batch = batch_of([(5, 6, [row + 1]) for row in range(tokens)], 16, device="cuda")
        taps, tails = Linear(normal(HIDDEN, 3, seed=4)), normal(tokens + 1, 2, HIDDEN, seed=5)
        weight = in_fp8(3 * HIDDEN, HIDDEN)
        args = h, a_norm(HIDDEN), weight, taps
        exact_args = (widened(arg) for arg in args)
        exact = conv_in_ref(*exact_args, batch, tails.double())  # type: ignore[arg-type]
        expected = conv_in_ref(h, args[1], Linear(weight.plain(torch.bfloat16)), taps, batch, tails.clone())
        assert error(conv_in(*args, batch, tails.clone()), exact) <= FACTOR * error(expected, exact)


@pytest.mark.parametrize("inputs", [64, 1000, HIDDEN, DENSE])
def test_tokens_are_quantised_as_rows_are(inputs: int) -> None:
    x = normal(33, inputs) * torch.logspace(-8, 8, 33, device="cuda", dtype=torch.bfloat16)[:, None]
    x[5] = 0
    (got, got_scale), (expected, scale) = quantise_tokens(x), quantise_rows(x)
    torch.testing.assert_close(got_scale, scale)
    # Division in hardware and in torch may differ in the last bit: a value between two of e4m3 may go to the other.
    assert (got.view(torch.uint8) != expected.view(torch.uint8)).float().mean() < 1e-3
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.13, atol=2**-9)


@pytest.mark.parametrize("tokens", [1, 33, 128, 2049])
@pytest.mark.parametrize(("outputs", "inputs"), [(3072, HIDDEN), (HIDDEN, DENSE), (48, 96)])
def test_products_with_both_operands_in_fp8(tokens: int, outputs: int, inputs: int) -> None:
    x, weight = normal(tokens, inputs), in_fp8(outputs, inputs)._replace(bias=normal(outputs))
    exact = fp8_project_ref(x.float(), weight).double()
    assert error(fp8_project(x, weight), exact) < 5e-3  # the store rounds to bf16: 2^-9; sums have 14 bits or more
    assert error(fp8_project(x, weight), widened_product(x, weight)) < 0.06


def widened_product(x: Tensor, weight: Linear) -> Tensor:
    return ops.project_ref(
        x.double(), Linear(weight.plain(torch.float64), None if weight.bias is None else weight.bias.double())
    )


def expert_arguments(tokens: int, sizes: Sizes, **options: int) -> tuple[Tensor, ...]:
    layer = make_layer(tokens, sizes, dtype=torch.bfloat16, device="cuda", **options)
    (gate_up, gate_up_scale), (down, down_scale) = quantise_rows(layer.gate_up), quantise_rows(layer.down)
    return *layer[:4], gate_up, down, ExpertScales(gate_up_scale, down_scale)  # type: ignore[return-value]


def exact_experts(args: tuple[Tensor, ...]) -> Tensor:
    h, x, chosen, shares, gate_up, down, scales = args
    wide = torch.float64
    return experts_ref(
        h.double(), x.double(), chosen, shares.double(),
        scaled(gate_up, scales.gate_up, wide), scaled(down, scales.down, wide),  # type: ignore[attr-defined]
    )  # fmt: skip


def error_added(got: Tensor, exact: Tensor, h: Tensor) -> float:
    """Of what the experts add to h."""
    return float((got.double() - exact).norm() / (exact - h.double()).norm())


SMALL = Sizes(hidden=128, experts=8, width=64, chosen=2)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16, 33, 130, 255])
@pytest.mark.parametrize("sizes", [LARGE, SMALL])
def test_experts_that_keep_their_activations(tokens: int, sizes: Sizes) -> None:
    args = expert_arguments(tokens, sizes, padding=min(1, tokens - 1))
    h, x, chosen, shares, gate_up, down, scales = args
    exact = exact_experts(args)
    plain = (scaled(gate_up, scales.gate_up, x.dtype), scaled(down, scales.down, x.dtype))  # type: ignore[attr-defined]
    expected = experts_ref(h, x, chosen, shares, *plain)
    got = (experts_small if tokens <= 4 else experts_grouped)(*args)
    assert error_added(got, exact, h) <= FACTOR * error_added(expected, exact, h)
    padding = chosen[:, 0] == sizes.experts
    assert torch.equal(got[padding], h[padding])


@pytest.mark.parametrize(
    ("run", "tokens"),
    [(experts_grouped_fp8, tokens) for tokens in (5, 16, 33, 130, 400)]
    + [(experts, tokens) for tokens in (400, 1100, 2049, 8192)],
)
@pytest.mark.parametrize("popular", [None, 7])
@pytest.mark.parametrize("sizes", [LARGE, SMALL])
def test_experts_with_both_operands_in_fp8(
    run: Callable[..., Tensor], tokens: int, popular: int | None, sizes: Sizes
) -> None:
    """Scales of act may be per block of features: other roundings than the reference's, and not worse."""
    options = {"padding": 2} if popular is None else {"padding": 2, "popular": popular}
    args = expert_arguments(tokens, sizes, **options)
    h, exact = args[0], exact_experts(args)
    got = run(*args)
    assert error_added(got, exact, h) <= 1.1 * error_added(experts_fp8_ref(*args), exact, h)
    assert torch.equal(got[-2:], h[-2:])
    assert torch.equal(run(*args), got)


def cache_in_fp8(chunks: list[tuple[int, int, list[int]]], groups: int, head_dim: int, block_size: int) -> list[Tensor]:
    rows = num_rows(block_size, head_dim, is_fp8=True)
    num_blocks = max(max(table) for _, _, table in chunks) + 1
    pools = [torch.full((num_blocks, groups, rows, head_dim), torch.nan, device="cuda").to(FP8) for _ in range(2)]
    whole = batch_of([(0, end, table) for _, end, table in chunks], block_size, device="cuda")
    size = whole.row_starts[-1]
    write_kv_ref(normal(size, groups, head_dim, seed=2), normal(size, groups, head_dim, seed=3), whole, *pools)
    return pools


@pytest.mark.parametrize("shape", [(32, 8, 64, 128), (16, 16, 32, 16), (32, 4, 128, 128), (8, 1, 64, 48)], ids=str)
@pytest.mark.parametrize(
    "sizes", [[(0, 1), (2000, 1), (4095, 1)], [(0, 777), (1000, 130), (129, 2), (5, 1)], [(1311, 999)]]
)
def test_attention_over_a_cache_in_fp8(sizes: list[tuple[int, int]], shape: tuple[int, int, int, int]) -> None:
    heads, groups, head_dim, block_size = shape
    counts = [-(-(start + size) // block_size) for start, size in sizes]
    blocks = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)) + 1).tolist()
    chunks = [
        (start, start + size, [blocks.pop() for _ in range(count)])
        for (start, size), count in zip(sizes, counts, strict=True)
    ]
    k, v = cache_in_fp8(chunks, groups, head_dim, block_size)
    batch = batch_of(chunks, block_size, device="cuda")
    q = normal(batch.row_starts[-1], heads, head_dim)
    exact = attend_ref(q.double(), q, q, batch, k, v)
    assert error(attend(q, q, q, batch, k, v), exact) <= FACTOR * error(attend_ref(q, q, q, batch, k, v), exact)


@pytest.mark.parametrize("tokens", [1, 600])
def test_keys_and_values_are_written_in_fp8(tokens: int) -> None:
    heads, groups, head_dim, block_size = 32, 8, 64, 128
    h, weight = normal(tokens, HIDDEN), Linear(normal((heads + 2 * groups) * head_dim, HIDDEN, seed=1, std=0.02))
    rope = rope_tables(1000, head_dim, 1e6, dtype=torch.bfloat16, device=torch.device("cuda"))
    batch = batch_of([(3, 3 + tokens, [2, 1, 3, 5, 4, 6][: -(-(3 + tokens) // block_size)])], block_size, device="cuda")
    rows = num_rows(block_size, head_dim, is_fp8=True)
    pools = [[torch.zeros(7, groups, rows, head_dim, device="cuda").to(FP8) for _ in range(2)] for _ in range(2)]
    norms = a_norm(HIDDEN), weight, a_norm(head_dim), a_norm(head_dim), rope, batch
    q, _, _ = qkv(h, *norms, *pools[0])
    expected, _, _ = qkv_ref(h, *norms, *pools[1])
    assert error(q, expected.double()) < 0.01
    for got, want in zip(*pools, strict=True):
        # The kernel rounds once where the reference rounds thrice, so that a few values are neighbours.
        assert (as_bytes(got) != as_bytes(want)).float().mean() < 0.2
        values = [pool[:, :, :block_size].float() for pool in (got, want)]
        assert error(values[0], values[1].double()) < 0.05
