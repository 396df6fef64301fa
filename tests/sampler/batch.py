"""A batch of sequences in rows of a sampler, as the engine would hold them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lfm.engine.sampler import SampleOutput, sample
from lfm.engine.sampling_rows import RowStart, SamplingRows
from lfm.protocol import SamplingParams

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Case:
    """One sequence and the logits of its next token."""

    logits: list[float]
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=1))
    seed: int = 0
    ids: list[int] = field(default_factory=lambda: [0])
    num_prompt: int = 1
    mask_padded_ids: bool = True

    def start(self, row: int) -> RowStart:
        return RowStart(
            row=row,
            params=self.params,
            seed=self.seed,
            ids=self.ids,
            num_prompt=self.num_prompt,
            mask_padded_ids=self.mask_padded_ids,
        )


def params(**given: object) -> SamplingParams:
    """SamplingParams with max_tokens out of the way."""
    return SamplingParams(max_tokens=1000, **given)  # type: ignore[arg-type]


def run(
    cases: Sequence[Case],
    *,
    num_ids: int | None = None,
    num_rows: int | None = None,
    at: Sequence[int] | None = None,
    num_padding: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device = CPU,
    ok: Sequence[bool] | None = None,
) -> tuple[SampleOutput, SamplingRows]:
    """Start the cases in rows `at` and sample them as one batch, padding rows behind them. All of it anew."""
    size = len(cases[0].logits)
    rows = SamplingRows(num_rows or len(cases), size, num_ids=num_ids or size, device=device)
    numbers = list(at) if at is not None else list(range(len(cases)))
    rows.start_many([case.start(row) for case, row in zip(cases, numbers, strict=True)])
    logits = torch.tensor([case.logits for case in cases] + [[0.0] * size] * num_padding, dtype=dtype, device=device)
    row_R = torch.tensor(numbers + [rows.scratch_row] * num_padding, device=device)
    positions = torch.tensor([len(case.ids) for case in cases] + [0] * num_padding, device=device)
    ok_R: Tensor | None = torch.tensor(ok, device=device) if ok is not None else None
    flags = rows.flags(numbers)
    return sample(rows, logits, row_R=row_R, position_R=positions, flags=flags, ok_R=ok_R), rows


def ids_of(cases: Sequence[Case], **options: object) -> list[int]:
    """The ids sampled for the cases, without those of padding rows."""
    output, _ = run(cases, **options)  # type: ignore[arg-type]
    return output.ids_R.tolist()[: len(cases)]
