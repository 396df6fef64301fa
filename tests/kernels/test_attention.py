"""Paged attention: any split of a sequence gives what the whole gives, and garbage in the pool is never seen."""

import pytest
import torch
from torch import Tensor

from lfm.kernels import attention
from lfm.kernels.attention import attend_packed, attend_ref, qkv_ref, rope_tables, write_kv_ref
from lfm.kernels.weights import Linear, Norm
from tests.kernels.paged import batch_of, garbage

HEADS, GROUPS, HEAD_DIM = 4, 2, 6


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, one query and one head at a time."""
    out = torch.zeros_like(q)
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            scores = k[: t + 1, group] @ q[t, head] / q.shape[2] ** 0.5
            out[t, head] = scores.softmax(0) @ v[: t + 1, group]
    return out


def qkv(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (length, HEADS, HEAD_DIM), (length, GROUPS, HEAD_DIM), (length, GROUPS, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def paged(
    chunks: list[tuple[int, int, list[int]]], rows: list[tuple[Tensor, Tensor, Tensor]], pool, block_size
) -> Tensor:
    batch = batch_of(chunks, block_size)
    q, k, v = (
        torch.cat([row[i][begin:end] for row, (begin, end, _) in zip(rows, chunks, strict=True)]) for i in range(3)
    )
    write_kv_ref(k, v, batch, *pool)
    return attend_ref(q, k, v, batch, *pool)


def new_pool(num_blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    shape = (num_blocks, GROUPS, block_size, HEAD_DIM)
    return garbage(*shape), garbage(*shape)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_every_split_point_gives_the_whole(block_size: int) -> None:
    row = qkv(9)
    expected = naive(*row)
    table = [5, 2, 8, 1, 9, 3, 7, 4, 6][: -(-9 // block_size)]
    for split in range(1, 9):
        pool = new_pool(10, block_size)
        parts = [paged([(b, e, table)], [row], pool, block_size) for b, e in ((0, split), (split, 9))]
        torch.testing.assert_close(torch.cat(parts), expected)


def test_decode_rows_and_chunks_share_a_step() -> None:
    """Decode rows first, then chunks, one of which has a single token."""
    rows = [qkv(6, 1), qkv(9, 2), qkv(8, 3), qkv(4, 4)]
    tables = [[1, 2], [3, 4, 5], [6, 7], [8]]
    pool = new_pool(9, 4)
    starts = [5, 8, 3, 3]
    for row, table, start in zip(rows, tables, starts, strict=True):
        paged([(0, start, table)], [row], pool, 4)
    chunks = [(start, row[0].shape[0], table) for row, table, start in zip(rows, tables, starts, strict=True)]
    got = paged(chunks, rows, pool, 4)
    expected = torch.cat([naive(*row)[start:] for row, start in zip(rows, starts, strict=True)])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tile", [1, 2, 1000])
def test_tiles_do_not_change_the_result(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_TILE", tile)
    monkeypatch.setattr(attention, "DECODE_TILE", tile)
    row, other = qkv(7), qkv(5, 1)
    pool = new_pool(5, 4)
    parts = [paged([(0, 6, [1, 2]), (0, 4, [3, 4])], [row, other], pool, 4)]
    parts.append(paged([(6, 7, [1, 2]), (4, 5, [3, 4])], [row, other], pool, 4))
    torch.testing.assert_close(parts[0], torch.cat([naive(*row)[:6], naive(*other)[:4]]))
    torch.testing.assert_close(parts[1], torch.cat([naive(*row)[6:], naive(*other)[4:]]))


def test_packed_attention_keeps_rows_apart() -> None:
    rows = [qkv(5, 1), qkv(1, 2), qkv(8, 3)]
    batch = batch_of([(0, 5, [1, 2]), (0, 1, [3]), (0, 8, [4, 5])], 4)
    q, k, v = (torch.cat([row[i] for row in rows]) for i in range(3))
    torch.testing.assert_close(
        attend_packed(q, k, v, batch, garbage(0), garbage(0)), torch.cat([naive(*row) for row in rows])
    )


def test_rotation_depends_on_relative_positions_only() -> None:
    """Source of the form: rotate-half; scores of q at p and k at r depend on p - r. Norms come before it."""
    h = torch.randn(1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(
        (HEADS + 2 * GROUPS) * HEAD_DIM, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    norms = [Norm(1 + 0.1 * torch.arange(size, dtype=torch.float64), 1e-5) for size in (8, HEAD_DIM, HEAD_DIM)]
    rope = rope_tables(200, HEAD_DIM, 10000.0, dtype=torch.float64, device=torch.device("cpu"))

    def at(position: int) -> tuple[Tensor, Tensor, Tensor]:
        batch = batch_of([(position, position + 1, list(range(1, 60)))], 4)
        return qkv_ref(h, norms[0], Linear(weight), norms[1], norms[2], rope, batch, *new_pool(61, 4))

    def score(q_at: int, k_at: int) -> float:
        return float(at(q_at)[0][0, 0] @ at(k_at)[1][0, 0])

    assert score(5, 2) == pytest.approx(score(103, 100), rel=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-3)
    normed = h / (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norms[0].weight
    q, _, v = at(0)
    raw = (normed @ weight.T).view(-1, HEAD_DIM)
    torch.testing.assert_close(v[0], raw[HEADS + GROUPS :])
    expected_q = raw[:HEADS] / (raw[:HEADS].pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norms[1].weight
    torch.testing.assert_close(q[0], expected_q)


def test_k_and_v_are_written_where_the_table_says() -> None:
    pool = new_pool(4, 4)
    h = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn((HEADS + 2 * GROUPS) * HEAD_DIM, 8, dtype=torch.float64)
    norms = [Norm(torch.ones(size, dtype=torch.float64), 1e-5) for size in (8, HEAD_DIM, HEAD_DIM)]
    rope = rope_tables(8, HEAD_DIM, 10000.0, dtype=torch.float64, device=torch.device("cpu"))
    batch = batch_of([(2, 7, [3, 1])], 4)
    _, k, v = qkv_ref(h, norms[0], Linear(weight), norms[1], norms[2], rope, batch, *pool)
    for token, position in enumerate(range(2, 7)):
        block, offset = (3, 1)[position // 4], position % 4
        assert torch.equal(pool[0][block, :, offset], k[token])
        assert torch.equal(pool[1][block, :, offset], v[token])
    assert int(pool[0].isfinite().all(-1).all(1).sum()) == 5
