"""Several processes, as torchrun starts them, against one: the same training, the same files."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm.cli.app import run
from lfm.errors import MachineError, UsageError
from lfm.train import world
from lfm.train.checkpoint import checkpoint_folders
from lfm.train.metrics import StepMetrics, read_metrics
from lfm.train.recipe import TrainRecipe, parse_recipe
from lfm.train.session import train
from lfm.train.tensor_file import read_tensors
from tests.train.models import recipe_dict
from tests.train.test_cli import ROOT, write_toml
from tests.train.test_session import files_in, without_times

torch.set_num_threads(1)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lfm.cli"]


def small_recipe(tmp_path: Path, name: str, *, accumulation: int, device: str = "cpu") -> dict[str, Any]:
    """Five experts and an odd width: nothing divides evenly by two processes."""
    raw = recipe_dict(tmp_path, output=str(tmp_path / name), save_every_steps=3, device=device)
    raw["model"]["shape"] |= {"num_experts": 5, "intermediate_size": 45}
    raw["batch"]["accumulation"] = accumulation
    raw["data"]["validation_rows"] = 7
    raw["run"]["checkpoint_activations"] = device == "cpu"
    return raw | {"schedule": {"steps": 6, "warmup_steps": 2}}


def run_processes(recipe: Path) -> "subprocess.CompletedProcess[str]":
    command = [*TORCHRUN, "train", "pretrain", str(recipe)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def losses_in(folder: Path) -> list[StepMetrics]:
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "tolerance"),
    [
        ("cpu", 1e-4),
        pytest.param(
            "cuda",
            0.03,  # bf16, and sums in another order
            marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by the compiler, which asks for it
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_two_processes_do_the_steps_of_one_and_resume_bit_for_bit(
    tmp_path: Path, device: str, tolerance: float
) -> None:
    alone = train(
        parse_recipe(small_recipe(tmp_path, "alone", accumulation=2, device=device), TrainRecipe, origin="recipe.toml"),
        "pretrain",
        on_progress=lambda line: None,
    )
    raw = small_recipe(tmp_path, "two", accumulation=1, device=device)
    recipe = write_toml(tmp_path / "recipe.toml", raw)
    done = run_processes(recipe)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished after 6 steps") == 1
    for mine, theirs in zip(losses_in(tmp_path / "two"), losses_in(tmp_path / "alone"), strict=True):
        assert (mine.tokens, mine.targets, mine.epoch) == (theirs.tokens, theirs.targets, theirs.epoch)
        is_validated = mine.step in (2, 5)
        assert (mine.validation_loss is not None) == is_validated
        for name in ("loss", "router_z_loss", "grad_norm", "balance", *["validation_loss"] * is_validated):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=tolerance), name
    assert (tmp_path / "two" / "metrics.svg").read_text().count("<circle") == 2
    folder = checkpoint_folders(tmp_path / "two")[-1]
    whole = read_tensors(alone.checkpoint / "training" / "state.safetensors", device=torch.device("cpu"))
    parts = read_tensors(folder / "training" / "state.safetensors", device=torch.device("cpu"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items() if device == "cpu" else ():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-2, atol=2e-4, msg=name)

    expected, before = without_times(files_in(folder)), [m.loss for m in losses_in(tmp_path / "two")]
    shutil.rmtree(folder)
    assert checkpoint_folders(tmp_path / "two")[-1].name == "step-00000003"
    done = run_processes(recipe)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 3" in done.stderr
    again = without_times(files_in(folder))
    assert [name for name in expected if again[name] != expected[name]] == []
    assert [m.loss for m in losses_in(tmp_path / "two")] == before

    with pytest.raises(UsageError, match=r"processes was 2, is 1"):
        train(parse_recipe(raw, TrainRecipe, origin="recipe.toml"), "pretrain", on_progress=lambda line: None)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set. Start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_half_an_environment_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = parse_recipe(recipe_dict(tmp_path), TrainRecipe, origin="recipe.toml")
    with pytest.raises(UsageError, match=message):
        train(recipe, "pretrain", on_progress=lambda line: None)


def test_a_lost_connection_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of one process over gloo, whose body meets what gloo raises when a process is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(world, "_is_alone", lambda: False)
    with pytest.raises(MachineError, match="connection to another process"), world.joined(torch.device("cpu")):
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    with pytest.raises(RuntimeError, match="another thing"), world.joined(torch.device("cpu")):
        raise RuntimeError("another thing")


@pytest.mark.parametrize("command", ["tokenizer", "builtin"])
def test_what_is_one_process_refuses_to_be_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["train", command, *(["recipe.toml"] * (command == "tokenizer"))]) == 2
    assert f"lfm train {command} is one process" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_that_all_processes_have_is_told_by_the_first(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.World, "any", lambda self, flag: flag or self.size > 1)  # the other one: the same error
    expected, message = (UsageError, "here") if rank == 0 else (world.PeerError, "Another process")
    with pytest.raises(expected, match=message), world.World(rank=rank, size=2).agreed():
        raise UsageError("here")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_recipe_that_is_wrong_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    assert run(["train", "pretrain", str(tmp_path / "none.toml")]) == 2
    assert ("There is no recipe" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_all_of_them_with_its_message(tmp_path: Path) -> None:
    raw = small_recipe(tmp_path, "run", accumulation=1)
    path = Path(raw["data"]["files"][0])
    path.write_text(path.read_text()[:-20])  # only the first process reads it
    done = run_processes(write_toml(tmp_path / "recipe.toml", raw))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "is not JSON" in errors[0]
