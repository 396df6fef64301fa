"""`lfm train`: what it prints, how it ends, and that an interrupted run loses nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lfm.cli.app import run
from lfm.train import export
from lfm.train.checkpoint import checkpoint_folders
from lfm.train.metrics import StepMetrics, read_metrics
from lfm.train.prepare import prepare
from lfm.train.recipe import DataSettings
from tests.train.models import recipe_dict, write_documents
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


def write_toml(path: Path, content: dict[str, Any]) -> Path:
    """JSON values are TOML values but for objects, which become tables here."""
    lines: list[str] = []

    def write(name: str, table: dict[str, Any]) -> None:
        lines.append(f"[{name}]")
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict))
        for key, value in table.items():
            if isinstance(value, dict):
                write(f"{name}.{key}", value)

    for name, table in content.items():
        write(name, table)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_recipe_trains_and_says_where_the_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = recipe_dict(tmp_path)
    raw["schedule"]["steps"] = 3
    assert run(["train", "pretrain", str(write_toml(tmp_path / "recipe.toml", raw))]) == 0
    error_text = capsys.readouterr().err
    assert "training: step 3 of 3, loss " in error_text
    assert f"finished after 3 steps, loss {read_metrics(tmp_path / 'run' / 'metrics.jsonl')[-1].loss:.4f}" in error_text


def test_a_dry_run_prints_sizes_memory_and_time_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_toml(tmp_path / "recipe.toml", recipe_dict(tmp_path))
    assert run(["train", "pretrain", str(path), "--dry-run"]) == 0
    labels = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert labels == ["model", "steps", "memory", "operations", "time", "data"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "none.toml"], "There is no recipe none.toml"),
        (["pretrain", "{path}", "--minutes", "0"], "--minutes 0 is out of range"),
        (["tokenizer", "{path}"], "run is not known. Allowed: tokenizer, data"),
        (["sft", "{path}"], "is a text; SFT needs conversations"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = write_toml(tmp_path / "recipe.toml", recipe_dict(tmp_path))
    assert run(["train", *(argument.format(path=path) for argument in arguments)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.slow
def test_an_interrupt_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path, save_every_steps=1000)
    raw["schedule"]["steps"] = 1000
    command = [sys.executable, "-m", "lfm.cli", "train", "pretrain", str(write_toml(tmp_path / "recipe.toml", raw))]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=dict(os.environ))
    try:
        wait_until(lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2, what="two steps", seconds=60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert b"stopped; the same command goes on after" in errors
    (folder,) = checkpoint_folders(tmp_path / "run")
    assert folder.name == f"step-{len(metrics.read_bytes().splitlines()):08d}"
    assert run([*command[3:], "--minutes", "0.00001"]) == 0
    assert read_metrics(metrics)[-1].step == int(folder.name.removeprefix("step-"))


@pytest.mark.slow
def test_several_processes_prepare_the_same_data_as_one(tmp_path: Path) -> None:
    recipe_dict(tmp_path)
    files = [str(write_documents(tmp_path / f"{seed}.jsonl", count=20, seed=seed)) for seed in (1, 2, 3)]
    contents = []
    for num_processes in (1, 3):
        folder = tmp_path / f"data-{num_processes}"
        lines: list[str] = []
        prepare(
            DataSettings(files=tuple(files), max_length=32),
            "pretrain",
            tokenizer_folder=tmp_path / "tokenizer",
            folder=folder,
            num_processes=num_processes,
            on_progress=lines.append,
        )
        assert lines[-1] == "preparing data: 3 of 3 shards"
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]


def test_metrics_are_plain_json_lines(tmp_path: Path) -> None:
    raw = recipe_dict(tmp_path)
    raw["schedule"] = {"steps": 2}
    assert run(["train", "pretrain", str(write_toml(tmp_path / "recipe.toml", raw))]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    assert set(json.loads(lines[0])) == set(StepMetrics.__struct_fields__)


def test_the_built_in_model_is_made_stage_by_stage_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = recipe_dict(tmp_path) | {"schedule": {"steps": 2}, "batch": {"tokens": 4096}}
    shape, run_settings = raw["model"]["shape"], raw["run"]
    synthetic = {"synthetic": {"conversations": 6, "shards": 1, "languages": ["en"]}}
    data = {"tokenizer": str(tmp_path / "made"), "max_length": 4096, **synthetic}
    recipes = {
        "tokenizer": {"tokenizer": {"output": str(tmp_path / "made"), "vocab_size": 300}, "data": synthetic},
        "pretrain": raw | {"model": {"shape": shape}, "data": data},
        "sft": raw
        | {"run": run_settings | {"output": str(tmp_path / "sft")}, "model": {"start": run_settings["output"]}}
        | {"data": data},
    }
    for name, recipe in recipes.items():
        write_toml(tmp_path / f"{name}.toml", recipe)
    monkeypatch.setattr(export, "RECIPES", {name: f"{name}.toml" for name in recipes})
    monkeypatch.setattr(export, "recipe_path", lambda name: tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert run(["train", "builtin", "--minutes", "0.0001"]) == 0
    assert not (tmp_path / "runs").exists()
    assert run(["train", "builtin"]) == 0
    assert "the model is in runs/builtin/model" in capsys.readouterr().err
    assert (tmp_path / "runs" / "builtin" / "model" / "config.json").exists()
