"""What can go wrong with a run, through the command: one clear line, and nothing lost beyond the last checkpoint."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm.cli.app import run
from lfm.train import checkpoint, dataset, learner, metrics
from lfm.train.checkpoint import checkpoint_folders
from lfm.train.metrics import StepMetrics, read_metrics
from tests.train.models import recipe_dict
from tests.train.test_cli import write_toml

torch.set_num_threads(1)


class Command:
    """`lfm train pretrain` of one recipe, and what is left of it."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._path, self._capsys = tmp_path / "recipe.toml", capsys
        self.raw = recipe_dict(tmp_path, save_every_steps=2) | {"schedule": {"steps": 4}}
        self.output = tmp_path / "run"

    def __call__(self, *flags: str) -> int:
        return run(["train", "pretrain", str(write_toml(self._path, self.raw)), *flags])

    def error(self) -> str:
        (line,) = [line for line in self._capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "a bug in lfm" not in line
        return line

    def steps(self) -> list[int]:
        return [int(folder.name.removeprefix("step-")) for folder in checkpoint_folders(self.output)]

    def weights(self) -> bytes:
        return (checkpoint_folders(self.output)[-1] / "model.safetensors").read_bytes()


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


@pytest.fixture
def stopped(command: Command) -> Command:
    """A run with a checkpoint of its first step."""
    assert command("--minutes", "0.0000001") == 0
    assert command.steps() == [1]
    return command


def no_space(*arguments: object, **settings: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_missing_data_file_is_named(command: Command, tmp_path: Path) -> None:
    command.raw["data"]["files"] = [str(tmp_path / "none.jsonl")]
    assert command() == 2
    assert f"{tmp_path / 'none.jsonl'} cannot be read: No such file or directory" in command.error()


def test_a_truncated_data_file_is_named_with_its_line(command: Command) -> None:
    path = Path(command.raw["data"]["files"][0])
    path.write_text(path.read_text()[:-20])
    assert command() == 2
    assert f"{path}:60 is not JSON" in (line := command.error())
    assert "truncated" in line
    assert command.steps() == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "instead of"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["truncated", "missing"],
)
def test_prepared_data_that_was_damaged_is_told_and_can_be_made_again(
    stopped: Command, damage: Callable[[Path], object], message: str
) -> None:
    shard = stopped.output / "data" / "file-00000.tokens"
    damage(shard)
    assert stopped() == 2
    assert message in (line := stopped.error())
    assert "prepares the data again" in line
    for path in shard.parent.iterdir():
        path.unlink()
    shard.parent.rmdir()  # what the message advises
    assert stopped() == 0
    assert stopped.steps() == [2, 4]


def test_a_checkpoint_of_another_shape_is_refused_and_kept(stopped: Command) -> None:
    before = stopped.weights()
    stopped.raw["model"]["shape"]["hidden_size"] = 64
    assert stopped() == 2
    assert "hidden_size was 32, is 64" in (line := stopped.error())
    assert "name another run.output" in line
    assert stopped.weights() == before


@pytest.mark.parametrize("name", ["training/state.safetensors", "training/state.json"])
def test_a_checkpoint_that_was_cut_off_is_named_and_the_one_before_goes_on(command: Command, name: str) -> None:
    assert command() == 0
    whole = command.weights()
    newest = checkpoint_folders(command.output)[-1]
    (newest / name).write_bytes((newest / name).read_bytes()[:-30])
    assert command() == 2
    assert f"{newest} is damaged" in (line := command.error())
    assert "resumes from the one before" in line
    shutil.rmtree(newest)  # what the message advises
    assert command() == 0
    assert command.weights() == whole


def test_weights_to_start_from_that_have_another_shape_are_refused(stopped: Command, tmp_path: Path) -> None:
    """Files that disagree: config.json says other sizes than the tensors have."""
    folder = checkpoint_folders(stopped.output)[-1]
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    stopped.raw["model"] = {"start": str(folder)}
    stopped.raw["run"]["output"] = str(tmp_path / "next")
    assert stopped() == 2
    assert "shape" in stopped.error()


def test_a_loss_that_is_not_a_number_names_the_step_and_the_checkpoint(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = learner.chunked_cross_entropy, []

    def poisoned(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        loss = original(*arguments, **settings)
        is_third_step = len(calls) > 4  # two micro-batches a step
        return loss._replace(objective=loss.objective * float("nan")) if is_third_step else loss

    with monkeypatch.context() as patch:
        patch.setattr(learner, "chunked_cross_entropy", poisoned)
        assert command() == 2
    assert "Step 3 has loss" in (line := command.error())
    assert f"The last good checkpoint is {command.output}/checkpoints/step-00000002" in line
    assert [m.step for m in read_metrics(command.output / "metrics.jsonl")] == [0, 1]
    command.raw["optimizer"]["learning_rate"] = 0.001  # what the message advises
    assert command() == 0
    assert command.steps() == [2, 4]


@pytest.mark.parametrize(
    ("module", "name"),
    [(checkpoint, "write_tensors"), (checkpoint, "save_weights"), (checkpoint.os, "fsync")],
    ids=["state", "weights", "flush"],
)
def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_one_before(
    stopped: Command, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, name, no_space)
        assert stopped() == 3
    assert "The disk is full" in (line := stopped.error())
    assert "step-00000002" in line
    assert [path.name for path in (stopped.output / "checkpoints").iterdir()] == ["step-00000001"]
    assert stopped() == 0
    assert stopped.steps() == [2, 4]


def test_a_disk_that_is_full_between_checkpoints_ends_the_run(
    stopped: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(metrics.msgspec.json, "encode", no_space)
        assert stopped() == 3
    assert "metrics of step 2" in stopped.error()
    assert stopped.steps() == [1]
    assert stopped() == 0
    assert [m.step for m in read_metrics(stopped.output / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_disk_that_is_full_while_data_are_prepared_leaves_nothing_that_looks_done(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(dataset.np, "where", no_space)
        assert command() == 3
    assert "shard file-00000 of the prepared data" in command.error()
    assert not (command.output / "data" / "manifest.json").exists()
    assert command() == 0


def test_an_interrupt_in_a_step_saves_after_it_and_goes_on_as_if_nothing_was(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = learner.Learner.step

    def interrupted(self: learner.Learner, data: Any, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), 2)
        return original(self, data, step)

    with monkeypatch.context() as patch:
        patch.setattr(learner.Learner, "step", interrupted)
        assert command() == 130
    assert command.steps() == [2, 3]
    assert command() == 0
    resumed = command.weights()
    command.raw["run"]["output"] = str(tmp_path / "whole")
    command.output = tmp_path / "whole"
    assert command() == 0
    assert command.weights() == resumed


@pytest.mark.parametrize(
    ("table", "key", "allowed"),
    [
        ("run", "outptu", "run.output"),
        ("optimizer", "lr", "optimizer.learning_rate"),
        ("data", "valid", "data.validation_rows"),
        ("", "optimiser", "optimizer"),
    ],
)
def test_a_key_that_does_not_exist_is_named_with_those_that_do(
    command: Command, table: str, key: str, allowed: str
) -> None:
    if table:
        command.raw[table][key] = 1
    else:
        command.raw[key] = {"steps": 1}
    assert command() == 2
    assert f"{table}.{key} is not known".lstrip(".") in (line := command.error())
    assert allowed in line
    assert not command.output.exists()


def test_a_folder_that_is_no_folder_is_told(command: Command) -> None:
    command.output.write_text("a file")
    assert command() == 2
    assert f"run.output={command.output} cannot be written to" in command.error()


def test_metrics_of_older_runs_can_be_read(tmp_path: Path) -> None:
    """Fields that came later are missing in their lines."""
    old = dict.fromkeys(StepMetrics.__struct_fields__, 1.0) | {"step": 0, "tokens": 1, "targets": 1}
    for name in ("validation_loss", "distill_loss"):
        del old[name]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert read.validation_loss is None
