"""Log-probabilities under the raw logits, of sampled tokens and of prompts."""

import math

import pytest
import torch

from lfm.engine.sampler import token_logprobs
from tests.sampler.batch import Case, params, run


def test_logprobs_are_those_of_the_raw_logits_whatever_the_parameters() -> None:
    logits = [0.5, 2.0, 2.0, -1.0, 0.0]
    changed = params(temperature=0.0, logit_bias={3: 100.0}, repetition_penalty=3.0, presence_penalty=2.0, logprobs=3)
    output, _ = run([Case(logits=logits, params=changed, ids=[1, 1])])
    raw = torch.tensor(logits).log_softmax(dim=0)
    assert output.ids_R.tolist() == [3]
    assert output.logprobs is not None
    assert output.logprobs.chosen_R.tolist() == pytest.approx([raw[3].item()])
    assert output.logprobs.top_ids_RK.tolist() == [[1, 2, 0]]
    assert output.logprobs.top_RK[0].tolist() == pytest.approx(raw[[1, 2, 0]].tolist())
    assert output.logprobs.top_RK.dtype == torch.float32


def test_the_batch_reports_as_many_alternatives_as_any_row_asks_for() -> None:
    cases = [Case(logits=[0.0] * 9, params=params(temperature=1.0, logprobs=n)) for n in (None, 0, 4)]
    output, _ = run(cases)
    assert output.logprobs is not None
    assert output.logprobs.top_ids_RK.shape == (3, 4)
    alone, _ = run(cases[1:2])
    assert alone.logprobs is not None
    assert alone.logprobs.top_ids_RK.shape == (1, 0)
    assert run(cases[:1])[0].logprobs is None


def test_alternatives_have_a_text_and_missing_ones_are_minus_1() -> None:
    case = Case(logits=[0.0, 3.0, -math.inf, 9.0], params=params(temperature=0.0, logprobs=10))
    output, _ = run([case], num_ids=3)
    assert output.logprobs is not None
    assert output.logprobs.top_ids_RK.tolist() == [[1, 0, -1, -1]]
    # The softmax runs over all four, as in transformers.
    assert output.logprobs.chosen_R.item() == pytest.approx(3 - torch.tensor(case.logits).logsumexp(0).item())


def test_a_failed_row_has_no_logprob_and_disturbs_no_other() -> None:
    good = Case(logits=[0.0, 1.0], params=params(temperature=0.0, logprobs=1))
    bad = Case(logits=[math.nan, 1.0], params=good.params)
    output, _ = run([good, bad, good])
    assert output.logprobs is not None
    assert output.logprobs.chosen_R.isnan().tolist() == [False, True, False]
    assert output.logprobs.top_ids_RK[[0, 2]].tolist() == [[1], [1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prompt_logprobs_equal_log_softmax_token_by_token(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm.engine.sampler.CPU_PASS", 3 * 50)  # 3 tokens a pass
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(10, 50, generator=random).to(dtype)
    before = logits.clone()
    targets = torch.randint(0, 50, (10,), generator=random)
    found = token_logprobs(logits, targets, num_top=2, num_ids=50)
    raw = logits.float().log_softmax(dim=1)
    assert found.chosen_R.equal(raw[torch.arange(10), targets])
    values, _ = raw.topk(2, dim=1)
    assert found.top_RK.equal(values)
    assert raw.gather(1, found.top_ids_RK).equal(values)
    assert logits.equal(before)


def test_prompt_logprobs_without_alternatives() -> None:
    found = token_logprobs(torch.zeros(4, 8), torch.arange(4), num_top=0, num_ids=8)
    assert found.chosen_R.tolist() == pytest.approx([-math.log(8)] * 4)
    assert found.top_ids_RK.shape == found.top_RK.shape == (4, 0)
