"""Sampling never waits for the device, and its shapes depend on the number of rows alone.

Run on tensors without memory: whatever reads a value, or has a shape that depends on one, raises.
"""

import pytest
import torch

from lfm.engine.sampler import SampleOutput, sample, token_logprobs
from lfm.engine.sampling_rows import RowStart, SampleFlags, SamplingRows, flags_of
from tests.sampler.batch import CPU, params
from tests.sampler.test_sampler import WAYS

META = torch.device("meta")
ALL = SampleFlags(
    repetition=True,
    counts=True,
    bias=True,
    min_tokens=True,
    narrow_k=64,
    wide=True,
    wide_prefix=True,
    num_logprobs=5,
)


def sample_without_memory(flags: SampleFlags, num_rows: int) -> SampleOutput:
    rows = SamplingRows(8, 5000, num_ids=4900, device=META)
    rows.counts_RV = torch.zeros(9, 5000, dtype=torch.int16, device=META)
    for lists in (rows.bias, rows.stops):
        lists.ids = torch.zeros(9, 16, dtype=torch.int64, device=META)
        lists.values = torch.zeros(9, 16, dtype=torch.float64, device=META)
    row_R = torch.zeros(num_rows, dtype=torch.int64, device=META)
    logits = torch.zeros(num_rows, 5000, dtype=torch.bfloat16, device=META)
    ok_R = torch.ones(num_rows, dtype=torch.bool, device=META)
    return sample(rows, logits, row_R=row_R, position_R=row_R, flags=flags, ok_R=ok_R)


@pytest.mark.parametrize("flags", [ALL, *(flags_of(way) for way in WAYS)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 5])
def test_sampling_reads_no_value_and_stays_on_the_device(flags: SampleFlags, num_rows: int) -> None:
    output = sample_without_memory(flags, num_rows)
    assert output.ids_R.shape == (num_rows,)
    assert output.ids_R.dtype == torch.int64
    assert output.ids_R.device.type == "meta"
    assert (output.logprobs is not None) == (flags.num_logprobs >= 0)


def test_prompt_logprobs_read_no_value() -> None:
    logits = torch.zeros(7, 5000, dtype=torch.bfloat16, device=META)
    targets = torch.zeros(7, dtype=torch.int64, device=META)
    assert token_logprobs(logits, targets, num_top=3, num_ids=4900).top_RK.shape == (7, 3)


def test_this_check_notices_a_wait() -> None:
    x = torch.zeros(3, device=META)
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        x[x > 0]


def test_a_batch_of_no_rows_gives_no_ids() -> None:
    rows = SamplingRows(1, 50, num_ids=50, device=CPU)
    rows.start(RowStart(row=0, params=params(), seed=0, ids=[1], num_prompt=1))
    none = torch.zeros(0, dtype=torch.int64)
    output = sample(rows, torch.zeros(0, 50), row_R=none, position_R=none, flags=SampleFlags(narrow_k=64, wide=True))
    assert output.ids_R.shape == (0,)
