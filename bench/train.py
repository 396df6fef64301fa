"""Measure training: lfm's step against transformers' own module, in one run on the same data and initialisation.

    python bench/train.py --output bench/results/NAME.jsonl          # on a GPU; the tokenizer of the built-in model
    python bench/train.py --shapes tiny --device cpu --steps 3       # a rehearsal

Shapes: `builtin`, the built-in model's, and `1b`, a 1B-class LFM2-MoE (hidden 1,024, 16 layers, 32 experts). Rows are
synthetic conversations of which every token counts. Both sides: bf16 with fp32 masters, the same AdamW, the same
learning rate, cross-entropy alone (no z-losses, no balancing, which transformers does not have).

`lfm` packs rows and replays a recorded step. `transformers` gets the same rows of each step sorted by length and
padded, as many to a micro-batch as `--their-tokens` holds, with attention by SDPA and experts by grouped products, as
written and by torch.compile; `--rivals` says which. Rates count real tokens, padding nothing. A side that fails is
recorded as its error. `mfu` is by lfm.train.estimate.flops_per_token and 989 TFLOP/s.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lfm.config import ModelConfig
from lfm.model.hf_config import to_hf_config
from lfm.model.sizes import num_parameters
from lfm.train.dataset import Dataset, unpack
from lfm.train.estimate import flops_per_token
from lfm.train.examples import load_tokenizer
from lfm.train.export import RECIPES, recipe_path
from lfm.train.learner import Learner
from lfm.train.masters import MasterWeights
from lfm.train.models import build_model, config_of, random_weights
from lfm.train.optimizer import clip_gradients, gradient_norm, learning_rate_at, make_optimizers
from lfm.train.prepare import prepare
from lfm.train.recipe import TrainRecipe, parse_recipe, read_recipe
from lfm.train.steps import Position, StepReader, fixed_size

_PEAK = 989e12  # bf16 of an H100 or H200, dense, by the datasheet
_WARM_UP = 20  # steps that are not timed: compilation, recording, first allocations
_SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "attention_layers": [2, 6, 10, 14],
        "num_attention_heads": 16, "num_key_value_heads": 4, "num_dense_layers": 2, "moe_intermediate_size": 512,
        "num_experts": 32, "num_experts_per_tok": 4,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "attention_layers": [2],
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_dense_layers": 1, "moe_intermediate_size": 16,
        "num_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One shape with its data: the same for both sides."""

    name: str
    recipe: TrainRecipe
    config: ModelConfig
    dataset: Dataset
    device: torch.device
    dtype: torch.dtype
    steps: int


def recipe_of(shape: str, arguments: argparse.Namespace, folder: Path) -> TrainRecipe:
    builtin = read_recipe(recipe_path(RECIPES["pretrain"]), TrainRecipe)
    assert builtin.model.shape is not None
    spec = _SHAPES.get(shape) or {
        name: getattr(builtin.model.shape, name) for name in builtin.model.shape.__struct_fields__
    }
    raw = {
        "run": {"output": str(folder), "seed": 1, "device": arguments.device},
        "model": {"shape": spec},
        "data": {
            "tokenizer": arguments.tokenizer,
            "max_length": 1536,
            "synthetic": {"conversations": arguments.conversations, "seed": 7, "shards": 16},
        },
        "batch": {"tokens": arguments.tokens},
        "optimizer": {"name": "adamw", "learning_rate": arguments.learning_rate},
        "schedule": {"steps": arguments.steps + 1, "warmup_steps": min(20, arguments.steps)},
        "loss": {"router_z": 0.0, "output_z": 0.0, "balance_rate": 0.0},
    }
    return parse_recipe(raw, TrainRecipe, origin=f"shape {shape}")


