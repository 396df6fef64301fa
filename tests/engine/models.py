"""Tiny random models and plans for the engine's tests, on the CPU and (marked `gpu`) on a GPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lfm.config import EnginePlan, ModelConfig
from lfm.engine.build import assemble_engine
from lfm.engine.engine import Engine
from lfm.engine.grammar_library import TokenTable
from lfm.engine.sampler import sample
from lfm.engine.sampling_rows import RowStart, SamplingRows
from lfm.model.full_forward import full_logits
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import PACKED, REFERENCE, Ops
from lfm.protocol import EngineRequest, SamplingParams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB, NUM_IDS, EOS = 40, 36, 7
CONV, ATTENTION = "conv", "full_attention"


def tiny_config(layer_types: tuple[str, ...] = (CONV, ATTENTION, CONV), window: int = 3) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", "vocab_size": VOCAB, "hidden_size": 16,
            "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": len(layer_types),
            "num_dense_layers": 1, "layer_types": list(layer_types), "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_experts": 6, "num_experts_per_tok": 2, "conv_L_cache": window,
            "conv_bias": False, "norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 10000.0,
            "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0,
        }
    )  # fmt: skip


def random_model(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Lfm2:
    """Weights large enough that attention, convolution and routing all matter."""
    generator = torch.Generator().manual_seed(seed)
    model = Lfm2(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            values = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                values = 1 + 0.2 * values
            elif "expert_bias" in name:
                values = 0.3 * values
            elif "embed_tokens" not in name:
                values = values * 1.5 * tensor.shape[-1] ** -0.5
            tensor.copy_(values)
    bias_names = {name for name, _ in model.named_buffers() if "expert_bias" in name}
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name in bias_names}
    model = model.to(device, dtype).requires_grad_(False)
    for name, bias in biases.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, bias.to(device))
    return model


def make_plan(*, device: str = "cpu", dtype: str = "float64", **changes: int | bool | str) -> EnginePlan:
    settings = {
        "max_model_len": 64, "max_running": 4, "step_tokens": 16, "step_tokens_decoding": 8, "block_size": 4,
        "num_blocks": 32, "memory_fraction": 0.9, "max_queue": 64, "plain_loop": False, "prefix_caching": True,
        "seed": 0,
    } | changes  # fmt: skip
    return EnginePlan(device=device, dtype=dtype, **settings)  # type: ignore[arg-type]


def make_engine(
    model: Lfm2,
    plan: EnginePlan,
    *,
    overlap: bool,
    ops: Ops = REFERENCE,
    make_table: Callable[[], TokenTable] | None = None,
) -> Engine:
    """An engine on plain ops whose pool starts filled with NaN."""
    device = model.model.embed_tokens.weight.device.type
    plan = replace(plan, device=device)
    engine = assemble_engine(model, plan, num_ids=NUM_IDS, ops=ops, overlap=overlap, make_table=make_table)
    engine.runner.cache.fill(float("nan"))
    return engine


def naive_loop(model: Lfm2, prompt: list[int], sampling: SamplingParams, ops: Ops = PACKED) -> list[int]:
    """The oracle: recompute everything for every token, sample in a fresh row, stop at the end token."""
    assert sampling.seed is not None
    ids = list(prompt)
    device = model.model.embed_tokens.weight.device
    while len(ids) - len(prompt) < sampling.max_tokens:
        logits = full_logits(model, [ids], ops)[0][-1:]
        rows = SamplingRows(1, VOCAB, num_ids=NUM_IDS, device=device)
        rows.start(RowStart(row=0, params=sampling, seed=sampling.seed, ids=ids, num_prompt=len(prompt)))
        zero, position = torch.tensor([0], device=device), torch.tensor([len(ids)], device=device)
        ids.append(int(sample(rows, logits, row_R=zero, position_R=position, flags=rows.flags([0])).ids_R))
        if ids[-1] in sampling.stop_token_ids:
            break
    return ids[len(prompt) :]


def make_request(request_id: str, prompt: list[int], sampling: SamplingParams, *, tenant: str = "") -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_ids=prompt, sampling=sampling, tenant=tenant)


def run_all(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[int]]:
    """Add everything, step to the end, return each request's ids."""
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        for event in engine.step():
            outputs[event.request_id] += event.token_ids
    return outputs
