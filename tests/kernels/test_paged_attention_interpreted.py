"""The kernels of paged attention on a CPU, in fp32, against the reference; the cache is NaN but for the keys."""

import dataclasses

import pytest
import torch
from torch import Tensor

from lfm.kernels import attention, paged_decode, paged_prefill, qk_rope
from lfm.kernels.attention import attend, attend_ref, qkv, qkv_ref, rope_tables, write_kv_ref
from lfm.kernels.forward_batch import ForwardBatch, SharedPrefix
from lfm.kernels.fp8 import FP8
from lfm.kernels.kv_fp8 import as_bytes
from lfm.kernels.kv_layout import num_rows
from lfm.kernels.weights import Linear, Norm
from tests.kernels.interpreted import IS_INTERPRETED, run_interpreted
from tests.kernels.paged import batch_of, garbage

Chunks = list[tuple[int, int, list[int]]]

if not IS_INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN on purpose

    @pytest.fixture(autouse=True)
    def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
        """The public ops take the kernels, on a CPU and in fp32 too."""
        monkeypatch.setattr(attention, "is_paged_fast", lambda *_: True)

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def tables_for(lengths: list[int], block_size: int) -> tuple[list[list[int]], int]:
        """Block tables for rows of these lengths, no block twice, and the number of blocks with the scratch block."""
        counts = [-(-length // block_size) for length in lengths]
        blocks = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)) + 1).tolist()
        return [[blocks.pop() for _ in range(count)] for count in counts], sum(counts) + 1

    def pool(num_blocks: int, groups: int, block_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V of a layer, full of NaN."""
        shape = (num_blocks, groups, num_rows(block_size, head_dim, is_fp8=dtype == FP8), head_dim)
        return garbage(*shape, dtype=dtype), garbage(*shape, dtype=dtype)

    def attended(
        chunks: Chunks,
        block_size: int,
        *,
        heads: int,
        groups: int,
        head_dim: int,
        num_blocks: int,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Fast and reference output of chunks whose rows have all their keys in the cache, kept in `dtype`."""
        k, v = pool(num_blocks, groups, block_size, head_dim, dtype)
        whole = batch_of([(0, end, table) for _, end, table in chunks], block_size)
        size = whole.row_starts[-1]
        write_kv_ref(draw(size, groups, head_dim, seed=2), draw(size, groups, head_dim, seed=3), whole, k, v)
        batch = batch_of(chunks, block_size)
        q = draw(batch.row_starts[-1], heads, head_dim)
        unused = q.new_empty(0)
        return attend(q, unused, unused, batch, k, v), attend_ref(q, unused, unused, batch, k, v)

    @pytest.mark.parametrize(
        ("heads", "groups", "head_dim", "block_size"), [(8, 2, 64, 128), (3, 3, 32, 16), (6, 1, 32, 5), (2, 1, 128, 64)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, FP8])
    def test_single_queries(heads: int, groups: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
        lengths = [1, 130, 64, 17]
        tables, num_blocks = tables_for(lengths, block_size)
        chunks = [(length - 1, length, table) for length, table in zip(lengths, tables, strict=True)]
        got, expected = attended(
            chunks, block_size, heads=heads, groups=groups, head_dim=head_dim, num_blocks=num_blocks, dtype=dtype
        )
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize(
        ("tile", "parts", "min_tiles"), [(16, 1, 1), (16, 3, 1), (16, 16, 1), (64, 2, 1), (16, 4, 4)]
    )
    def test_the_number_of_parts_changes_nothing(
        tile: int, parts: int, min_tiles: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(paged_decode, "tiling_of", lambda *_: paged_decode.Tiling(tile, 4, 2, parts, min_tiles))
        tables, num_blocks = tables_for([150, 16, 33], 16)
        chunks = [(149, 150, tables[0]), (15, 16, tables[1]), (32, 33, tables[2])]
        got, expected = attended(chunks, 16, heads=4, groups=2, head_dim=32, num_blocks=num_blocks)
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize(
        ("heads", "groups", "head_dim", "block_size"), [(8, 2, 32, 64), (3, 3, 32, 16), (6, 2, 64, 5), (8, 1, 128, 128)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, FP8])
    def test_chunks_and_single_queries_share_a_step(
        heads: int, groups: int, head_dim: int, block_size: int, dtype: torch.dtype
    ) -> None:
        starts, ends = [69, 0, 40, 5, 0, 3], [70, 1, 41, 45, 67, 4]
        tables, num_blocks = tables_for(ends, block_size)
        chunks = list(zip(starts, ends, tables, strict=True))
        got, expected = attended(
            chunks, block_size, heads=heads, groups=groups, head_dim=head_dim, num_blocks=num_blocks, dtype=dtype
        )
        torch.testing.assert_close(got, expected)

    def test_every_split_point_gives_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paged_prefill, "tiling_of", lambda *_, **__: paged_prefill.Tiling(16, 16, 4, 2))
        k, v = (garbage(4, 2, 16, 32, dtype=torch.float32) for _ in range(2))
        table, q = [2, 3], draw(24, 4, 32)
        whole = batch_of([(0, 24, table)], 16)
        write_kv_ref(draw(24, 2, 32, seed=2), draw(24, 2, 32, seed=3), whole, k, v)
        unused = q.new_empty(0)
        expected = attend_ref(q, unused, unused, whole, k, v)
        for split in range(1, 24):
            parts = [
                attend(q[begin:end], unused, unused, batch_of([(begin, end, table)], 16), k, v)
                for begin, end in ((0, split), (split, 24))
            ]
            torch.testing.assert_close(torch.cat(parts), expected)

    def test_a_row_is_found_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paged_prefill, "ROWS_AT_ONCE", 4)
        ends = [3, 1, 9, 2, 1, 5, 1, 1, 8, 4]
        tables, num_blocks = tables_for(ends, 16)
        chunks = [(0, end, table) for end, table in zip(ends, tables, strict=True)]
        got, expected = attended(chunks, 16, heads=4, groups=2, head_dim=32, num_blocks=num_blocks)
        torch.testing.assert_close(got, expected)

    def shared_batch(num_chunk: int) -> tuple[ForwardBatch, int]:
        """Rows 0, 1, 3 share three blocks of 16, row 2 does not; a last row has a chunk of `num_chunk` tokens."""
        ends = [50, 70, 33, 97]
        tables = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 8, 9], [1, 2, 3, 10, 11, 12, 13]]
        chunks = [(end - 1, end, table) for end, table in zip(ends, tables, strict=True)]
        if num_chunk:
            chunks.append((0, num_chunk, [14, 15]))
        batch = batch_of(chunks, 16)
        tiles = torch.full((3, 16), -1)
        tiles[0, :2], tiles[2, 0] = torch.tensor([0, 3]), 1  # tile 1 is padding
        blocks = torch.tensor([3, 3, 0, 3, 0])[: len(chunks)]
        return dataclasses.replace(batch, shared=SharedPrefix(blocks, tiles)), 16

    @pytest.mark.parametrize(("num_chunk", "parts"), [(0, 1), (0, 3), (20, 2)])
    @pytest.mark.parametrize(("heads", "groups", "dtype"), [(8, 2, torch.float32), (3, 1, torch.float32), (8, 2, FP8)])
    def test_a_shared_prefix_changes_nothing(
        num_chunk: int, parts: int, heads: int, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(paged_decode, "tiling_of", lambda *_: paged_decode.Tiling(16, 4, 2, parts, 1))
        batch, num_blocks = shared_batch(num_chunk)
        k, v = pool(num_blocks, groups, 16, 32, dtype)
        own = [(48, 50, [0, 0, 0, 4]), (48, 70, [0, 0, 0, 5, 6]), (48, 97, [0, 0, 0, 10, 11, 12, 13])]
        filled = batch_of([(0, 48, [1, 2, 3]), *own, (0, 33, [7, 8, 9]), (0, 32, [14, 15])], 16)
        size = filled.row_starts[-1]
        write_kv_ref(draw(size, groups, 32, seed=2), draw(size, groups, 32, seed=3), filled, k, v)
        q = draw(batch.row_starts[-1], heads, 32)
        unused = q.new_empty(0)
        got, expected = attend(q, unused, unused, batch, k, v), attend_ref(q, unused, unused, batch, k, v)
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("num_tokens", [1, 7])
    @pytest.mark.parametrize(("heads", "groups", "head_dim"), [(8, 2, 32), (20, 5, 64), (3, 3, 32)])
    @pytest.mark.parametrize("dtype", [torch.float32, FP8])
    def test_norm_rotation_and_write(
        num_tokens: int,
        heads: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(qk_rope, "FEW_TOKENS", 3)
        h, weight = draw(num_tokens, 16), draw((heads + 2 * groups) * head_dim, 16, seed=1)
        norm = Norm(torch.ones(16), 1e-5)
        q_norm, k_norm = Norm(1 + draw(head_dim, seed=2) / 9, 1e-5), Norm(1 + draw(head_dim, seed=3) / 9, 1e-2)
        rope = rope_tables(50, head_dim, 1e4, dtype=torch.float32, device=torch.device("cpu"))
        batch = batch_of([(30, 30 + num_tokens, [9, 9, 9, 9, 9, 9, 2, 1, 3])], 5)
        pools = [pool(4, groups, 5, head_dim, dtype) for _ in range(2)]
        q, _, _ = qkv(h, norm, Linear(weight), q_norm, k_norm, rope, batch, *pools[0])
        expected, _, _ = qkv_ref(h, norm, Linear(weight), q_norm, k_norm, rope, batch, *pools[1])
        torch.testing.assert_close(q, expected)
        for got, want in zip(*pools, strict=True):
            if dtype != FP8:
                torch.testing.assert_close(got, want, equal_nan=True)
                continue
            assert torch.equal(as_bytes(got)[:, :, 5:], as_bytes(want)[:, :, 5:])  # scales
            # The interpreter (3.7) loses the carry where rounding to e4m3 ends a binade: values are tested on a GPU.
            is_equal = as_bytes(got)[:, :, :5] == as_bytes(want)[:, :, :5]
            assert is_equal.float().mean() > 0.95
