"""A small model that was really trained, some seconds on a CPU, on the project's own documentation; held-out text."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import torch

from lfm.chat.tokenizer import Tokenizer
from lfm.config import ModelConfig
from lfm.model.lfm2 import Lfm2
from lfm.model.weights import load_weights
from lfm.train.recipe import TrainRecipe, parse_recipe
from lfm.train.session import train
from lfm.train.tokenizer import train_tokenizer, write_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
SENTENCE_CHARACTERS = 600


class Trained(NamedTuple):
    """Where the model is, its mean loss at the end, and held-out rows of ids."""

    folder: Path
    loss: float
    held_out: list[list[int]]

    def load(self, dtype: torch.dtype = torch.float32) -> Lfm2:
        with torch.device("meta"):
            model = Lfm2(ModelConfig.from_folder(self.folder))
        load_weights(model, self.folder, device=torch.device("cpu"), dtype=dtype)
        return model.requires_grad_(False)


@cache
def trained_model() -> Trained:
    """Trained once per process. Experts, short convolutions and attention, untied from any random weights."""
    folder = Path(mkdtemp(prefix="lfm-trained-"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md")))
    parts = [text[i : i + SENTENCE_CHARACTERS] for i in range(0, len(text), SENTENCE_CHARACTERS)]
    held_out = parts[::10][:12]
    documents = folder / "documents.jsonl"
    documents.write_text("\n".join(json.dumps({"text": part}) for i, part in enumerate(parts) if i % 10))
    write_tokenizer(folder / "tokenizer", train_tokenizer(parts, vocab_size=512, min_frequency=2))
    recipe = {
        "run": {"output": str(folder / "run"), "device": "cpu", "save_every_steps": 1000, "seed": 0},
        "model": {
            "shape": {
                "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 4,
                "attention_layers": [1, 3], "num_attention_heads": 4, "num_key_value_heads": 2, "num_dense_layers": 1,
                "num_experts": 8, "num_experts_per_tok": 2,
            }
        },
        "data": {"tokenizer": str(folder / "tokenizer"), "files": [str(documents)], "max_length": 256},
        "batch": {"tokens": 1024},
        "optimizer": {"name": "muon", "learning_rate": 0.01},
        "schedule": {"steps": 60, "warmup_steps": 3},
    }  # fmt: skip
    outcome = train(parse_recipe(recipe, TrainRecipe, origin="test"), "pretrain", on_progress=lambda line: None)
    assert outcome.loss is not None
    tokenizer = Tokenizer.from_folder(folder / "tokenizer", ModelConfig.from_folder(outcome.checkpoint))
    return Trained(outcome.checkpoint, outcome.loss, [tokenizer.encode_raw(part) for part in held_out])
