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


class BlockTables:
    """Tables of `max_running` rows and one scratch row (the last), each of `max_blocks` blocks."""

    def __init__(self, *, max_running: int, max_blocks: int, device: torch.device) -> None:
        shape = (max_running + 1, max_blocks)
        self.host: NDArray[np.int64] = np.full(shape, SCRATCH_BLOCK, dtype=np.int64)
        self.device: Tensor = torch.full(shape, SCRATCH_BLOCK, dtype=torch.int64, device=device)
        self._num_filled = [0] * max_running
        self._is_shared = device.type == "cpu"
        if self._is_shared:
            self.device = torch.from_numpy(self.host)

    def extend(self, batch: ScheduledBatch) -> None:
        """Append the blocks that the batch's sequences got since the last step. Never waits for the device."""
        for sequence in batch.started:
            self._num_filled[sequence.row] = 0
        indices: list[int] = []
        blocks: list[int] = []
        for row in batch.rows:
            table, device_row = row.sequence.block_table, row.sequence.row
            filled = self._num_filled[device_row]
            if filled == len(table):
                continue
            self.host[device_row, filled : len(table)] = table[filled:]
            begin = device_row * self.host.shape[1]
            indices += range(begin + filled, begin + len(table))
            blocks += table[filled:]
            self._num_filled[device_row] = len(table)
        if indices and not self._is_shared:
            new = torch.tensor((indices, blocks), dtype=torch.int64).pin_memory()
            on_device = new.to(self.device.device, non_blocking=True)
            self.device.view(-1)[on_device[0]] = on_device[1]
