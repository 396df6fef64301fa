"""A recipe that cannot mean what it says is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from lfm.errors import UsageError
from lfm.train.recipe import TokenizerRecipe, TrainRecipe, differences, parse_recipe, read_recipe

GOOD: dict[str, Any] = {
    "run": {"output": "out"},
    "model": {"start": "some/model"},
    "data": {"files": ["a.jsonl"], "max_length": 64},
    "batch": {"tokens": 64},
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"steps": 10},
}


def changed(path: str, value: object) -> dict[str, Any]:
    section, _, key = path.partition(".")
    if not key:
        return GOOD | {section: value}
    return GOOD | {section: GOOD.get(section, {}) | {key: value}}


def test_defaults_fill_what_is_left_out() -> None:
    recipe = parse_recipe(GOOD, TrainRecipe, origin="r.toml")
    assert recipe.optimizer.name == "adamw"
    assert recipe.loss.balance_rate == 1e-3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("run.outptu", "x", r"r.toml: run.outptu is not known. Allowed: run.output, "),
        ("extra", {}, r"extra is not known. Allowed: run, model, data, "),
        ("model.shape", {"hidden": 3}, r"model.shape.hidden is not known"),
        ("data.synthetic", {"conversatons": 3}, r"data.synthetic.conversatons is not known"),
        ("batch.tokens", "many", r"Expected `int`, got `str` - at `\$.batch.tokens`"),
        ("batch.tokens", 1, r"`int` >= 2 - at `\$.batch.tokens`"),
        ("optimizer.learning_rate", 0, r"> 0.0 - at `\$.optimizer.learning_rate`"),
        ("optimizer.name", "sgd", r"Invalid enum value 'sgd'"),
        ("schedule.warmup_steps", 10, r"warmup_steps=10 leaves none of schedule.steps=10"),
        ("data.max_length", 66, r"max_length=66 does not fit into batch.tokens=64"),
        ("data.files", [], r"names nothing to learn from"),
        ("model", {}, r"either model.start or \[model.shape\]"),
        ("run", {}, r"missing required field `output`"),
    ],
)
def test_a_wrong_value_is_named(path: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(changed(path, value), TrainRecipe, origin="r.toml")


def test_a_new_model_needs_a_tokenizer() -> None:
    shape = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "attention_layers": [],
        "num_attention_heads": 1, "num_key_value_heads": 1, "num_dense_layers": 1,
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"needs data\.tokenizer"):
        parse_recipe(changed("model", {"shape": shape}), TrainRecipe, origin="r.toml")


def test_files_that_are_no_toml_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with pytest.raises(UsageError, match="There is no recipe"):
        read_recipe(path, TrainRecipe)
    path.write_text("[run\noutput = 1")
    with pytest.raises(UsageError, match="cannot be read as TOML"):
        read_recipe(path, TrainRecipe)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read as TOML"):
        read_recipe(path, TokenizerRecipe)


def test_differences_name_every_leaf() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert differences(old, {"a": {"b": 2, "c": (1, 2)}, "d": None, "e": 5}) == ["a.b was 1, is 2", "e was None, is 5"]
