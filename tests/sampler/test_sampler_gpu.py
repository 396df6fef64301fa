"""The sampler on a CUDA device: the same ids as on a CPU, no wait for the device, and capture as a graph."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lfm.engine import sampler
from lfm.engine.sampler import sample, token_logprobs
from lfm.engine.sampling_rows import RowStart, SamplingRows
from lfm.kernels.penalties import pack_bits
from lfm.kernels.random_bits import random_bits, uniform
from lfm.kernels.top_k import top_k, top_k_ref
from lfm.protocol import SamplingParams
from tests.sampler.batch import ids_of, params
from tests.sampler.test_sampler import WAYS, naive_of, random_case

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@contextmanager
def waits_forbidden() -> Iterator[None]:
    """Inside, whatever waits for the device raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_uniforms_are_the_same_bits_on_both_devices() -> None:
    seeds = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    positions, ids = torch.arange(64) * 1999, torch.arange(65_536)
    on_cpu = random_bits(seeds, positions, ids)
    on_gpu = random_bits(seeds.to(CUDA), positions.to(CUDA), ids.to(CUDA))
    assert on_gpu.cpu().equal(on_cpu)
    for dtype in (torch.float32, torch.float64):
        assert uniform(on_gpu, dtype).cpu().equal(uniform(on_cpu, dtype))


