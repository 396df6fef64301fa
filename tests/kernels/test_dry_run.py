"""Which kernels ops would take on a GPU, and under which keys a launch there will look for them."""

import ast
from pathlib import Path

import pytest
import torch

from lfm.kernels.dry_run import Wanted, answers_of, collect_only, compile_only, is_cached
from lfm.kernels.norm import rms_norm
from lfm.kernels.tuned import FOLDER, Tuned, read_tables
from lfm.kernels.weights import Norm
from tests.kernels.interpreted import IS_INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")
META = torch.device("meta")
LARGE, SMALL = read_tables(FOLDER / "default_large.json"), read_tables(FOLDER / "default_small.json")


def run_norm(*, offset: int = 0, hidden: int = 64) -> None:
    x = torch.empty(3 * hidden + offset, dtype=torch.bfloat16, device=META)[offset:].view(3, hidden)
    rms_norm(x, Norm(torch.empty(hidden, dtype=torch.bfloat16, device=META), 1e-5))


def collected(tables: Tuned = LARGE, capability: int = 90, *, offset: int = 0, hidden: int = 64) -> dict[str, Wanted]:
    with collect_only(capability, tables) as wanted:
        run_norm(offset=offset, hidden=hidden)
    return wanted


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of compiled kernels without any."""
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    return tmp_path


def test_what_a_dry_run_names_is_what_a_launch_leaves_in_the_cache(cache: Path) -> None:
    """Triton itself compiles on the second path, from the same arguments."""
    (wanted,) = collected(SMALL, 80).values()
    assert not wanted.is_cached
    with compile_only(80) as compiled:
        run_norm()
    (kernel,) = compiled["rms_norm_kernel"]
    assert kernel.hash == wanted.key
    assert wanted.is_cached


def test_what_is_compiled_from_a_dry_run_is_not_compiled_again(cache: Path) -> None:
    (wanted,) = collected(SMALL, 80).values()
    wanted.compile()
    assert wanted.is_cached
    files = sorted(cache.rglob("*"))
    with compile_only(80):
        run_norm()
    assert sorted(cache.rglob("*")) == files


def test_a_kernel_whose_files_are_gone_is_not_cached(cache: Path) -> None:
    (wanted,) = collected(SMALL, 80).values()
    wanted.compile()
    for path in cache.rglob("rms_norm_kernel.json"):
        path.unlink()
    assert not is_cached("rms_norm_kernel", wanted.key)


def test_a_dry_run_asks_for_a_kernel_once_and_for_nothing_twice_over() -> None:
    with collect_only(90, LARGE) as wanted:
        run_norm()
        run_norm()
        assert len(wanted) == 1
    assert collected().keys() == wanted.keys(), "nothing of the first dry run may count as compiled"


@pytest.mark.parametrize("change", ["alignment", "shape", "gpu"])
def test_what_a_kernel_is_compiled_for_is_in_its_key(change: str) -> None:
    others = {
        "alignment": lambda: collected(offset=1),
        "shape": lambda: collected(hidden=128),
        "gpu": lambda: collected(capability=89),
    }
    assert collected().keys().isdisjoint(others[change]())


def test_ops_and_triton_are_as_before_after_a_dry_run() -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from lfm.kernels import moe_prefill, norm

    before = JITFunction.run, JITFunction._do_compile, driver._active, norm.runs_triton, moe_prefill.has_prefill_kernels
    with pytest.raises(KeyError), collect_only(90, LARGE):
        raise KeyError
    assert before == (
        JITFunction.run,
        JITFunction._do_compile,
        driver._active,
        norm.runs_triton,
        moe_prefill.has_prefill_kernels,
    )


def test_every_question_that_ops_ask_of_a_gpu_is_answered() -> None:
    """One that is not is answered for a tensor without storage, and a dry run would take other kernels than a GPU."""
    elsewhere = {"_tables_of"}  # of tiles: given to the dry run
    asking = set()
    for path in FOLDER.parent.glob("*.py"):
        if path.stem not in ("dry_run", "tune", "tune_calls", "tune_compile"):
            functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            asking |= {function.name for function in functions if "torch.cuda." in ast.unparse(function)}
    assert "has_dependent_launch" in asking
    assert asking - elsewhere <= answers_of(90).keys()
