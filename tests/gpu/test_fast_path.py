"""The fast path on a GPU (fused kernels, CUDA graphs, overlap) against the plain loop, in bf16 on a small model."""

import random

import pytest
import torch

from lfm.config import EnginePlan, ModelConfig
from lfm.engine.build import assemble_engine
from lfm.engine.engine import Engine
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import FAST, REFERENCE
from lfm.model.pack import pack
from lfm.protocol import EngineRequest, SamplingParams, TokenLogprob
from tests.engine.models import random_model

pytestmark = pytest.mark.gpu

CONV, ATTENTION = "conv", "full_attention"
VOCAB = 1024
# bf16 keeps 8 bits: two right orders of summation differ by some 1 % of a logit of the size seen here.
MAX_DRIFT = 0.15


def small_config() -> ModelConfig:
    layer_types = [CONV, CONV, ATTENTION, CONV, CONV, CONV, ATTENTION, CONV]
    return ModelConfig.from_dict(
        {
            "architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", "vocab_size": VOCAB, "hidden_size": 512,
            "intermediate_size": 768, "moe_intermediate_size": 256, "num_hidden_layers": len(layer_types),
            "num_dense_layers": 2, "layer_types": layer_types, "num_attention_heads": 8, "num_key_value_heads": 2,
            "num_experts": 16, "num_experts_per_tok": 4, "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5,
            "max_position_embeddings": 4096, "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0,
        }
    )  # fmt: skip


def make(model: Lfm2, *, is_fast: bool) -> Engine:
    plan = EnginePlan(
        device="cuda:0", dtype="bfloat16", max_model_len=1024, max_running=48, step_tokens=256,
        step_tokens_decoding=128, block_size=64, num_blocks=256, memory_fraction=0.9, max_queue=64,
        plain_loop=not is_fast, prefix_caching=True, seed=0,
    )  # fmt: skip
    engine = assemble_engine(model, plan, num_ids=VOCAB, ops=FAST if is_fast else REFERENCE)
    engine.runner.cache.fill(float("nan"))
    return engine


def run(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[TokenLogprob]]:
    found: dict[str, list[TokenLogprob]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            assert event.error is None
            found[event.request_id] += event.logprobs
        engine.scheduler.check()
    return found


def traffic(num_requests: int, *, seed: int, max_tokens: int = 24) -> list[EngineRequest]:
    chance = random.Random(seed)
    stem = [chance.randrange(8, VOCAB) for _ in range(150)]
    requests = []
    for index in range(num_requests):
        prompt = stem[: chance.choice([0, 64, 150])] + [
            chance.randrange(8, VOCAB) for _ in range(chance.choice([1, 2, 5, 63, 64, 65, 200]))
        ]
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0, logprobs=2)
        requests.append(EngineRequest(request_id=f"{seed}-{index}", prompt_ids=prompt, sampling=sampling))
    return requests


@pytest.mark.parametrize("num_requests", [1, 3, 8, 13, 40])
def test_ids_equal_the_plain_loop_s_but_for_near_ties(num_requests: int) -> None:
    """Log-probabilities drift by no more than bf16 explains; ids part only where the best two are closer than that."""
    model = pack(random_model(small_config(), dtype=torch.bfloat16, device="cuda"))
    fast, plain = make(model, is_fast=True), make(model, is_fast=False)
    for seed in range(3):  # the first rounds make graphs wanted, the last one replays them
        requests = traffic(num_requests, seed=seed)
        got, expected = run(fast, requests), run(plain, requests)
    assert fast.runner.num_replayed > 0
    num_equal = num_compared = 0
    for request_id, entries in expected.items():
        for mine, theirs in zip(got[request_id], entries, strict=True):
            num_compared += 1
            if mine.token_id != theirs.token_id:
                gap = theirs.top[0][1] - theirs.top[1][1]
                assert gap <= 2 * MAX_DRIFT, f"{request_id}: {mine} instead of {theirs}"
                break
            assert abs(mine.logprob - theirs.logprob) <= MAX_DRIFT
            num_equal += 1
    assert num_equal >= 0.5 * num_compared


def test_a_seeded_answer_is_the_same_eagerly_and_captured() -> None:
    """Eagerly, then captured: the same request gets the same answer every time."""
    model = pack(random_model(small_config(), dtype=torch.bfloat16, device="cuda"))
    engine = make(model, is_fast=True)
    sampling = SamplingParams(max_tokens=12, temperature=0.1, top_k=50, repetition_penalty=1.05, seed=5)
    alone = [
        run_ids(engine, [EngineRequest(request_id=f"a{i}", prompt_ids=[9, 10, 11], sampling=sampling)])[f"a{i}"]
        for i in range(4)
    ]
    assert alone[1:] == alone[:-1]


def run_ids(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            found[event.request_id] += event.token_ids
    return found


def test_default_sampling_runs_through_captured_graphs() -> None:
    model = pack(random_model(small_config(), dtype=torch.bfloat16, device="cuda"))
    engine = make(model, is_fast=True)
    for turn in range(3):
        requests = [
            EngineRequest(
                request_id=f"{turn}-{i}",
                prompt_ids=[9 + i, 10, 11],
                sampling=SamplingParams(max_tokens=20, temperature=0.1, top_k=50, repetition_penalty=1.05, seed=i),
            )
            for i in range(11)
        ]
        found = run_ids(engine, requests)
        assert all(len(ids) == 20 for ids in found.values())
    assert engine.runner.num_replayed > 0
    assert engine.stats().num_blocks_used == 0
