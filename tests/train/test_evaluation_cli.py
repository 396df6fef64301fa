"""`lfm eval builtin`: what it prints and writes."""

import json
from pathlib import Path

import pytest

from lfm.cli import evaluate
from lfm.cli.app import run
from lfm.train.recipe import TrainRecipe, parse_recipe
from lfm.train.session import train
from tests.train.models import recipe_dict


def test_an_evaluation_prints_a_table_and_writes_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe_dict(tmp_path) | {"schedule": {"steps": 1}}
    recipe = parse_recipe(raw, TrainRecipe, origin="recipe.toml")
    folder = train(recipe, "pretrain", on_progress=lambda line: None).checkpoint
    monkeypatch.setattr(evaluate, "_MAX_ANSWER_TOKENS", 2)
    output = tmp_path / "scores.json"
    arguments = ["--count", "1", "--languages", "de", "--output", str(output), "--device", "cpu", "--dtype", "float32"]
    capsys.readouterr()
    assert run(["eval", "builtin", str(folder), *arguments]) == 0
    assert capsys.readouterr().out.startswith("| % | de |\n| --- | --: |\n| tool call | 0 |\n")
    scores = json.loads(output.read_text())["scores"]
    assert {score["metric"]: score["num_conversations"] for score in scores}["tool call"] == 2
    assert run(["eval", "builtin", str(folder), "--languages", "xx"]) == 2
    assert "--languages names 'xx'" in capsys.readouterr().err
