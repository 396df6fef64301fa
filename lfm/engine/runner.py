"""The device side of a step: forward, then sampling, as two launches that never wait; and reading the answer.

Features go beside this file, not into it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lfm.engine.batch import BatchBuilder, StepTensors
from lfm.engine.sampler import Logprobs, SampleOutput, sample, token_logprobs
from lfm.engine.sampling_rows import SamplingRows
from lfm.engine.step import ScheduledBatch, ScheduledRow, StepResult
from lfm.kernels.forward_batch import CacheTensors
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import Ops
from lfm.protocol import TokenLogprob

# Prompt tokens per pass over the head: bounds the logits of a prompt that asks for its log-probabilities.
PROMPT_LOGPROBS_PASS = 256


@dataclass(slots=True)
class Forwarded:
    """A forward on its way: what sampling and reading need of it. Nothing here has been waited for."""

    batch: ScheduledBatch
    step: StepTensors
    logits_RV: Tensor
    is_finite_S: Tensor
    prompt_logprobs: dict[int, tuple[Tensor, Logprobs]]  # per row of the batch: (target ids, their log-probabilities)


@dataclass(slots=True)
class Launched:
    """A step on its way. `done` is None where the device is the host."""

    batch: ScheduledBatch
    sampled_S: tuple[int, ...]
    ids_R: Tensor
    is_finite_S: Tensor
    logprobs: Logprobs | None
    prompt_logprobs: dict[int, tuple[Tensor, Logprobs]]
    done: torch.cuda.Event | None


class Runner:
    """Executes steps of one model on one device, in order, on the current stream."""

    def __init__(
        self, model: Lfm2, cache: CacheTensors, rows: SamplingRows, builder: BatchBuilder, *, ops: Ops
    ) -> None:
        self.model = model
        self.cache = cache
        self.rows = rows
        self.ops = ops
        self._builder = builder

    @property
    def is_async(self) -> bool:
        """Whether launching returns before the step is computed, so that the host can work ahead."""
        return self.rows.device.type == "cuda"

    @torch.inference_mode()
    def forward(self, batch: ScheduledBatch) -> Forwarded:
        """Launch the model on a scheduled step."""
        self.rows.start_many(self._builder.starts(batch))
        step = self._builder.build(batch, self.rows.last_ids_R)
        hidden_TD = self.model(step.forward, self.cache, self.ops)
        return Forwarded(
            batch=batch,
            step=step,
            logits_RV=self.model.head(hidden_TD[step.forward.sample_T], self.ops),
            is_finite_S=_finite_rows(hidden_TD, step.forward.rows_T, len(batch.rows)),
            prompt_logprobs=self._prompt_logprobs(batch, step, hidden_TD),
        )

    @torch.inference_mode()
    def sample(self, forwarded: Forwarded) -> Launched:
        """Launch sampling of the rows that need a token, and the copy of the answer to the host."""
        step = forwarded.step
        output = SampleOutput(step.sampled_rows_R, None)
        if step.sampled_S:
            sampled_rows = [forwarded.batch.rows[index].sequence.row for index in step.sampled_S]
            output = sample(
                self.rows,
                forwarded.logits_RV,
                row_R=step.sampled_rows_R,
                position_R=step.sampled_positions_R,
                flags=self.rows.flags(sampled_rows),
            )
        launched = Launched(
            batch=forwarded.batch,
            sampled_S=step.sampled_S,
            ids_R=_to_host(output.ids_R),
            is_finite_S=_to_host(forwarded.is_finite_S),
            logprobs=_logprobs_to_host(output.logprobs) if output.logprobs else None,
            prompt_logprobs={
                index: (_to_host(targets), _logprobs_to_host(logprobs))
                for index, (targets, logprobs) in forwarded.prompt_logprobs.items()
            },
            done=torch.cuda.Event() if self.is_async else None,  # type: ignore[no-untyped-call]
        )
        if launched.done is not None:
            launched.done.record()
        return launched

    def read(self, launched: Launched) -> StepResult:
        """Wait for a step (the only wait of the engine) and turn its answer into plain Python."""
        if launched.done is not None:
            launched.done.synchronize()
        num_rows = len(launched.batch.rows)
        token_ids = [-1] * num_rows
        for index, token_id in zip(launched.sampled_S, launched.ids_R.tolist(), strict=True):
            token_ids[index] = token_id
        return StepResult(
            token_ids=token_ids,
            is_finite=launched.is_finite_S.tolist(),
            logprobs=_read_logprobs(launched) if launched.logprobs is not None else None,
            prompt_logprobs={
                index: _entries(targets.tolist(), logprobs, _prompt_top(launched.batch.rows[index]))
                for index, (targets, logprobs) in launched.prompt_logprobs.items()
            },
        )

    def _prompt_logprobs(
        self, batch: ScheduledBatch, step: StepTensors, hidden_TD: Tensor
    ) -> dict[int, tuple[Tensor, Logprobs]]:
        """Log-probabilities of the prompt tokens that follow each position of the chunks that ask for them."""
        found = {}
        for index, row in enumerate(batch.rows):
            sequence = row.sequence
            count = min(row.end, sequence.num_prompt - 1) - row.start
            if not sequence.wants_prompt_logprobs or count <= 0:
                continue
            begin = step.forward.row_starts[index]
            targets = torch.tensor(sequence.ids[row.start + 1 : row.start + 1 + count], device=hidden_TD.device)
            found[index] = (targets, self._head_logprobs(hidden_TD[begin : begin + count], targets, _prompt_top(row)))
        return found

    def _head_logprobs(self, hidden_MD: Tensor, targets_M: Tensor, num_top: int) -> Logprobs:
        size = PROMPT_LOGPROBS_PASS
        parts = [
            token_logprobs(self.model.head(hidden, self.ops), targets, num_top=num_top, num_ids=self.rows.num_ids)
            for hidden, targets in zip(torch.split(hidden_MD, size), torch.split(targets_M, size), strict=True)
        ]
        return Logprobs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _finite_rows(hidden_TD: Tensor, rows_T: Tensor, num_rows: int) -> Tensor:
    """Whether every hidden state of a row is finite [S]: what a NaN anywhere in its chunk would show in."""
    is_bad_T = (~hidden_TD.isfinite().all(dim=1)).to(torch.int32)
    num_bad_S = torch.zeros(num_rows, dtype=torch.int32, device=hidden_TD.device)
    return num_bad_S.index_add_(0, rows_T, is_bad_T) == 0


def _to_host(tensor: Tensor) -> Tensor:
    """Copy to pinned host memory without waiting; the same tensor where it is on the host already."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _logprobs_to_host(logprobs: Logprobs) -> Logprobs:
    return Logprobs(*(_to_host(column) for column in logprobs))


