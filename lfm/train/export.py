"""The built-in model: the recipes that make it, and the folder that is committed."""

import shutil
from importlib import resources
from pathlib import Path

import torch

from lfm.config import ModelConfig
from lfm.errors import UsageError
from lfm.model.lfm2 import Lfm2
from lfm.model.weights import load_weights, save_weights

RECIPES = {
    "tokenizer": "builtin_tokenizer.toml",
    "pretrain": "builtin_pretrain.toml",
    "sft": "builtin_sft.toml",
}
_MAX_SHARD_BYTES = 15_000_000  # of a file in the repository
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def recipe_path(name: str) -> Path:
    """The path of a recipe that comes with the package."""
    return Path(str(resources.files("lfm.train").joinpath("recipes", name)))


def export_model(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint without the trainer's state, in bf16, as shards that a repository can hold.

    Replaces what an earlier export left in `folder`; raises UsageError if it holds anything else.
    """
    known = {*_FILES, "config.json", "model.safetensors.index.json"}
    for path in folder.glob("*"):
        if path.name not in known and path.suffix != ".safetensors":
            raise UsageError(f"{folder} holds {path.name}, which no export wrote. Remove it, or the folder.")
    shutil.rmtree(folder, ignore_errors=True)
    with torch.device("meta"):
        model = Lfm2(ModelConfig.from_folder(checkpoint))
    load_weights(model, checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16)
    save_weights(model, folder, max_shard_bytes=_MAX_SHARD_BYTES)
    for name in _FILES:
        shutil.copyfile(checkpoint / name, folder / name)
    return folder
