"""The kernels of paged attention on a GPU, in bf16, at the 24B's shapes and others.

Allowed: 1.3 times the error that the reference in bf16 has against float64.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from lfm.kernels import attention, paged_decode, paged_prefill
from lfm.kernels.attention import attend, attend_ref, qkv, qkv_ref, rope_tables
from lfm.kernels.forward_batch import ForwardBatch, SharedPrefix
from lfm.kernels.weights import Linear, Norm
from tests.kernels.paged import batch_of

pytestmark = pytest.mark.gpu
FACTOR = 1.3
SHAPES = [(32, 8, 64, 128), (24, 8, 64, 64), (16, 16, 32, 16), (32, 4, 128, 128), (8, 1, 64, 48)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def rows_of(sizes: list[tuple[int, int]], block_size: int) -> list[tuple[int, int, list[int]]]:
    """Chunks (start, end, table) for rows of (start, size); blocks in random order."""
    counts = [-(-(start + size) // block_size) for start, size in sizes]
    blocks = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)) + 1).tolist()
    return [
        (start, start + size, [blocks.pop() for _ in range(count)])
        for (start, size), count in zip(sizes, counts, strict=True)
    ]


def cache_for(chunks: list[tuple[int, int, list[int]]], groups: int, block_size: int, head_dim: int) -> list[Tensor]:
    """K and V with NaN wherever no row has a key."""
    num_blocks = max(max(table) for _, _, table in chunks) + 1
    is_key = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for _, end, table in chunks:
        positions = torch.arange(end)
        is_key[torch.tensor(table)[positions // block_size], positions % block_size] = True
    mask = is_key.cuda()[:, None, :, None]
    return [normal(num_blocks, groups, block_size, head_dim, seed=seed).where(mask, torch.nan) for seed in (2, 3)]


def check(sizes: list[tuple[int, int]], shape: tuple[int, int, int, int]) -> None:
    heads, groups, head_dim, block_size = shape
    chunks = rows_of(sizes, block_size)
    k, v = cache_for(chunks, groups, block_size, head_dim)
    batch = batch_of(chunks, block_size, device="cuda")
    q = normal(batch.row_starts[-1], heads, head_dim)
    assert attention.is_paged_fast(q, heads, k)
    got, rounded = attend(q, q, q, batch, k, v), attend_ref(q, q, q, batch, k, v)
    exact = attend_ref(q.double(), q, q, batch, k.double(), v.double())
    assert error(got, exact) <= FACTOR * error(rounded, exact)
    # A row's result is its own: no error hides in the norm of the others.
    per_row = [(begin, end) for begin, end in zip(batch.row_starts[:-1], batch.row_starts[1:], strict=True)]
    assert max(error(got[begin:end], exact[begin:end]) for begin, end in per_row) < 0.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 33, 130])
def test_single_queries(num_rows: int, shape: tuple[int, int, int, int]) -> None:
    lengths = torch.randint(1, 3000, (num_rows,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths[0], lengths[-1] = 1, 4096
    check([(length - 1, 1) for length in lengths], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_and_single_queries_share_a_step(shape: tuple[int, int, int, int]) -> None:
    check([(0, 1), (2000, 1), (127, 1), (0, 777), (1000, 130), (129, 2), (5, 1), (0, 64)], shape)


@pytest.mark.parametrize("size", [2, 31, 1000, 5001])
@pytest.mark.parametrize("start", [0, 1, 1311])
def test_one_chunk(start: int, size: int) -> None:
    check([(start, size)], SHAPES[0])


@pytest.mark.parametrize("share", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exponentials_made_of_multiplications(
    share: int, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_prefill, "FMA_SHARE", share)
    check([(0, 1), (2000, 1), (0, 777), (1000, 130), (129, 2), (1311, 2000)], shape)


def test_many_short_chunks() -> None:
    check([(i % 7, 1 + i % 5) for i in range(300)], SHAPES[0])


def test_blocks_beyond_two_gigabytes() -> None:
    """Block ids are multiplied in 64 bits: the last blocks of a pool of 8.6 GB."""
    heads, groups, head_dim, block_size = SHAPES[0]
    num_blocks = 2**33 // (2 * groups * block_size * head_dim)
    for size in (1, 300):
        chunks = [(200 - size if size == 1 else 0, 200 if size == 1 else size, [num_blocks - 1, num_blocks - 2, 1])]
        k = torch.full((num_blocks, groups, block_size, head_dim), torch.nan, dtype=torch.bfloat16, device="cuda")
        v = k.clone()
        blocks = torch.tensor(chunks[0][2], device="cuda")
        k[blocks], v[blocks] = normal(3, *k.shape[1:], seed=2), normal(3, *k.shape[1:], seed=3)
        batch = batch_of(chunks, block_size, device="cuda")
        q = normal(size, heads, head_dim)
        small = dataclasses.replace(batch, block_tables_SN=torch.tensor([[0, 1, 2]], device="cuda"))
        exact = attend_ref(q.double(), q, q, small, k[blocks].double(), v[blocks].double())
        assert error(attend(q, q, q, batch, k, v), exact) < 0.01
        del k, v


def shared_case(num_chunk: int) -> tuple[ForwardBatch, Tensor, Tensor]:
    """40 rows share 32 blocks, 3 rows share 2, one row none; behind them a chunk, if `num_chunk`."""
    sizes = [(4096 + 17 * i, 1) for i in range(40)] + [(300 + i, 1) for i in range(3)] + [(500, 1)]
    sizes += [(10, num_chunk)] if num_chunk else []
    chunks = rows_of(sizes, 128)
    for index in range(1, 40):
        chunks[index][2][:32] = chunks[0][2][:32]
    for index in range(41, 43):
        chunks[index][2][:2] = chunks[40][2][:2]
    batch = batch_of(chunks, 128, device="cuda")
    tiles = torch.full((6, 16), -1)
    tiles[0], tiles[1], tiles[2, :8], tiles[4, :3] = (
        torch.arange(16),
        torch.arange(16, 32),
        torch.arange(32, 40),
        torch.arange(40, 43),
    )
    blocks = torch.tensor([32] * 40 + [2] * 3 + [0] * (len(sizes) - 43))
    batch = dataclasses.replace(batch, shared=SharedPrefix(blocks.cuda(), tiles.cuda()))
    return batch, *cache_for(chunks, 8, 128, 64)


@pytest.mark.parametrize("num_chunk", [0, 300])
def test_a_shared_prefix_changes_nothing(num_chunk: int) -> None:
    batch, k, v = shared_case(num_chunk)
    q = normal(batch.row_starts[-1], 32, 64)
    got, rounded = attend(q, q, q, batch, k, v), attend_ref(q, q, q, batch, k, v)
    exact = attend_ref(q.double(), q, q, batch, k.double(), v.double())
    assert error(got, exact) <= FACTOR * error(rounded, exact)
    assert max(error(got[t], exact[t]) for t in range(44)) < 0.01


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 700])
def test_projection_norm_rotation_and_write(num_tokens: int) -> None:
    h, weight = normal(num_tokens, 2048), normal(3072, 2048, seed=1) * 2048**-0.5
    norms = [Norm(1 + normal(size, seed=size) / 8, 1e-5) for size in (2048, 64, 64)]
    chunk = (30, 30 + num_tokens, list(range(7, 0, -1)))
    batch = batch_of([chunk], 128, device="cuda")

    def run(op, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        wide = [Norm(norm.weight.to(dtype), norm.eps) for norm in norms]
        rope = rope_tables(1000, 64, 1e6, dtype=torch.bfloat16, device=torch.device("cuda"))
        rope = type(rope)(rope.cos.to(dtype), rope.sin.to(dtype))
        cache = [torch.full((8, 8, 128, 64), torch.nan, dtype=dtype, device="cuda") for _ in range(2)]
        q, _, _ = op(h.to(dtype), wide[0], Linear(weight.to(dtype)), *wide[1:], rope, batch, *cache)
        return q, *cache

    exact, rounded, fast = run(qkv_ref, torch.float64), run(qkv_ref, torch.bfloat16), run(qkv, torch.bfloat16)
    for wanted, reference, got in zip(exact, rounded, fast, strict=True):
        is_written = wanted.isfinite()
        assert got.isfinite().equal(is_written)
        wanted, reference, got = wanted[is_written], reference[is_written], got[is_written]
        assert error(got, wanted) <= FACTOR * error(reference, wanted)


def test_a_captured_step_repeats_with_other_rows() -> None:
    """A decode graph: tables as wide as the longest context, other lengths, padding rows at the scratch block."""
    sizes = [[(700 * i, 1) for i in range(1, 9)], [(3, 1), (4000, 1), (128, 1), (127, 1)] + [(0, 1)] * 4]
    all_chunks = [rows_of(each, 128) for each in sizes]
    for index in range(4, 8):
        all_chunks[1][index] = (0, 1, [0])
    k, v = (normal(256, 8, 128, 64, seed=seed) for seed in (2, 3))
    batches = [batch_of(chunks, 128, device="cuda") for chunks in all_chunks]
    tables = [torch.zeros(8, 256, dtype=torch.int64, device="cuda") for _ in batches]
    for table, batch in zip(tables, batches, strict=True):
        table[:, : batch.block_tables_SN.shape[1]] = batch.block_tables_SN
    batches = [dataclasses.replace(b, block_tables_SN=t) for b, t in zip(batches, tables, strict=True)]
    static = dataclasses.replace(batches[0], starts_S=batches[0].starts_S.clone(), block_tables_SN=tables[0].clone())
    q = normal(8, 32, 64)
    attend(q, q, q, static, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, q, q, static, k, v)
    for batch in batches[::-1]:
        static.starts_S.copy_(batch.starts_S)
        static.block_tables_SN.copy_(batch.block_tables_SN)
        graph.replay()
        assert captured.equal(attend(q, q, q, batch, k, v))


def test_a_row_does_not_depend_on_its_neighbours_in_a_bucket() -> None:
    """Bit for bit, as long as the launch has the same shape."""
    chunks = rows_of([(100 * i, 1) for i in range(1, 17)], 128)
    k, v = cache_for(chunks, 8, 128, 64)
    q = normal(16, 32, 64)
    together = attend(q, q, q, batch_of(chunks, 128, device="cuda"), k, v)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = attend(q[order], q, q, batch_of([chunks[i] for i in order.tolist()], 128, device="cuda"), k, v)
    assert shuffled.equal(together[order])


def test_own_keys_read_beside_the_prefix_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a chain, where q, K and V are written by the launch in front of the prefix: a race would move the result."""
    batch, k, v = shared_case(0)
    wide = normal(batch.row_starts[-1], 32, 64)
    results = []
    for overlaps in (False, True, True, True, True, True):
        monkeypatch.setattr(paged_decode, "OVERLAPS_PREFIX", overlaps)
        q = torch.full_like(wide, torch.nan)
        torch.cuda._sleep(100_000)
        q.copy_(wide)
        results.append(attend(q, q, q, batch, k, v))
    assert all(torch.equal(result, results[0]) for result in results[1:])
