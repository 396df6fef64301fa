"""Our maths against transformers', on random tiny checkpoints of every layer mix."""

import copy

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, Lfm2MoeConfig, Lfm2MoeForCausalLM

from lfm.config import ModelConfig
from lfm.model.full_forward import full_logits
from lfm.model.lfm2 import Lfm2

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONV, ATTENTION = "conv", "full_attention"
BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "norm_eps": 1e-5, "conv_L_cache": 3, "conv_bias": False, "bos_token_id": 1,
    "eos_token_id": 7, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "num_dense_layers": 1}

MOE_CASES = {
    "conv then attention": {"layer_types": [CONV, ATTENTION]},
    "attention first": {"layer_types": [ATTENTION, CONV, CONV, ATTENTION]},
    "24B-like mix": {"layer_types": [CONV, CONV, ATTENTION, CONV, CONV, CONV, ATTENTION, CONV], "num_dense_layers": 2},
    "conv only": {"layer_types": [CONV, CONV, CONV]},
    "attention only": {"layer_types": [ATTENTION, ATTENTION]},
    "no dense layer": {"layer_types": [CONV, ATTENTION], "num_dense_layers": 0},
    "all dense": {"layer_types": [CONV, ATTENTION], "num_dense_layers": 2},
    "window 1": {"layer_types": [CONV, ATTENTION, CONV], "conv_L_cache": 1},
    "window 2": {"layer_types": [CONV, ATTENTION, CONV], "conv_L_cache": 2},
    "window 7": {"layer_types": [CONV, ATTENTION, CONV], "conv_L_cache": 7},
    "conv bias": {"layer_types": [CONV, ATTENTION, CONV], "conv_bias": True},
    "raw router weights": {"layer_types": [CONV, ATTENTION], "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "no expert bias": {"layer_types": [CONV, ATTENTION], "use_expert_bias": False},
    "untied head": {"layer_types": [CONV, ATTENTION], "tie_word_embeddings": False},
    "one kv head": {"layer_types": [ATTENTION, CONV], "num_key_value_heads": 1},
    "one expert each": {"layer_types": [ATTENTION, CONV], "num_experts_per_tok": 1},
}
DENSE_CASES = {
    "dense mix": {"layer_types": [CONV, CONV, ATTENTION, CONV]},
    "dense adjusted width": {
        "layer_types": [CONV, ATTENTION],
        "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 16,
    },
    "dense attention only": {"layer_types": [ATTENTION, ATTENTION]},
    "dense conv bias, window 5": {"layer_types": [CONV, ATTENTION], "conv_bias": True, "conv_L_cache": 5},
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Large random weights, biases and norms included, so that a mistake anywhere shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "expert_bias" in name or (tensor.dim() == 1 and "norm" not in name):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif "norm" in name:
                tensor.copy_(1 + torch.randn(tensor.shape, generator=generator) * 0.2)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5)


def make_reference(case: str) -> torch.nn.Module:
    """A transformers model of this case with random weights, in fp32 eval mode."""
    is_moe = case in MOE_CASES
    settings = {**BASE, **(MOE if is_moe else {}), **(MOE_CASES if is_moe else DENSE_CASES)[case]}
    settings["num_hidden_layers"] = len(settings["layer_types"])
    if not is_moe:
        settings.setdefault("block_auto_adjust_ff_dim", False)
    config = Lfm2MoeConfig(**settings) if is_moe else Lfm2Config(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = (Lfm2MoeForCausalLM if is_moe else Lfm2ForCausalLM)(config).eval()
    randomise(model, seed=len(case))
    return model


def to_ours(reference: torch.nn.Module) -> Lfm2:
    """The same weights in our module (transformers' in-memory names are ours)."""
    config = ModelConfig.from_dict(reference.config.to_dict())
    model = Lfm2(config)
    state = dict(reference.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model.load_state_dict(state)
    return model


def greedy(model: torch.nn.Module, step, prompt: list[int], count: int) -> tuple[list[int], list[torch.Tensor]]:
    ids, rows = list(prompt), []
    for _ in range(count):
        logits = step(model, ids)
        rows.append(logits)
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [*MOE_CASES, *DENSE_CASES])
def test_logits_and_greedy_ids_equal_transformers(case: str, device: str) -> None:
    """In fp32; the GPU without TF32, which torch leaves off."""
    reference = make_reference(case)
    ours = to_ours(reference).to(device)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in (1, 2, 5, 33)]
    with torch.no_grad():
        for row, logits in zip(rows, full_logits(ours, rows), strict=True):
            expected = reference(torch.tensor([row]), use_cache=False).logits[0]
            assert (logits.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()
        theirs, _ = greedy(
            reference, lambda model, ids: model(torch.tensor([ids]), use_cache=False).logits[0, -1], rows[2], 24
        )
        mine, logits_per_step = greedy(ours, lambda model, ids: full_logits(model, [ids])[0][-1].cpu(), rows[2], 24)
    for step, (a, b) in enumerate(zip(theirs, mine, strict=True)):
        if a != b:  # allowed only in a near tie, counted and printed
            top = logits_per_step[step].topk(2).values
            assert top[0] - top[1] <= 1e-4 * logits_per_step[step].abs().max(), f"token {step}: {a} != {b}"
            print(f"{case}: near tie at token {step}")
            break


def test_a_wrong_router_would_be_seen() -> None:
    """The parity test can fail: a bias that also weighs the experts changes the logits far beyond the tolerance."""
    reference = make_reference("conv then attention")
    ours = to_ours(reference)
    changed = copy.deepcopy(ours)
    changed.model.layers[1].feed_forward.expert_bias.zero_()
    row = list(range(2, 30))
    with torch.no_grad():
        right, wrong = full_logits(ours, [row])[0], full_logits(changed, [row])[0]
    assert (right - wrong).abs().max() > 1e-3 * right.abs().max()