def _prompt_top(row: ScheduledRow) -> int:
    return row.sequence.request.sampling.prompt_logprobs or 0


def _entries(ids: list[int], logprobs: Logprobs, num_top: int) -> list[TokenLogprob]:
    """Plain objects of a column of log-probabilities, each with its first `num_top` alternatives."""
    columns = zip(ids, logprobs.chosen_R.tolist(), logprobs.top_ids_RK.tolist(), logprobs.top_RK.tolist(), strict=True)
    return [
        TokenLogprob(token_id, value, [pair for pair in zip(top_ids, top, strict=True) if pair[0] >= 0][:num_top])
        for token_id, value, top_ids, top in columns
    ]


def _read_logprobs(launched: Launched) -> list[TokenLogprob | None]:
    """Per row of the batch, the log-probability of its new id where the request asks for it."""
    assert launched.logprobs is not None
    found: list[TokenLogprob | None] = [None] * len(launched.batch.rows)
    entries = _entries(launched.ids_R.tolist(), launched.logprobs, launched.logprobs.top_RK.shape[1])
    for index, entry in zip(launched.sampled_S, entries, strict=True):
        wanted = launched.batch.rows[index].sequence.request.sampling.logprobs
        if wanted is not None:
            found[index] = TokenLogprob(entry.token_id, entry.logprob, entry.top[:wanted])
    return found
