"""Tiny models, rows and recipes for the tests of training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm.config import ModelConfig
from lfm.model.lfm2 import Lfm2
from lfm.train.dataset import Row
from lfm.train.models import build_model, random_weights
from lfm.train.tokenizer import train_tokenizer, write_tokenizer

VOCAB = 64
CONV, ATTENTION = "conv", "full_attention"


def tiny_config(layer_types: tuple[str, ...] = (CONV, ATTENTION, CONV), **changes: Any) -> ModelConfig:
    raw = {
        "architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", "vocab_size": VOCAB, "hidden_size": 16,
        "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": len(layer_types),
        "num_dense_layers": 1, "layer_types": list(layer_types), "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_experts": 6, "num_experts_per_tok": 2, "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5,
        "max_position_embeddings": 512, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0,
    }  # fmt: skip
    return ModelConfig.from_dict(raw | changes)


def lively_weights(config: ModelConfig, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights large enough that attention, convolution and routing all matter, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(config, std=0.3, seed=seed)
    for name, tensor in weights.items():
        if name.endswith(("norm.weight", "bias")):
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return weights


def lively_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Lfm2:
    model = build_model(config, device=torch.device("cpu"), dtype=dtype)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in lively_weights(config, seed=seed).items():
            state[name].copy_(tensor)
    return model


def random_rows(lengths: list[int], *, seed: int = 0, vocab: int = VOCAB, share: float = 0.7) -> list[Row]:
    """Rows of random ids of which about `share` are targets; never id 0, which transformers gives no gradient."""
    generator = np.random.default_rng(seed)
    return [Row(generator.integers(1, vocab, n), generator.random(n) < share) for n in lengths]


def write_documents(path: Path, *, count: int = 60, seed: int = 0) -> Path:
    """Documents with something to learn: short sentences over few words."""
    generator = np.random.default_rng(seed)
    words = ["the", "cat", "dog", "sees", "likes", "a", "small", "red", "house", "and", "Zürich", "東京"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = " ".join(generator.choice(words, size=generator.integers(5, 20)))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def write_tiny_tokenizer(folder: Path, documents: Path) -> Path:
    texts = [json.loads(line)["text"] for line in documents.read_text(encoding="utf-8").splitlines()]
    write_tokenizer(folder, train_tokenizer(texts, vocab_size=300, min_frequency=1))
    return folder


def recipe_dict(tmp_path: Path, **run: Any) -> dict[str, Any]:
    """A pretraining recipe of a model with everything on, that takes milliseconds a step."""
    documents = tmp_path / "documents.jsonl"
    if not documents.exists():
        write_documents(documents)
        write_tiny_tokenizer(tmp_path / "tokenizer", documents)
    return {
        "run": {"output": str(tmp_path / "run"), "device": "cpu", "save_every_steps": 10, **run},
        "model": {
            "shape": {
                "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
                "attention_layers": [1], "num_attention_heads": 2, "num_key_value_heads": 1, "num_dense_layers": 1,
                "num_experts": 4, "num_experts_per_tok": 2, "init_std": 0.05,
            }
        },
        "data": {"tokenizer": str(tmp_path / "tokenizer"), "files": [str(documents)], "max_length": 32},
        "batch": {"tokens": 128, "accumulation": 2},
        "optimizer": {"name": "muon", "learning_rate": 0.01},
        "schedule": {"steps": 20, "warmup_steps": 2},
    }  # fmt: skip
