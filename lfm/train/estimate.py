"""What a recipe will take: parameters, memory, operations, time. Estimates, but for the counts of parameters.

Legend: D hidden, I dense width, F expert width, A experts per token, H q heads, G kv heads, K head dim.
"""

import time
from dataclasses import dataclass

import torch

from lfm.config import ModelConfig
from lfm.model.sizes import format_bytes, num_active_parameters, num_parameters
from lfm.model.source import resolve_model
from lfm.train.dataset import Dataset
from lfm.train.metrics import format_seconds
from lfm.train.recipe import DistillSettings, TrainRecipe

_FP32 = 4
# Shares of the matrix rate that small models reach with plain operations: much of a step is not matrix products.
_LOW_USE, _HIGH_USE = 0.1, 0.35


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes: weights, gradients and optimizer state; activations of one micro-batch; logits of one chunk."""

    state: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.state + self.activations + self.logits


def flops_per_token(config: ModelConfig, *, row_length: int) -> int:
    """Operations that one token of a row of `row_length` takes in forward and backward: what utilisation counts.

    Six per weight that it multiplies with, and attention to the half of its row that comes before it on average.
    """
    attention = len(config.attention_layers) * config.num_attention_heads * config.head_dim
    return 6 * num_active_parameters(config) + 12 * attention * row_length // 2


def estimate_memory(config: ModelConfig, recipe: TrainRecipe, dtype: torch.dtype) -> MemoryEstimate:
    """Memory of one micro-batch at its largest, with plain operations."""
    item = dtype.itemsize
    num = num_parameters(config)
    copies = item if dtype != torch.float32 else 0
    moments = 2 if recipe.optimizer.name == "adamw" else 1  # of Muon; the embedding's second moment is left out
    state = num * (_FP32 * (2 + moments) + copies)
    layers = [_layer_bytes(config, layer, item) for layer in range(config.num_hidden_layers)]
    if recipe.run.checkpoint_activations:
        per_token = max(layers) + config.num_hidden_layers * config.hidden_size * item
    else:
        per_token = sum(layers)
    chunk = min(recipe.loss.chunk_tokens, recipe.batch.tokens)
    logits = chunk * config.vocab_size * (3 * _FP32 + item)
    return MemoryEstimate(state, recipe.batch.tokens * per_token, logits)


def _layer_bytes(config: ModelConfig, layer: int, item: int) -> int:
    """What autograd keeps of one token in one layer. Norms and convolutions keep fp32 copies."""
    hidden, kinds = config.hidden_size, config.layer_types
    norm = (2 * _FP32 + 2 * item) * hidden
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    operator = (3 * _FP32 + 6 * item) * hidden if kinds[layer] == "conv" else (2 * _FP32 + 7 * item) * heads
    if config.is_moe_layer(layer):
        feed_forward = config.num_experts_per_tok * item * (2 * hidden + 4 * config.moe_intermediate_size)
    else:
        feed_forward = 4 * item * config.intermediate_size
    return 2 * norm + operator + feed_forward


def describe(config: ModelConfig, recipe: TrainRecipe, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Lines for `--dry-run`. Multiplies matrices for a moment, to know the device's rate."""
    memory = estimate_memory(config, recipe, dtype)
    tokens_per_step = recipe.batch.tokens * recipe.batch.accumulation
    tokens = tokens_per_step * recipe.schedule.steps
    flops = tokens * flops_per_token(config, row_length=min(recipe.data.max_length, 512))
    rate = matrix_rate(device, dtype)
    slow, fast = (format_seconds(flops / rate / use) for use in (_LOW_USE, _HIGH_USE))
    name = str(dtype).removeprefix("torch.")
    return [
        f"model: {num_parameters(config):,} parameters, {num_active_parameters(config):,} active per token, "
        f"{config.vocab_size:,} rows of vocabulary",
        f"steps: {recipe.schedule.steps:,} of up to {tokens_per_step:,} tokens, {tokens:,} tokens in all",
        f"memory: about {format_bytes(memory.total)} on {device}: {format_bytes(memory.state)} weights, gradients and "
        f"optimizer, {format_bytes(memory.activations)} activations, {format_bytes(memory.logits)} logits",
        f"operations: {flops:.2e} in all",
        f"time: {fast} to {slow} at {100 * _HIGH_USE:.0f} to {100 * _LOW_USE:.0f} % of the {rate / 1e12:.2f} TFLOP/s "
        f"that matrix products in {name} reach here now",
    ]


def describe_teacher(settings: DistillSettings, dtype: torch.dtype) -> str:
    """A line about what a distillation adds. Raises ModelError if the teacher cannot be found."""
    config = resolve_model(settings.teacher).config
    num = num_parameters(config)
    return (
        f"teacher: {num:,} parameters, {num_active_parameters(config):,} active per token; about "
        f"{format_bytes(num * dtype.itemsize)} more, and the time of its forward"
    )


def describe_data(dataset: Dataset, recipe: TrainRecipe) -> str:
    """A line about prepared data."""
    tokens = recipe.batch.tokens * recipe.batch.accumulation * recipe.schedule.steps
    dropped = sum(shard.num_dropped for shard in dataset.shards)
    left_out = f", {dropped:,} left out because nothing in them is to be predicted" if dropped else ""
    return (
        f"data: {dataset.num_rows:,} examples, {dataset.num_tokens:,} tokens, {dataset.num_targets:,} to be predicted; "
        f"about {tokens / dataset.num_tokens:.1f} times through{left_out}"
    )


def matrix_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Operations per second of large matrix products on this device, measured."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    _wait_for(a @ b)
    began_s, count = time.monotonic(), 0
    while time.monotonic() - began_s < seconds:
        _wait_for(a @ b)
        count += 1
    return 2 * size**3 * count / (time.monotonic() - began_s)


def _wait_for(result: torch.Tensor) -> None:
    result[0, 0].item()
