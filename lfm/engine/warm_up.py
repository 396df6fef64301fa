"""The largest steps that can occur, run once on the scratch block: how much memory they take beside weights and cache.

No live block is named: a tail write is not idempotent, so nothing may run twice on a sequence's blocks.
"""

import torch

from lfm.config import EnginePlan
from lfm.engine.runner import Runner
from lfm.engine.sequence import Sequence
from lfm.engine.step import ScheduledBatch, ScheduledRow
from lfm.kernels.forward_batch import SCRATCH_BLOCK
from lfm.protocol import EngineRequest, SamplingParams

# What the steps run here do not show: fragmentation, lazily loaded kernels, the count pool of the penalties.
MARGIN_BYTES = 768 * 2**20


def measure_workspace(runner: Runner, plan: EnginePlan) -> int:
    """Bytes that a step needs at most on the GPU, from running the longest chunk and the widest decode step."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for batch in (_longest_chunk(plan), _widest_decode(plan)):
        runner.read(runner.sample(runner.forward(batch)))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + MARGIN_BYTES


def _longest_chunk(plan: EnginePlan) -> ScheduledBatch:
    """One prompt's last chunk of a full step at the end of the whole context."""
    end = plan.max_model_len - 1
    sequence = _scratch_sequence(plan, row=0, num_tokens=end)
    rows = [ScheduledRow(sequence, max(0, end - plan.step_tokens), end, True)]
    return ScheduledBatch(rows=rows, started=[sequence])


def _widest_decode(plan: EnginePlan) -> ScheduledBatch:
    """Every device row decodes, one of them at the end of the whole context, all with random sampling."""
    num_rows = min(plan.max_running, plan.step_tokens)
    lengths = [plan.max_model_len - 1] + [2] * (num_rows - 1)
    sequences = [_scratch_sequence(plan, row=row, num_tokens=length) for row, length in enumerate(lengths)]
    rows = [ScheduledRow(s, length - 1, length, True) for s, length in zip(sequences, lengths, strict=True)]
    return ScheduledBatch(rows=rows, started=sequences)


def _scratch_sequence(plan: EnginePlan, *, row: int, num_tokens: int) -> Sequence:
    sampling = SamplingParams(max_tokens=1, top_p=0.9, seed=0)
    request = EngineRequest(request_id=f"warm-up-{row}", prompt_ids=[0] * num_tokens, sampling=sampling)
    sequence = Sequence(request, arrival=row, root_hash=b"")
    sequence.row = row
    sequence.block_table = [SCRATCH_BLOCK] * -(-num_tokens // plan.block_size)
    return sequence
