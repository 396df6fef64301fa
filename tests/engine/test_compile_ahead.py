"""Processes that compile kernels beside the engine's start: whatever they do, it costs nothing but time."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from lfm.config import EnginePlan
from lfm.engine import compile_ahead
from lfm.engine.compile_ahead import CompileAhead, is_sealed, job_for, seal_of
from lfm.engine.compile_worker import Job, Kernel
from lfm.model.presets import PRESETS
from tests.engine_process.test_supervisor import is_alive
from tests.waiting import wait_until

pytest.importorskip("triton")
PLAN = EnginePlan(
    device="cuda:0", dtype="bfloat16", max_model_len=256, max_running=2, step_tokens=64, step_tokens_decoding=64,
    block_size=64, num_blocks=None, memory_fraction=0.9, max_queue=0, plain_loop=False, prefix_caching=True, seed=0,
)  # fmt: skip
JOB = Job(config=PRESETS["tiny"], plan=PLAN, capability=90, tables="{}")
KEYS = ["0a" * 32, "0b" * 32]


def lines_of(*kernels: tuple[str, str], num_kernels: int = 2) -> list[dict[str, object]]:
    told: list[dict[str, object]] = [{"type": "listed", "num_kernels": num_kernels}]
    return told + [{"type": "kernel", "name": "k", "key": key, "error": error} for key, error in kernels]


def script(lines: list[dict[str, object]], then: str = "") -> tuple[str, ...]:
    """A worker that tells these lines and then runs some code."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return (sys.executable, "-c", f"import sys, os\nsys.stdout.write({text!r})\nsys.stdout.flush()\n{then}")


