"""The block table of every device row: on the host to place K and V, on the device for attention to read.

A row's entries are appended as its sequence grows; only what is new travels. What a row's last sequence left beyond the
new one's end stays, and is never read: attention stops at a row's length.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lfm.engine.step import ScheduledBatch
from lfm.kernels.forward_batch import SCRATCH_BLOCK

STAGED_ENTRIES = 8192  # new entries of a step that need no memory of their own on their way


class BlockTables:
    """Tables of `max_running` rows and one scratch row (the last), each of `max_blocks` blocks.

    `num_starts` counts the sequences that began or resumed: while it stays, so does the owner of every row.
    """

    def __init__(self, *, max_running: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        shape = (max_running + 1, max_blocks)
        self.host: NDArray[np.int64] = np.full(shape, SCRATCH_BLOCK, dtype=np.int64)
        self.device: Tensor = torch.full(shape, SCRATCH_BLOCK, dtype=torch.int64, device=device)
        self.scratch_row = max_running
        self.num_starts = 0
        self._block_size = block_size
        self._num_filled = np.zeros(max_running, dtype=np.int64)
        self._is_shared = device.type == "cpu"
        self._staging: list[Tensor] = []
        if self._is_shared:
            self.device = torch.from_numpy(self.host)
        else:  # two in turn: written again when the step that copied from it has been read back
            is_cuda = device.type == "cuda"
            self._staging = [torch.zeros(2 * STAGED_ENTRIES, dtype=torch.int64, pin_memory=is_cuda) for _ in range(2)]

    def extend(self, batch: ScheduledBatch, device_rows: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """Append what the batch's rows lack up to their ends [S]. Never waits for the device."""
        for sequence in batch.started:
            self._num_filled[sequence.row] = 0
        self.num_starts += len(batch.started)
        lacking = np.flatnonzero(self._num_filled[device_rows] * self._block_size < ends)
        if not len(lacking):
            return
        indices: list[int] = []
        blocks: list[int] = []
        for index in lacking.tolist():
            table, device_row = batch.rows[index].sequence.block_table, int(device_rows[index])
            filled = int(self._num_filled[device_row])
            self.host[device_row, filled : len(table)] = table[filled:]
            begin = device_row * self.host.shape[1]
            indices += range(begin + filled, begin + len(table))
            blocks += table[filled:]
            self._num_filled[device_row] = len(table)
        if not self._is_shared:
            self._send(indices, blocks)

    def _send(self, indices: list[int], blocks: list[int]) -> None:
        self._staging.reverse()
        staging, size = self._staging[0], 2 * len(indices)
        if size > len(staging):
            staging = torch.zeros(size, dtype=torch.int64, pin_memory=self.device.is_cuda)
        staging[:size].numpy()[:] = indices + blocks
        on_device = staging[:size].to(self.device.device, non_blocking=True)
        self.device.view(-1)[on_device[: len(indices)]] = on_device[len(indices) :]
