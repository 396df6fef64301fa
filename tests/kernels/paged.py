"""Batches over a small paged cache, built by hand: the inputs of the kernels' tests."""

import torch
from torch import Tensor

from lfm.kernels.forward_batch import ForwardBatch


def batch_of(chunks: list[tuple[int, int, list[int]]], block_size: int, device: str = "cpu") -> ForwardBatch:
    """One row per (start, end, block table): its chunk of positions [start, end)."""
    positions, rows, slots, tail_write, tail_token, tail_read = [], [], [], [], [], []
    row_starts = [0]
    for row, (start, end, table) in enumerate(chunks):
        for position in range(start, end):
            positions.append(position)
            rows.append(row)
            slots.append(table[position // block_size] * block_size + position % block_size)
            if (position + 1) % block_size == 0 or position == end - 1:
                tail_write.append(table[position // block_size])
                tail_token.append(len(positions) - 1)
        tail_read.append(table[(start - 1) // block_size] if start else 0)
        row_starts.append(len(positions))
    longest = max(len(table) for _, _, table in chunks)

    def ints(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return ForwardBatch(
        ids_T=ints([0] * len(positions)),
        positions_T=ints(positions),
        rows_T=ints(rows),
        slots_T=ints(slots),
        starts_S=ints([start for start, _, _ in chunks]),
        row_starts_S1=ints(row_starts),
        block_tables_SN=ints([table + [0] * (longest - len(table)) for _, _, table in chunks]),
        tail_read_S=ints(tail_read),
        tail_write_W=ints(tail_write),
        tail_token_W=ints(tail_token),
        sample_T=ints([end - 1 for end in row_starts[1:]]),
        row_starts=tuple(row_starts),
        starts=tuple(start for start, _, _ in chunks),
        num_positions=max(end for _, end, _ in chunks),
    )


def garbage(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """What fresh memory may hold."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)