@pytest.mark.parametrize("k", [20, 64, 256, 1024])
def test_top_k_settles_ties_by_id(k: int) -> None:
    x = torch.randn(9, 65_536, generator=torch.Generator().manual_seed(k)).bfloat16().float()
    values, ids = top_k(x.to(CUDA), k)
    expected_values, expected_ids = top_k_ref(x, k)
    assert values.cpu().equal(expected_values)
    assert ids.cpu().equal(expected_ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ids_equal_those_of_the_naive_loop_unless_a_decision_is_close(dtype: torch.dtype) -> None:
    cases = [random_case(number, number) for number in range(64)]
    logits = [torch.tensor(case.logits, dtype=dtype).tolist() for case in cases]
    expected = [naive_of(case, 2900, rounded) for case, rounded in zip(cases, logits, strict=True)]
    found = ids_of(cases, num_ids=2900, dtype=dtype, device=CUDA)
    clear = [i for i, naive in enumerate(expected) if naive.margin > (1e-5 if dtype == torch.float32 else 1e-10)]
    assert len(clear) > 50
    assert [found[i] for i in clear] == [expected[i].id for i in clear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    cases = [random_case(number, number) for number in range(48)]
    together = ids_of(cases, dtype=dtype, device=CUDA)
    alone = [ids_of([case], dtype=dtype, device=CUDA)[0] for case in cases]
    assert alone == together
    assert ids_of(cases[::-1], dtype=dtype, num_padding=5, device=CUDA)[::-1] == together


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_neither_a_start_nor_a_sample_waits_for_the_device(way: int) -> None:
    rows = SamplingRows(4, 65_536, num_ids=64_400, device=CUDA)
    logits = torch.zeros(2, 65_536, device=CUDA)
    row_R = torch.arange(0, 4, 2, device=CUDA)
    with waits_forbidden():
        for row in (0, 2):
            rows.start(RowStart(row=row, params=WAYS[way], seed=row, ids=[1, 2, 3], num_prompt=2))
        flags = rows.flags([0, 2])._replace(num_logprobs=5, mask=True)
        masks = torch.full((2, 2048), -1, dtype=torch.int32, pin_memory=True)
        for _ in range(2):
            rows.write_masks([0, 2], masks)
            rows.mark([(0, [4, 5, 6]), (2, [4])])
            output = sample(rows, logits, row_R=row_R, position_R=row_R, flags=flags)
        token_logprobs(logits, output.ids_R, num_top=5, num_ids=64_400)
    with waits_forbidden(), pytest.raises(RuntimeError, match="synchronizing"):
        output.ids_R.tolist()


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("way", [0, 1, 2, 3, 4])
def test_a_captured_sample_repeats_with_new_logits_and_new_rows(way: int, is_masked: bool) -> None:
    """The static case of a decode graph: same buffers, other contents."""
    rows = SamplingRows(8, 5024, num_ids=5000, device=CUDA)
    starts = [RowStart(row=row, params=WAYS[way], seed=row, ids=[row, 2], num_prompt=1) for row in range(8)]
    rows.start_many(starts)
    random = torch.Generator(CUDA).manual_seed(0)
    static = torch.zeros(4, 5024, device=CUDA)
    masks = torch.randint(-(2**31), 2**31, (2, 8, 157), device=CUDA, generator=random).to("cpu", torch.int32)
    if is_masked:
        rows.write_masks(range(8), masks[0])
    row_R, position_R = torch.arange(4, device=CUDA), torch.full((4,), 2, device=CUDA)
    flags = rows.flags(range(8))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample(rows, static, row_R=row_R, position_R=position_R, flags=flags)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(rows, static, row_R=row_R, position_R=position_R, flags=flags)
    for turn, first_row in enumerate((0, 4)):
        rows.start_many(starts)
        if is_masked:
            rows.write_masks(range(8), masks[turn])
        static.copy_(torch.randn(4, 5024, device=CUDA, generator=random))
        row_R.copy_(torch.arange(first_row, first_row + 4))
        graph.replay()
        found, seen = captured.ids_R.clone(), rows.seen_RB.clone()
        rows.start_many(starts)
        if is_masked:
            rows.write_masks(range(8), masks[turn])
        expected = sample(rows, static, row_R=row_R, position_R=position_R, flags=flags).ids_R
        assert found.equal(expected)
        assert seen[:8].equal(rows.seen_RB[:8])


FUSED_WAYS = [
    params(temperature=0.1, top_k=50, repetition_penalty=1.05),
    params(temperature=1.0, top_k=64, top_p=0.8, repetition_penalty=1.3),
    params(temperature=0.7, top_k=20, min_p=0.05),
    params(temperature=0.0),
    params(temperature=0.0, repetition_penalty=1.1),
]


@pytest.mark.parametrize(
    "ways", [FUSED_WAYS[:1], FUSED_WAYS[1:3], FUSED_WAYS[3:4], FUSED_WAYS[3:], FUSED_WAYS], ids=str
)
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 65_536), (257, 65_536), (33, 128_000), (5, 4992)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_the_fused_sampler_is_the_plain_one_bit_for_bit(
    ways: list[SamplingParams], num_rows: int, vocab: int, is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 logits hold many equal values; some rows fail, some ids are masked, one row is not ok.

    Masks are of every other row: one in eight of all ids, or a single one.
    """
    random = torch.Generator().manual_seed(num_rows)
    ids = torch.randint(0, vocab, (num_rows, 300), generator=random).tolist()
    starts = [
        RowStart(row=row, params=ways[row % len(ways)], seed=row * 7919, ids=ids[row], num_prompt=9)
        for row in range(num_rows)
    ]
    logits = (torch.randn(num_rows, vocab, generator=random) * 3).bfloat16().to(CUDA)
    allowed = torch.rand(num_rows, vocab, generator=random) < 1 / 8
    allowed[::4] = torch.arange(vocab) == vocab // 2
    masks = pack_bits(allowed).view(torch.int32)
    logits[-1, 5], logits[num_rows // 2, vocab - 1] = torch.nan, torch.inf
    ok_R = torch.arange(num_rows, device=CUDA) != 2
    row_R = torch.randperm(num_rows, generator=random).to(CUDA)
    found = []
    for is_fused in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(sampler, "samples_fused", lambda _, answer=is_fused: answer)
            rows = SamplingRows(num_rows, vocab, num_ids=vocab - 100, device=CUDA)
            rows.start_many(starts)
            if is_masked:
                rows.write_masks(range(0, num_rows, 2), masks[::2].contiguous())
            for step in range(3):
                position_R = torch.full_like(row_R, 300 + step)
                flags = rows.flags(range(num_rows))
                ids_R = sample(rows, logits, row_R=row_R, position_R=position_R, flags=flags, ok_R=ok_R).ids_R
                found.append((ids_R, rows.seen_RB[:-1].clone(), rows.last_ids_R[:-1].clone(), rows.positions_R[:-1]))
    for got, expected in zip(found[:3], found[3:], strict=True):
        assert all(map(torch.equal, got, expected))
