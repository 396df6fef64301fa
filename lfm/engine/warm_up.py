"""Steps run once on the scratch block, before there are requests: the largest ones, to see what memory they take beside
weights and cache; and one of every kind, in a dry run, to see which kernels they take.

No live block is named: a tail write is not idempotent, so nothing may run twice on a sequence's blocks.
"""

import itertools
from collections.abc import Iterator

import torch

from lfm.config import EnginePlan
from lfm.engine.chunk_graphs import TOKENS
from lfm.engine.grammar_masks import num_mask_words
from lfm.engine.runner import Runner
from lfm.engine.sampling_rows import NARROW_BUCKETS, SampleFlags
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
    for batch in largest_steps(plan):
        runner.read(runner.sample(runner.forward(batch)))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + MARGIN_BYTES


def largest_steps(plan: EnginePlan) -> tuple[ScheduledBatch, ScheduledBatch]:
    """The longest chunk and the widest decode step."""
    return _longest_chunk(plan), _widest_decode(plan)


def run_every_step(runner: Runner, plan: EnginePlan) -> None:
    """Run a step of every kind that can occur, those first that come first; nothing is read. For a dry run.

    What a kernel is compiled for depends on classes of tokens and of rows. All shapes with graphs are run, and, without
    graphs, what they do not cover: prompts of all those sizes alone, and one beside every power of two of other rows.
    """
    for batch in itertools.chain(largest_steps(plan), _prompts(plan)):
        runner.sample(runner.forward(batch))
    runner.rows.write_masks([0], torch.zeros(1, num_mask_words(runner.rows.vocab_size), dtype=torch.int32))
    runner.run_every_shape(
        [
            SampleFlags(repetition=repetition, narrow_k=narrow_k, mask=mask)
            for repetition, narrow_k, mask in itertools.product((False, True), (0, NARROW_BUCKETS[0]), (False, True))
        ]
    )


def _prompts(plan: EnginePlan) -> Iterator[ScheduledBatch]:
    """A prompt of every size of step, alone, and one behind 1, 2, 4, 8 ... rows that decode."""
    sizes = sorted({*(tokens for tokens in TOKENS if tokens <= plan.step_tokens), plan.step_tokens})
    powers = [1 << i for i in range((plan.max_running - 1).bit_length())]
    behind = [(num + 2, num) for num in powers if num + 2 <= plan.step_tokens]
    for num_tokens, num_decoding in [(size, 0) for size in sizes] + behind:
        num_prompt = min(num_tokens - num_decoding, plan.max_model_len - 1)
        lengths = [2] * num_decoding + [num_prompt]
        starts = [1] * num_decoding + [0]
        sequences = [_scratch_sequence(plan, row=row, num_tokens=length) for row, length in enumerate(lengths)]
        rows = [ScheduledRow(s, start, len(s.ids), True) for s, start in zip(sequences, starts, strict=True)]
        yield ScheduledBatch(rows=rows, started=sequences, num_single=num_decoding)


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
