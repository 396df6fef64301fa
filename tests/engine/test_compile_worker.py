"""The list of kernels that an engine's steps take: made by a dry run, complete, and the same as for real tensors."""

import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from lfm.config import EnginePlan
from lfm.engine import compile_worker
from lfm.engine.compile_worker import Broken, Job, Kernel, Line, Listed, kernels_of, one_layer_of_each_kind
from lfm.engine.make_runner import make_runner
from lfm.engine.step import ScheduledBatch, ScheduledRow
from lfm.engine.warm_up import _scratch_sequence, run_every_step
from lfm.kernels.dry_run import Wanted, collect_only
from lfm.kernels.tuned import FOLDER, from_text
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import FAST
from lfm.model.pack import pack
from lfm.model.presets import PRESETS
from lfm.model.quantise import quantise
from tests.kernels.interpreted import IS_INTERPRETED

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing"),
]
TABLES = (FOLDER / "nvidia_h200.json").read_text()


def plan_of(**changes: object) -> EnginePlan:
    plan = EnginePlan(
        device="cuda:0", dtype="bfloat16", max_model_len=4096, max_running=100, step_tokens=1024,
        step_tokens_decoding=512, block_size=128, num_blocks=None, memory_fraction=0.9, max_queue=0, plain_loop=False,
        prefix_caching=True, seed=0,
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


def job_of(preset: str = "lfm2-24b-a2b", *, capability: int = 90, **changes: object) -> Job:
    return Job(config=PRESETS[preset], plan=plan_of(**changes), capability=capability, tables=TABLES)


def random_steps(plan: EnginePlan, *, seed: int, count: int) -> Iterator[ScheduledBatch]:
    """Steps of any size: some rows that decode, some chunks, some behind a prefix."""
    chance = random.Random(seed)
    for _ in range(count):
        num_decoding = min(chance.choice([0, 1, 2, 3, 5, 9, 17, 33, 65, 98]), max(0, plan.max_running - 2))
        left = chance.randint(2, plan.step_tokens - num_decoding)
        lengths, starts = [chance.randint(2, 900) for _ in range(num_decoding)], []
        starts = [length - 1 for length in lengths]
        for size in (
            [left] if left < 40 or plan.max_running < 3 or chance.random() < 0.5 else [left // 3, left - left // 3]
        ):
            starts.append(chance.choice([0, 1, 128, 333]))
            lengths.append(starts[-1] + size)
        sequences = [_scratch_sequence(plan, row=row, num_tokens=length) for row, length in enumerate(lengths)]
        rows = [ScheduledRow(s, start, len(s.ids), True) for s, start in zip(sequences, starts, strict=True)]
        yield ScheduledBatch(rows=rows, started=sequences, num_single=num_decoding)


def collected(job: Job, *, device: str, seed: int | None = None) -> dict[str, Wanted]:
    """What the listed steps take (or 60 random ones), on a device: on "cpu" with real tensors."""
    plan = replace(job.plan, device=device)
    with torch.device(device):
        model = Lfm2(one_layer_of_each_kind(job.config)).to(torch.bfloat16).requires_grad_(False)
    if plan.quantize == "fp8":
        quantise(model)
    with collect_only(job.capability, from_text(job.tables)) as wanted, torch.inference_mode():
        runner = make_runner(pack(model), plan, num_ids=64, ops=FAST)
        runner.enable_graphs()
        if seed is None:
            run_every_step(runner, plan)
        else:
            for batch in random_steps(plan, seed=seed, count=60):
                runner.sample(runner.forward(batch))
    return wanted


@pytest.mark.parametrize(
    "job",
    [job_of(), job_of("tiny", capability=89, quantize="fp8", kv_dtype="fp8"), job_of("tiny", max_running=1)],
    ids=["24b", "fp8", "one row"],
)
def test_steps_of_any_size_take_nothing_that_is_not_listed(job: Job) -> None:
    kernels, problem = kernels_of(job)
    assert problem == ""
    assert collected(job, device="meta", seed=0).keys() <= {kernel.key for kernel in kernels}


def test_tensors_without_storage_ask_for_the_same_kernels_as_real_ones() -> None:
    """Real ones have addresses and strides from torch's allocator. Nothing is launched on them.

    Options are left out: a few that only GPUs have are left alone on a CPU.
    """
    job = job_of("tiny", max_running=9, step_tokens=64, max_model_len=256)
    on_cpu, on_meta = (
        {f"{k.name} {k.source.signature} {k.source.constants} {k.source.attrs}" for k in wanted.values()}
        for wanted in (collected(job, device="cpu"), collected(job, device="meta"))
    )
    assert on_cpu
    assert on_cpu == on_meta


def test_the_list_is_the_same_in_every_process_and_order() -> None:
    job = job_of("tiny", max_running=3, step_tokens=64)
    again = msgspec.json.decode(msgspec.json.encode(job), type=Job)
    assert [kernel.key for kernel in kernels_of(job)[0]] == [kernel.key for kernel in kernels_of(again)[0]]


def test_large_prefills_of_the_24b_take_hoppers_kernels_on_hopper_alone() -> None:
    names = {capability: {k.name for k in kernels_of(job_of(capability=capability, max_running=2))[0]}
             for capability in (80, 90, 100)}  # fmt: skip
    assert {capability for capability, found in names.items() if "grouped_product_kernel" in found} == {90}
    assert {capability for capability, found in names.items() if "up_prefill_kernel" in found} == {100}


def test_one_layer_of_each_kind_is_kept() -> None:
    config = one_layer_of_each_kind(PRESETS["lfm2-24b-a2b"])
    assert config.layer_types == ("conv", "conv", "full_attention")
    assert [config.is_moe_layer(i) for i in range(3)] == [False, True, True]


def run_worker(
    monkeypatch: pytest.MonkeyPatch, path: Path, kernels: list["FakeKernel"], *, taken: Sequence[str] = ()
) -> list[Line]:
    """What a worker tells. `taken`: keys that others have in their hands, "" for the list itself."""

    def kernels_of(job: Job, on_kernel: Callable[[FakeKernel], None] = lambda kernel: None) -> object:
        for kernel in kernels:
            on_kernel(kernel)
        return kernels, "half of it"

    others = {1 + int(key[:12], 16) if key else 0 for key in taken}
    take = compile_worker._take
    monkeypatch.setattr(compile_worker, "kernels_of", kernels_of)
    monkeypatch.setattr(compile_worker, "compile_launch_tools", lambda: None)
    monkeypatch.setattr(compile_worker, "compile_launcher", lambda kernel: None)
    monkeypatch.setattr(compile_worker, "_take", lambda fd, index: index not in others and take(fd, index))
    output = io.StringIO()
    with (path / "locks").open("w+b") as locks:
        compile_worker.work(msgspec.structs.replace(job_of(), lock_fd=locks.fileno()), output)
    return [msgspec.json.decode(line, type=Line) for line in output.getvalue().splitlines()]


class FakeKernel:
    def __init__(self, name: str, *, is_cached: bool = False, error: str = "") -> None:
        self.name, self.key, self.is_cached, self._error = name, name.encode().hex() * 32, is_cached, error
        self.source = self
        self.num_compiled = 0

    def compile(self) -> None:
        self.num_compiled += 1
        if self._error:
            raise RuntimeError(self._error)
        self.is_cached = True


@pytest.mark.parametrize("is_lister", [True, False], ids=["lists", "helps"])
def test_a_worker_compiles_once_what_is_missing_and_tells_of_what_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_lister: bool
) -> None:
    kernels = [FakeKernel("a", is_cached=True), FakeKernel("b", error="no\n registers" * 500), FakeKernel("c")]
    lines = run_worker(monkeypatch, tmp_path, kernels, taken=[] if is_lister else [""])
    if is_lister:
        assert lines[:2] == [Listed(3), Broken("half of it")]
        lines = lines[2:]
    assert lines[0] == Kernel("a", kernels[0].key)
    assert isinstance(lines[1], Kernel)
    assert lines[1].error.startswith("RuntimeError: no registersno registers")
    assert len(lines[1].error) <= 500
    assert lines[2:] == [Kernel("c", kernels[2].key)]
    assert [kernel.num_compiled for kernel in kernels] == [0, 1, 1]


def test_what_another_worker_has_in_its_hands_is_left_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels = [FakeKernel("a"), FakeKernel("b")]
    lines = run_worker(monkeypatch, tmp_path, kernels, taken=["", kernels[0].key])
    assert lines == [Kernel("b", kernels[1].key)]
    assert kernels[0].num_compiled == 0


def test_kernels_are_compiled_on_the_way_through_the_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Real compiling inside of a real dry run, stopped after two kernels, leaves what a launch looks for."""
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    compiled: list[Wanted] = []

    def compile_two(kernel: Wanted) -> None:
        if len(compiled) < 2:
            kernel.compile()
            compiled.append(kernel)

    kernels, problem = kernels_of(job_of("tiny", max_running=2, step_tokens=64), on_kernel=compile_two)
    assert problem == ""
    assert [kernel.key for kernel in compiled] == [kernel.key for kernel in kernels[:2]]
    assert [kernel.is_cached for kernel in kernels] == [True, True] + [False] * (len(kernels) - 2)
