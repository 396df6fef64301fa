"""The ops of a CPU against the references, in float64: any rows, any split, garbage in the pool."""

import pytest
import torch
from torch import Tensor

from lfm.kernels import cpu_attention, cpu_experts
from lfm.kernels.attention import attend_ref, qkv_ref, rope_tables
from lfm.kernels.cpu_attention import cpu_attend, cpu_qkv
from lfm.kernels.cpu_conv import cpu_conv_in
from lfm.kernels.cpu_layers import cpu_dense, cpu_norm, cpu_project_add, cpu_route
from lfm.kernels.experts import experts_ref
from lfm.kernels.norm import dense_ref, project_add_ref, rms_norm_ref
from lfm.kernels.router import route_ref
from lfm.kernels.short_conv import conv_in_ref
from lfm.kernels.weights import Linear, Norm, Router
from tests.kernels.paged import batch_of, garbage

HIDDEN, HEADS, GROUPS, HEAD_DIM, BLOCK = 8, 4, 2, 6, 4
# Rows of (start, end): decode at all kinds of positions; chunks from a start, from inside a block, over several blocks.
STEPS = [
    [(0, 1)],
    [(5, 6)],
    [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (9, 10)],
    [(0, 9)],
    [(3, 5)],
    [(1, 9)],
    [(4, 12)],
    [(6, 7), (1, 2), (0, 3), (2, 11), (8, 9)],
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_of(rows: list[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
    """The rows with three blocks each; block 0 is the scratch block."""
    return [(start, end, [3 * row + 3, 3 * row + 1, 3 * row + 2]) for row, (start, end) in enumerate(rows)]


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("has_bias", [True, False])
def test_norm_and_projections(num_tokens: int, has_bias: bool) -> None:
    h, x, norm = draw(num_tokens, HIDDEN), draw(num_tokens, 5, seed=1), Norm(draw(HIDDEN, seed=2), 1e-5)
    down = Linear(draw(HIDDEN, 5, seed=3), draw(HIDDEN, seed=4) if has_bias else None)
    gate_up = Linear(draw(10, HIDDEN, seed=5), draw(10, seed=6) if has_bias else None)
    torch.testing.assert_close(cpu_norm(h, norm), rms_norm_ref(h, norm))
    torch.testing.assert_close(cpu_norm(h * 0, norm._replace(eps=0.0)), rms_norm_ref(h * 0, norm._replace(eps=0.0)),
                               equal_nan=True)  # fmt: skip
    torch.testing.assert_close(cpu_project_add(h, x, down), project_add_ref(h, x, down))
    torch.testing.assert_close(cpu_dense(h, norm, gate_up, down), dense_ref(h, norm, gate_up, down))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_of_what_is_not_finite_is_not_finite(bad: float) -> None:
    x = draw(1, HIDDEN)
    x[0, 3] = bad
    assert not cpu_norm(x, Norm(draw(HIDDEN, seed=2), 1e-5)).isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_router(num_tokens: int, normalise: bool, has_bias: bool) -> None:
    h, norm = draw(num_tokens, HIDDEN), Norm(draw(HIDDEN, seed=2), 1e-5)
    bias = draw(6, seed=3).float() if has_bias else None
    for scale, is_real in ((1.0, None), (2.5, torch.arange(num_tokens) % 2)):
        router = Router(draw(6, HIDDEN, seed=4), bias, 3, normalise, scale)
        for mine, theirs in zip(cpu_route(h, norm, router, is_real), route_ref(h, norm, router, is_real), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("max_copy", [0, 2**21], ids=["large", "small"])
@pytest.mark.parametrize("is_by_columns", [True, False])
@pytest.mark.parametrize(
    "chosen", [[[3, 0, 2]], [[4, 5, 5]], [[5, 5, 5]], [[1, 0, 2], [5, 5, 5], [2, 4, 1], [0, 2, 5]]]
)
def test_experts(chosen: list[list[int]], is_by_columns: bool, max_copy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id of 5 is no expert here. What nobody chose may be anything."""
    monkeypatch.setattr(cpu_experts, "MAX_COPY", max_copy)
    num_tokens, ids = len(chosen), torch.tensor(chosen)
    gate_up, down = draw(5, 8, HIDDEN, seed=1), draw(5, HIDDEN, 4, seed=2)
    for expert in set(range(5)) - set(ids.flatten().tolist()):
        gate_up[expert] = down[expert] = float("nan")
    if is_by_columns:
        down = down.transpose(1, 2).contiguous().transpose(1, 2)
    arguments = draw(num_tokens, HIDDEN), draw(num_tokens, HIDDEN, seed=5), ids, draw(num_tokens, 3, seed=6)
    expected = experts_ref(*arguments, gate_up, down)
    torch.testing.assert_close(cpu_experts.cpu_experts(*arguments, gate_up, down), expected)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", STEPS, ids=str)
def test_convolution_and_the_tails_it_leaves(rows: list[tuple[int, int]], window: int, has_bias: bool) -> None:
    batch = batch_of(step_of(rows), BLOCK)
    num_tokens = len(batch.rows_T)
    h, norm = draw(num_tokens, HIDDEN), Norm(draw(HIDDEN, seed=2), 1e-5)
    in_proj = Linear(draw(3 * HIDDEN, HIDDEN, seed=3), draw(3 * HIDDEN, seed=4) if has_bias else None)
    conv = Linear(draw(HIDDEN, window, seed=5), draw(HIDDEN, seed=6) if has_bias else None)
    mine = draw(3 * len(rows) + 1, window - 1, HIDDEN, seed=7)
    mine[0] = float("nan")  # the scratch block, which rows at position 0 name
    theirs = mine.clone()
    expected = conv_in_ref(h, norm, in_proj, conv, batch, theirs)
    torch.testing.assert_close(cpu_conv_in(h, norm, in_proj, conv, batch, mine), expected)
    torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("tile", [1, 3, 128])
@pytest.mark.parametrize("rows", STEPS, ids=str)
def test_attention(rows: list[tuple[int, int]], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "QUERY_TILE", tile)
    weight = Linear(draw((HEADS + 2 * GROUPS) * HEAD_DIM, HIDDEN, seed=1))
    norms = [Norm(1 + 0.1 * draw(size, seed=2), 1e-5) for size in (HIDDEN, HEAD_DIM, HEAD_DIM)]
    norms[2] = norms[2]._replace(weight=norms[2].weight * 1.5)
    rope = rope_tables(16, HEAD_DIM, 10000.0, dtype=torch.float64, device=torch.device("cpu"))
    pools = [garbage(3 * len(rows) + 1, GROUPS, BLOCK, HEAD_DIM) for _ in range(4)]
    before = [(0, start) for start, _ in rows]
    for seed, part in ((3, [row for row in before if row[1]]), (4, rows)):
        if not part:
            continue
        tables = [step[2] for step, row in zip(step_of(rows), before, strict=True) if part is rows or row[1]]
        batch = batch_of([(*row, table) for row, table in zip(part, tables, strict=True)], BLOCK)
        h = draw(len(batch.rows_T), HIDDEN, seed=seed)
        mine = cpu_qkv(h, norms[0], weight, norms[1], norms[2], rope, batch, *pools[:2])
        theirs = qkv_ref(h, norms[0], weight, norms[1], norms[2], rope, batch, *pools[2:])
        for one, other in zip((*mine, *pools[:2]), (*theirs, *pools[2:]), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
        expected = attend_ref(*theirs, batch, *pools[2:])
        torch.testing.assert_close(cpu_attend(*mine, batch, *pools[:2]), expected)
