"""Measure training: lfm's step against transformers' own module, in one run on the same data and initialisation.

    python bench/train.py --output bench/results/NAME.jsonl          # on a GPU; the tokenizer of the built-in model
    python bench/train.py --shapes tiny --device cpu --steps 3       # a rehearsal

Shapes: `builtin`, the built-in model's, and `1b`, a 1B-class LFM2-MoE (hidden 1,024, 16 layers, 32 experts). Rows are
synthetic conversations of which every token counts. Both sides: bf16 with fp32 masters, the same AdamW, the same
learning rate, cross-entropy alone (no z-losses, no balancing, which transformers does not have).

`lfm` packs rows and replays a recorded step. `transformers` gets the same rows of each step sorted by length and
padded at their ends, as many to a micro-batch as `--their-tokens` holds, with attention by SDPA and experts by grouped
products, as written and by torch.compile; `--rivals` says which. It gets no mask, which would cost it the fast causal
attention: nothing of a causal model sees what comes after it. Both read the loss once a step. Rates count real tokens,
padding nothing; `tokens_per_s` is the median of three parts of the timed steps, `parts_tokens_per_s`. A side that fails
is recorded as its error, one that takes longer than `--seconds` ends early. `mfu` is by
lfm.train.estimate.flops_per_token and 989 TFLOP/s.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lfm.cli.offline import Facts
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
    seconds: float


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
            "synthetic": {
                "conversations": arguments.conversations,
                "seed": 7,
                "shards": max(1, min(16, arguments.conversations // 100)),
            },
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
    """Rows sorted by length, as many to a batch as fit: ids and the next ids, or -100, [B, L]."""
    rows = sorted(rows, key=len)
    while rows:
        longest = len(rows[-1]) - 1
        count = min(len(rows), max(1, tokens // longest))
        part, rows = rows[-count:], rows[:-count]
        ids = np.zeros((count, longest), np.int64)
        targets = np.full((count, longest), -100)
        for i, row in enumerate(part):
            ids[i, : len(row) - 1], targets[i, : len(row) - 1] = row[:-1], row[1:]
        yield torch.from_numpy(ids), torch.from_numpy(targets)


def _backward(
    forward: Callable[..., Any], batch: tuple[torch.Tensor, torch.Tensor], device: torch.device, num_targets: int
) -> torch.Tensor:
    ids, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    logits = forward(input_ids=ids, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    (loss / num_targets).backward()
    return loss.detach() / num_targets


def measure(name: str, steps: Iterator[tuple[float, int]], setting: Setting) -> dict[str, Any]:
    """Run all steps; time those after the warm-up."""
    is_cuda = setting.device.type == "cuda"
    if is_cuda:
        gc.collect()  # models of the side before hold themselves by their hooks
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began_s = time.monotonic()
    losses, tokens, ends_s = [], [], []
    for loss, num_tokens in steps:
        losses.append(loss)
        tokens.append(num_tokens)
        ends_s.append(time.monotonic())  # the loss was read: all before the update is done
        if ends_s[-1] - began_s > setting.seconds:
            break
    first = min(_WARM_UP, len(losses) // 2)
    cuts = [first + (len(losses) - first) * part // 3 for part in range(4)]
    rates = [
        sum(tokens[begin:end]) / (ends_s[end - 1] - (ends_s[begin - 1] if begin else began_s))
        for begin, end in itertools.pairwise(cuts)
        if end > begin
    ]
    rate = statistics.median(rates)
    mean_length = setting.dataset.num_tokens // setting.dataset.num_rows
    return {
        "side": name,
        "tokens_per_s": round(rate, 1),
        "parts_tokens_per_s": [round(part, 1) for part in rates],
        "mfu": round(rate * flops_per_token(setting.config, row_length=mean_length) / _PEAK, 4) if is_cuda else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "seconds": round(ends_s[-1] - began_s, 2),
        "steps": len(losses),
        "losses": [round(loss, 5) for loss in losses],
    }


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
    labels = (
        f'<text x="4" y="24">{high:.3g}</text><text x="4" y="264">{low:.3g}</text><text x="50" y="280">1</text>'
        f'<text x="570" y="280" text-anchor="end">{max(map(len, curves.values()))} steps</text>'
        f'<text x="50" y="14">loss, shape {results[0]["shape"]}</text>'
    )
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="600" height="290" font-family="sans-serif" font-size="11">'
        f'<rect width="600" height="290" fill="white"/>{labels}{"".join(lines)}</svg>\n',
        encoding="utf-8",
    )


def compare(shape: str, arguments: argparse.Namespace, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The results of a shape so far, after each side: a rival that never ends takes nothing with it."""
    recipe = recipe_of(shape, arguments, folder)
    assert recipe.model.shape is not None
    tokenizer = Path(arguments.tokenizer)
    prepare(recipe.data, "pretrain", tokenizer_folder=tokenizer, folder=folder / "data", on_progress=lambda line: None)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = config_of(recipe.model.shape, load_tokenizer(tokenizer))
    setting = Setting(
        shape, recipe, config, Dataset(folder / "data"), device, dtype, arguments.steps, arguments.seconds
    )
    sides: dict[str, Callable[[], Iterator[tuple[float, int]]]] = {"lfm": lambda: steps_of_lfm(setting)}
    for rival in arguments.rivals.split(","):
        is_compiled = rival == "compiled"
        sides[f"transformers, {rival}"] = lambda is_compiled=is_compiled: steps_of_transformers(
            setting, is_compiled=is_compiled, tokens=arguments.their_tokens
        )
    facts = asdict(Facts.of_this_machine(arguments.commit)) | {"transformers": version("transformers")}
    facts |= {"shape": shape, "parameters": num_parameters(config), "step_tokens": arguments.tokens}
    results: list[dict[str, Any]] = []
    for name, steps in sides.items():
        try:
            result = measure(name, steps(), setting)
        except Exception as error:  # a rival that cannot run is a result too; lfm's own failure is raised
            if name == "lfm":
                raise
            result = {"side": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        results.append(facts | result)
        print(_line(results[-1], results[0]), flush=True)
        yield results


def _line(result: dict[str, Any], ours: dict[str, Any]) -> str:
    if "error" in result:
        return f"{result['shape']:8s} {result['side']:24s} {result['error'][:160]}"
    worst = max(abs(a - b) / b for a, b in zip(result["losses"], ours["losses"], strict=False))
    mfu = math.nan if result["mfu"] is None else 100 * result["mfu"]
    peak = math.nan if result["peak_bytes"] is None else result["peak_bytes"] / 1e9
    return (
        f"{result['shape']:8s} {result['side']:24s} {result['tokens_per_s']:12,.0f} tokens/s  mfu {mfu:5.1f} %  "
        f"peak {peak:6.1f} GB  loss {result['losses'][-1]:.4f} after {result['steps']}, at most {100 * worst:.2f} % "
        f"from lfm's  {result['tokens_per_s'] / ours['tokens_per_s']:.2f}x"
    )


def main(argv: list[str] | None = None) -> None:
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="of each side, compilation included")
    parser.add_argument("--commit", help="what to write as the commit where git cannot tell it")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    for shape in arguments.shapes.split(","):
        for results in compare(shape, arguments, arguments.folder / shape):
            if arguments.output is None:
                continue
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
            plot(arguments.output.with_name(f"{arguments.output.stem}_{shape}.svg"), results)


if __name__ == "__main__":
    main()
