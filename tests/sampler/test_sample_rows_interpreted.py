"""The fused sampler on a CPU against the plain one: ids and everything that is marked."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lfm.engine import sampler
from lfm.engine.sampler import sample
from lfm.engine.sampling_rows import SamplingRows
from lfm.kernels import sample_rows as fused
from lfm.kernels.penalties import pack_bits
from tests.kernels.interpreted import IS_INTERPRETED, run_interpreted
from tests.sampler.batch import CPU, Case, params

GREEDY = params(temperature=0.0)
WAYS = [
    params(temperature=0.1, top_k=50, repetition_penalty=1.05),
    params(temperature=1.0, top_k=64, top_p=0.8),
    params(temperature=0.7, top_k=20, min_p=0.1, repetition_penalty=1.3),
    GREEDY,
]

if not IS_INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    from types import SimpleNamespace

    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN on purpose

    def elementwise(function):
        """A function of libdevice, which the interpreter lacks."""

        def apply(x):
            return tl.tensor(TensorHandle(function(x.handle.data), x.handle.dtype), x.type)

        return apply

    @pytest.fixture(autouse=True)
    def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused, "libdevice", SimpleNamespace(exp=elementwise(np.exp), log1p=elementwise(np.log1p)))
        monkeypatch.setattr(fused, "GREEDY_IDS", 128)
        monkeypatch.setattr(fused, "IDS_PER_PROGRAM", 256)
        monkeypatch.setattr(fused, "MAX_TOP_K", 64)

    def both_ways(
        cases: list[Case],
        num_ids: int,
        monkeypatch: pytest.MonkeyPatch,
        *,
        ok: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> list[int]:
        """Sampled ids of the fused and the plain sampler, whose marks agree."""
        found = []
        for is_fused in (True, False):
            monkeypatch.setattr(sampler, "samples_fused", lambda _, answer=is_fused: answer)
            vocab = len(cases[0].logits)
            rows = SamplingRows(len(cases) + 1, vocab, num_ids=num_ids, device=CPU)
            order = list(range(len(cases), 0, -1))
            rows.start_many([case.start(row) for case, row in zip(cases, order, strict=True)])
            if allowed is not None:
                rows.write_masks(order[: len(allowed)], pack_bits(allowed).view(torch.int32))
            logits = torch.tensor([case.logits for case in cases])
            row_R, position_R = torch.tensor(order), torch.tensor([len(case.ids) for case in cases])
            flags = rows.flags(order)
            ids_R = sample(rows, logits, row_R=row_R, position_R=position_R, flags=flags, ok_R=ok).ids_R
            found.append((ids_R, rows.last_ids_R[:-1], rows.positions_R[:-1], rows.seen_RB[:-1]))
        for got, expected in zip(*found, strict=True):
            assert got.equal(expected)
        return found[0][0].tolist()

    def random_case(seed: int, way: int, size: int, step: float = 1 / 8) -> Case:
        """Logits are rounded to multiples of `step`, so that many are equal."""
        random = torch.Generator().manual_seed(seed)
        logits = (torch.randn(size, generator=random) * 3 / step).round() * step
        ids = torch.randint(0, size, (30,), generator=random).tolist()
        return Case(logits=logits.tolist(), params=WAYS[way], seed=seed, ids=ids, num_prompt=10)

    def test_ids_and_marks_are_those_of_the_plain_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
        both_ways([random_case(way, way, 1056) for way in range(4)], 1040, monkeypatch)

    @pytest.mark.parametrize("ways", [(0, 1, 2), (3, 3, 3)], ids=["random", "greedy"])
    def test_masks_are_those_of_the_plain_sampler(ways: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        """The last row has none; the second one allows a single id, as where a grammar forces it."""
        cases = [random_case(seed, way, 544) for seed, way in enumerate(ways)]
        allowed = torch.rand(2, 544, generator=torch.Generator().manual_seed(5)) < 0.1
        allowed[0, 543] = True
        allowed[1] = torch.arange(544) == 32
        ids = both_ways(cases, 544, monkeypatch, allowed=allowed)
        assert ids[1] == 32
        assert allowed[0, ids[0]]

    def test_a_row_whose_mask_allows_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
        cases = [random_case(seed, 3, 352) for seed in range(2)]
        ids = both_ways(cases, 340, monkeypatch, allowed=torch.zeros(1, 352, dtype=torch.bool))
        assert ids[0] == -1
        assert ids[1] >= 0

    def test_groups_of_more_than_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused, "MAX_GROUPS", 64)
        both_ways([random_case(9, 0, 4096)], 4096, monkeypatch)

    def test_greedy_takes_the_lowest_of_equal_ids(monkeypatch: pytest.MonkeyPatch) -> None:
        cases = [random_case(seed, 3, 416, step=4.0) for seed in range(5)]
        ids = both_ways(cases, 400, monkeypatch)
        assert ids == [int(torch.tensor(case.logits[:400]).argmax()) for case in cases]

    @pytest.mark.parametrize("way", [0, 3])
    def test_rows_that_fail_get_no_id_and_no_mark(way: int, monkeypatch: pytest.MonkeyPatch) -> None:
        cases = [random_case(seed, way, 352) for seed in range(3)]
        cases[0].logits[7] = float("nan")
        cases[1].logits[351] = float("nan")  # of a masked id: harmless
        ids = both_ways(cases, 340, monkeypatch, ok=torch.tensor([True, True, False]))
        assert ids == [-1, ids[1], -1]
        assert ids[1] >= 0

    @pytest.mark.parametrize("logit", [float("inf"), float("-inf")])
    def test_rows_without_a_finite_largest_logit_fail(logit: float, monkeypatch: pytest.MonkeyPatch) -> None:
        case = random_case(0, 3, 352)
        case.logits[:] = [logit] * 352
        assert both_ways([case], 352, monkeypatch) == [-1]
