"""The packaged recipes are valid, make the shape that is promised, and what is exported can be committed."""

from pathlib import Path

import torch

from lfm.model.full_forward import full_logits
from lfm.model.lfm2 import Lfm2
from lfm.model.sizes import num_active_parameters, num_parameters, weight_bytes
from lfm.model.source import resolve_model
from lfm.model.weights import load_weights
from lfm.train.examples import load_tokenizer
from lfm.train.export import RECIPES, export_model, recipe_path
from lfm.train.models import config_of
from lfm.train.recipe import TokenizerRecipe, TrainRecipe, parse_recipe, read_recipe
from lfm.train.session import train
from tests.train.models import recipe_dict, write_documents, write_tiny_tokenizer

torch.set_num_threads(1)


def test_the_packaged_recipes_make_a_model_of_the_promised_size(tmp_path: Path) -> None:
    """12 to 18 million parameters, 8,192 to 12,288 tokens, conv and attention at 3:1, 36 MB in bf16, experts on."""
    vocab_size = read_recipe(recipe_path(RECIPES["tokenizer"]), TokenizerRecipe).tokenizer.vocab_size
    pretrain, sft = (read_recipe(recipe_path(RECIPES[kind]), TrainRecipe) for kind in ("pretrain", "sft"))
    assert 8_192 <= vocab_size <= 12_288
    assert sft.model.start == pretrain.run.output
    assert pretrain.model.shape is not None
    tokenizer = load_tokenizer(write_tiny_tokenizer(tmp_path / "t", write_documents(tmp_path / "documents.jsonl")))
    tokenizer.num_ids = vocab_size
    config = config_of(pretrain.model.shape, tokenizer)
    assert 12_000_000 <= num_parameters(config) <= 18_000_000
    assert num_active_parameters(config) < 7_000_000
    assert weight_bytes(config, "bfloat16") < 36_000_000
    assert len(config.conv_layers) == 3 * len(config.attention_layers)
    assert config.num_dense_layers == 2
    assert config.num_experts_per_tok == 4
    assert config.use_expert_bias


def test_an_export_is_the_checkpoint_in_small_shards(tmp_path: Path) -> None:
    checkpoint = train(
        parse_recipe(recipe_dict(tmp_path, dtype="bfloat16") | {"schedule": {"steps": 1}}, TrainRecipe, origin="r"),
        "pretrain",
        on_progress=lambda line: None,
    ).checkpoint
    for _ in range(2):  # a second export replaces the first
        folder = export_model(checkpoint, tmp_path / "model")
    assert not (folder / "training").exists()
    assert all(path.stat().st_size < 15_000_000 for path in folder.iterdir())
    logits = []
    for path in (checkpoint, folder):
        model = Lfm2(resolve_model(str(path)).config)
        load_weights(model, path, device=torch.device("cpu"), dtype=torch.bfloat16)
        with torch.no_grad():
            logits.append(full_logits(model, [[1, 20, 30]])[0])
    assert torch.equal(*logits)