def steps_of_lfm(setting: Setting) -> Iterator[tuple[float, int]]:
    """Loss and real tokens of each step."""
    recipe = setting.recipe
    model = build_model(setting.config, device=setting.device, dtype=setting.dtype)
    learner = Learner(model, random_weights(setting.config, std=0.02, seed=1), recipe)
    model.rope(recipe.data.max_length)
    reader = _reader(setting)
    position = Position()
    for step in range(setting.steps):
        data = reader.read(position)
        yield learner.step(data, step).loss, data.num_tokens
        position = data.next_position


def _reader(setting: Setting) -> StepReader:
    size = fixed_size(setting.recipe) if setting.device.type == "cuda" else None
    return StepReader(setting.dataset, batch_tokens=setting.recipe.batch.tokens, accumulation=1, seed=1, size=size)


def steps_of_transformers(setting: Setting, *, is_compiled: bool, tokens: int) -> Iterator[tuple[float, int]]:
    """The same steps by transformers' module; masters, clipping and optimizer are lfm's."""
    from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

    raw = {key: value for key, value in to_hf_config(setting.config).items() if key not in ("architectures", "dtype")}
    with torch.device(setting.device):
        model = Lfm2MoeForCausalLM._from_config(
            Lfm2MoeConfig(**raw), dtype=setting.dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    values = {k: v.to(setting.device) for k, v in random_weights(setting.config, std=0.02, seed=1).items()}
    names = dict(model.named_parameters())
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.zero_()
    masters = MasterWeights(model, {name: value for name, value in values.items() if name in names})
    optimizers = make_optimizers(masters.tensors, setting.recipe.optimizer)
    forward = torch.compile(model, dynamic=True) if is_compiled else model
    order = _reader(setting)
    position = Position()
    for step in range(setting.steps):
        rows, position = order._fill(position)
        arrays = [unpack(row)[0] for row in rows]
        num_targets = sum(len(ids) - 1 for ids in arrays)
        masters.clear_gradients()
        losses = [_backward(forward, batch, setting.device, num_targets) for batch in _padded(arrays, tokens)]
        norm = gradient_norm(masters.tensors.values())
        loss, norm_value = torch.stack([torch.stack(losses).sum().float(), norm]).tolist()
        clip_gradients(masters.tensors.values(), norm=norm_value, max_norm=setting.recipe.optimizer.clip_norm)
        optimizers.step(learning_rate_at(step, setting.recipe.optimizer.learning_rate, setting.recipe.schedule))
        masters.round_into_model()
        yield loss, num_targets


def _padded(rows: list[np.ndarray], tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows sorted by length, as many to a batch as fit: ids and attention mask [B, L]."""
    rows = sorted(rows, key=len)
    while rows:
        longest = len(rows[-1])
        count = min(len(rows), max(1, tokens // longest))
        part, rows = rows[-count:], rows[:-count]
        ids = np.zeros((count, longest), np.int64)
        mask = np.zeros((count, longest), np.int64)
        for i, row in enumerate(part):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        yield torch.from_numpy(ids), torch.from_numpy(mask)


def _backward(
    forward: Callable[..., Any], batch: tuple[torch.Tensor, torch.Tensor], device: torch.device, num_targets: int
) -> torch.Tensor:
    ids, mask = (tensor.to(device, non_blocking=True) for tensor in batch)
    logits = forward(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = torch.where(mask[:, 1:] > 0, ids[:, 1:], -100)
    loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    (loss / num_targets).backward()
    return loss.detach() / num_targets


def measure(name: str, steps: Iterator[tuple[float, int]], setting: Setting) -> dict[str, Any]:
    """Run all steps; time those after the warm-up."""
    is_cuda = setting.device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, tokens, began_s = [], 0, time.monotonic()
    first = min(_WARM_UP, setting.steps // 2)
    for step, (loss, num_tokens) in enumerate(steps):
        losses.append(loss)
        if step == first - 1:
            began_s, tokens = _now(is_cuda), 0
        else:
            tokens += num_tokens
    rate = tokens / (_now(is_cuda) - began_s)
    mean_length = setting.dataset.num_tokens // setting.dataset.num_rows
    return {
        "side": name,
        "tokens_per_s": rate,
        "mfu": rate * flops_per_token(setting.config, row_length=mean_length) / _PEAK if is_cuda else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "losses": [round(loss, 5) for loss in losses],
    }


def _now(is_cuda: bool) -> float:
    if is_cuda:
        torch.cuda.synchronize()
    return time.monotonic()


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    """The loss curves of all sides in one SVG."""
    curves = {r["side"]: r["losses"] for r in results if r.get("losses")}
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    lines = []
    for i, (name, losses) in enumerate(curves.items()):
        colour = ("#1f5fa8", "#c0392b", "#27823b")[i % 3]
        points = " ".join(
            f"{50 + x / max(1, len(losses) - 1) * 520:.1f},{20 + (high - y) / ((high - low) or 1) * 240:.1f}"
            for x, y in enumerate(losses)
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        lines.append(f'<text x="400" y="{40 + 16 * i}" fill="{colour}">{name}</text>')
    labels = f'<text x="4" y="24">{high:.3g}</text><text x="4" y="264">{low:.3g}</text>'
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="600" height="290" font-family="sans-serif" font-size="11">'
        f'<rect width="600" height="290" fill="white"/>{labels}{"".join(lines)}</svg>\n',
        encoding="utf-8",
    )


def compare(shape: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    recipe = recipe_of(shape, arguments, folder)
    assert recipe.model.shape is not None
    tokenizer = Path(arguments.tokenizer)
    prepare(recipe.data, "pretrain", tokenizer_folder=tokenizer, folder=folder / "data", on_progress=lambda line: None)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = config_of(recipe.model.shape, load_tokenizer(tokenizer))
    setting = Setting(shape, recipe, config, Dataset(folder / "data"), device, dtype, arguments.steps)
    sides: dict[str, Callable[[], Iterator[tuple[float, int]]]] = {"lfm": lambda: steps_of_lfm(setting)}
    for rival in arguments.rivals.split(","):
        is_compiled = rival == "compiled"
        sides[f"transformers, {rival}"] = lambda is_compiled=is_compiled: steps_of_transformers(
            setting, is_compiled=is_compiled, tokens=arguments.their_tokens
        )
    results = []
    for name, steps in sides.items():
        try:
            result = measure(name, steps(), setting)
        except Exception as error:  # a rival that cannot run is a result too; lfm's own failure is raised
            if name == "lfm":
                raise
            result = {"side": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        results.append({"shape": shape, "parameters": num_parameters(config), "steps": arguments.steps} | result)
        print(_line(results[-1], results[0]), flush=True)
    return results


def _line(result: dict[str, Any], ours: dict[str, Any]) -> str:
    if "error" in result:
        return f"{result['shape']:8s} {result['side']:24s} {result['error'][:160]}"
    worst = max(abs(a - b) / b for a, b in zip(result["losses"], ours["losses"], strict=True))
    mfu = math.nan if result["mfu"] is None else 100 * result["mfu"]
    peak = math.nan if result["peak_bytes"] is None else result["peak_bytes"] / 1e9
    return (
        f"{result['shape']:8s} {result['side']:24s} {result['tokens_per_s']:12,.0f} tokens/s  mfu {mfu:5.1f} %  "
        f"peak {peak:6.1f} GB  last loss {result['losses'][-1]:.4f}  furthest from lfm's {100 * worst:.2f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed against transformers.")
    parser.add_argument("--shapes", default="builtin,1b")
    parser.add_argument("--rivals", default="eager,compiled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokenizer", default="runs/builtin/tokenizer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--their-tokens", type=int, default=65_536)
    parser.add_argument("--conversations", type=int, default=40_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    for shape in arguments.shapes.split(","):
        results = compare(shape, arguments, arguments.folder / shape)
        if arguments.output is not None:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(result) + "\n" for result in results)
            plot(arguments.output.with_name(f"{arguments.output.stem}_{shape}.svg"), results)


if __name__ == "__main__":
    main()