def put(cache: Path, key: str, name: str = "k") -> Path:
    """What Triton leaves of a compiled kernel."""
    from triton.runtime.cache import get_cache_manager

    manager = get_cache_manager(key)
    manager.put_group(f"{name}.json", {f"{name}.json": manager.put("{}", f"{name}.json", binary=False)})
    return next(cache.glob(f"*/{name}.json"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    return tmp_path


def run(command: tuple[str, ...], *, num_workers: int = 1, stall_s: float = 20.0) -> list[str]:
    """Phases that were told."""
    phases: list[str] = []
    with CompileAhead(JOB, command=command, num_workers=num_workers) as ahead:
        ahead.wait(phases.append, stall_s=stall_s)
        pids = ahead.pids
    assert not any(map(is_alive, pids))
    return phases


def test_progress_is_told_and_the_next_start_has_nothing_to_do(cache: Path) -> None:
    for key in KEYS:
        put(cache, key)
    phases = run(script(lines_of((KEYS[0], ""), (KEYS[1], ""), (KEYS[0], ""))))
    assert phases[0].startswith("compiling kernels: ")
    assert phases[-1].startswith("kernels are compiled, 2 of 2, after ")
    assert is_sealed(seal_of(JOB))
    with CompileAhead(JOB, command=("/no/such/program",)) as again:
        again.wait(phases.append)
        assert again.pids == []


def test_a_kernel_that_left_the_cache_is_compiled_again(cache: Path) -> None:
    paths = [put(cache, key) for key in KEYS]
    command = script(lines_of((KEYS[0], ""), (KEYS[1], "")))
    run(command)
    paths[0].unlink()
    assert not is_sealed(seal_of(JOB))
    with CompileAhead(JOB, command=command, num_workers=1) as ahead:
        assert len(ahead.pids) == 1


def test_a_worker_that_hangs_is_given_up_and_ended(caplog: pytest.LogCaptureFixture) -> None:
    phases = run(script(lines_of((KEYS[0], "")), "import threading; threading.Event().wait()"), stall_s=0.3)
    assert phases[-1].startswith("kernels are compiled, 1 of 2, after")
    assert "given up after 0.3 silent seconds" in caplog.text
    assert not seal_of(JOB).exists()


@pytest.mark.parametrize("then", ["os.abort()", "sys.exit(3)", "raise OSError"], ids=["crash", "exit", "raise"])
def test_a_worker_that_ends_early_is_not_waited_for(then: str) -> None:
    assert run(script(lines_of((KEYS[0], "")), then))[-1].startswith("kernels are compiled, 1 of 2, after")
    assert not seal_of(JOB).exists()


def test_a_kernel_that_does_not_compile_is_named_and_left_to_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    run(script(lines_of((KEYS[0], ""), (KEYS[1], "RuntimeError: too few registers"), (KEYS[1], "again"))))
    (record,) = caplog.records
    assert record.getMessage() == ("not compiled ahead, so that the engine has to: k: RuntimeError: too few registers")
    assert not seal_of(JOB).exists()


@pytest.mark.parametrize(
    "text", ["", "no JSON\n", '{"type": "kernel"}\n', '{"type": "other"}\n[]\n\n', "\xff" * 5000],
    ids=["nothing", "text", "fields", "kinds", "bytes"],
)  # fmt: skip
def test_whatever_a_worker_writes_does_no_harm(text: str) -> None:
    assert run((sys.executable, "-c", f"import sys; sys.stdout.write({text!r})")) == []


def test_a_program_that_cannot_be_started_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    assert run(("/no/such/program",), num_workers=3) == []
    assert "compiling in 0 of 3 processes" in caplog.text


def test_workers_end_with_the_block_even_if_nothing_waited() -> None:
    with CompileAhead(JOB, command=script([], "import signal; signal.pause()")) as it:
        pids = it.pids
        assert len(pids) == len(os.sched_getaffinity(0))
    assert not any(map(is_alive, pids))


def test_a_seal_is_of_one_model_plan_gpu_and_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    others = [
        msgspec.structs.replace(JOB, capability=80),
        msgspec.structs.replace(JOB, tables="[]"),
        msgspec.structs.replace(JOB, config=PRESETS["lfm2-24b-a2b"]),
        msgspec.structs.replace(JOB, plan=replace(PLAN, quantize="fp8")),
    ]
    seals = {seal_of(job) for job in [JOB, *others]}
    monkeypatch.setattr(compile_ahead, "CODE", ("engine",))
    seals.add(seal_of(JOB))
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "0")
    seals.add(seal_of(JOB))
    assert len(seals) == 7
    assert {seal.parent for seal in seals} == {tmp_path}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'[{"type": "kernel", "name": "k", "key": "0a"}]', b'[{"type":"kernel","name":"k","key":"x"}]'],
    ids=["empty", "cut off", "numbers", "gone", "no key"],
)
def test_a_seal_that_says_nothing_true_is_none(content: bytes) -> None:
    seal_of(JOB).write_bytes(content)
    assert not is_sealed(seal_of(JOB))


def test_a_cache_that_cannot_be_written_to_is_left_alone(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        compile_ahead.set_seal(cache / "nowhere" / "seal.json", [Kernel("k", KEYS[0])])
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"device": "cpu"}, {"dtype": "float32"}, {"plain_loop": True}], ids=["cpu", "dtype", "plain"]
)
def test_where_no_kernel_of_ours_runs_nothing_is_compiled(changes: dict[str, object]) -> None:
    assert job_for(PRESETS["tiny"], replace(PLAN, **changes)) is None  # type: ignore[arg-type]


PARENT = """
import signal, sys
from lfm.engine.compile_ahead import CompileAhead
from tests.engine.test_compile_ahead import JOB
ahead = CompileAhead(JOB, num_workers=2)
print(*ahead.pids, flush=True)
signal.pause()
"""


@pytest.mark.slow
def test_workers_end_with_their_parent_however_it_ends() -> None:
    """The real ones, killed with their parent while they still import what they need, or compile."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as told:
        pids = [int(pid) for pid in told.readline().split()]
    assert len(pids) == 2
    assert all(map(is_alive, pids))
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(is_alive, pids)), what="the end of the workers")
