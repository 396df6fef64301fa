"""The fast path on a GPU (fused kernels, CUDA graphs, overlap) against the plain loop, in bf16 on a small model."""

import copy
import random

import pytest
import torch

from lfm.config import EnginePlan, KvDtype, ModelConfig
from lfm.engine.build import assemble_engine
from lfm.engine.engine import Engine
from lfm.kernels import moe
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import FAST, REFERENCE
from lfm.model.pack import pack
from lfm.protocol import EngineRequest, SamplingParams
from tests.engine.models import random_model

pytestmark = pytest.mark.gpu

CONV, ATTENTION = "conv", "full_attention"
VOCAB = 1024


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


def make(
    model: Lfm2, *, is_fast: bool, block_size: int = 64, kv_dtype: KvDtype = "auto", step_tokens: int = 256
) -> Engine:
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    plan = EnginePlan(
        device="cuda:0", dtype=dtype, max_model_len=1024, max_running=48, step_tokens=step_tokens,
        step_tokens_decoding=step_tokens if step_tokens > 256 else 128, block_size=block_size,
        num_blocks=16384 // block_size, memory_fraction=0.9, max_queue=64, plain_loop=not is_fast,
        prefix_caching=True, seed=0, kv_dtype=kv_dtype,
    )  # fmt: skip
    engine = assemble_engine(model, plan, num_ids=VOCAB, ops=FAST if is_fast else REFERENCE)
    engine.runner.cache.fill(float("nan"))
    return engine


def models() -> tuple[Lfm2, Lfm2]:
    """The same weights in bf16, and widened to fp32."""
    model = random_model(small_config(), dtype=torch.bfloat16, device="cuda")
    model.model.embed_tokens.weight.mul_(0.2)  # logits of the size that a trained model has
    return pack(model), pack(copy.deepcopy(model).float())


def forced_traffic(num_requests: int, *, seed: int, prompt_logprobs: int | None = None) -> list[EngineRequest]:
    """Requests whose every answer is one token, by bias: all engines walk the same history."""
    chance = random.Random(seed)
    stem = [chance.randrange(8, VOCAB) for _ in range(150)]
    requests = []
    for index in range(num_requests):
        length = chance.choice([1, 2, 5, 63, 64, 65, 200])
        prompt = stem[: chance.choice([0, 64, 150])] + [chance.randrange(8, VOCAB) for _ in range(length)]
        sampling = SamplingParams(
            max_tokens=24,
            temperature=0.0,
            seed=0,
            logprobs=0,
            logit_bias={chance.randrange(8, VOCAB): 100.0},
            prompt_logprobs=prompt_logprobs,
        )
        requests.append(EngineRequest(request_id=f"{seed}-{index}", prompt_ids=prompt, sampling=sampling))
    return requests


def logprobs_of(engine: Engine, requests: list[EngineRequest]) -> list[float]:
    """Log-probabilities of every prompt token that was asked for and of every answer token, request by request."""
    found: dict[str, list[float]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            assert event.error is None
            entries = [*(event.prompt_logprobs or []), *event.logprobs]
            found[event.request_id] += [entry.logprob for entry in entries if entry is not None]
        engine.scheduler.check()
    return [value for values in found.values() for value in values]


def drift(got: list[float], exact: list[float]) -> float:
    assert len(got) == len(exact)
    return sum(abs(a - b) for a, b in zip(got, exact, strict=True)) / len(exact)


@pytest.mark.parametrize("num_requests", [1, 3, 8, 13, 40])
def test_captured_decoding_drifts_from_fp32_no_more_than_plain_bf16(num_requests: int) -> None:
    low, wide = models()
    fast, plain, exact = make(low, is_fast=True), make(low, is_fast=False), make(wide, is_fast=False)
    for seed in range(2):  # these rounds make graphs wanted
        logprobs_of(fast, forced_traffic(num_requests, seed=seed))
    rounds = [forced_traffic(num_requests, seed=seed) for seed in range(2, 2 + max(1, 16 // num_requests))]
    mine, theirs, right = (
        [value for requests in rounds for value in logprobs_of(engine, requests)] for engine in (fast, plain, exact)
    )
    assert fast.runner.num_replayed > 0
    assert drift(mine, right) <= 1.3 * drift(theirs, right) + 1e-3


def test_rows_that_share_a_prefix_are_attended_together_with_the_same_result() -> None:
    """40 agents behind 512 common tokens: 32 blocks that a captured step reads once for up to 16 rows."""
    low, wide = models()
    fast, plain, exact = (
        make(model, is_fast=is_fast, block_size=16) for model, is_fast in ((low, True), (low, False), (wide, False))
    )
    chance = random.Random(3)
    stem = [chance.randrange(8, VOCAB) for _ in range(512)]
    rounds = []
    for turn in range(4):
        rounds.append([])
        for index in range(40):
            prompt = stem + [chance.randrange(8, VOCAB) for _ in range(chance.choice([1, 3, 17]))]
            sampling = SamplingParams(max_tokens=16, temperature=0.0, seed=0, logprobs=0, logit_bias={8 + index: 100.0})
            rounds[-1].append(EngineRequest(request_id=f"{turn}-{index}", prompt_ids=prompt, sampling=sampling))
    mine, theirs, right = (
        [value for requests in rounds for value in logprobs_of(engine, requests)] for engine in (fast, plain, exact)
    )
    assert any(shape.has_shared for shape in fast.runner.captured_shapes)
    assert drift(mine, right) <= 1.3 * drift(theirs, right) + 1e-3


@pytest.mark.parametrize("num_requests", [1, 7, 40])
def test_replayed_chunks_drift_from_fp32_no_more_than_plain_bf16(num_requests: int) -> None:
    """The same lengths again: the first round captures the sizes that the second replays, in pools full of NaN."""
    low, wide = models()
    fast, plain, exact = make(low, is_fast=True), make(low, is_fast=False), make(wide, is_fast=False)
    for seed in range(2):
        logprobs_of(fast, forced_traffic(num_requests, seed=seed, prompt_logprobs=0))
    before = fast.runner.num_replayed_chunks
    rounds = [forced_traffic(num_requests, seed=seed, prompt_logprobs=seed) for seed in range(2, 4)]
    mine, theirs, right = (
        [value for requests in rounds for value in logprobs_of(engine, requests)] for engine in (fast, plain, exact)
    )
    assert fast.runner.num_replayed_chunks > before
    assert drift(mine, right) <= 1.3 * drift(theirs, right) + 1e-3


@pytest.mark.parametrize("has_chain", [False, True])
def test_a_full_step_is_replayed_and_drifts_no_more(has_chain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve prompts of 1,000 tokens: two full steps of 4,096, and 3,800 tokens that get no graph."""
    if has_chain:
        monkeypatch.setattr(moe, "MIN_CHAIN_TOKENS", 0)
    low, wide = models()
    fast, plain, exact = (
        make(model, is_fast=is_fast, step_tokens=4096) for model, is_fast in ((low, True), (low, False), (wide, False))
    )
    chance = random.Random(5)

    def prompts(turn: int) -> list[EngineRequest]:
        sampling = SamplingParams(max_tokens=2, temperature=0.0, seed=0, logprobs=0, logit_bias={9: 100.0})
        ids = [[chance.randrange(8, VOCAB) for _ in range(1000)] for _ in range(12)]
        return [EngineRequest(request_id=f"{turn}-{i}", prompt_ids=one, sampling=sampling) for i, one in enumerate(ids)]

    logprobs_of(fast, prompts(0))
    before, requests = fast.runner.num_replayed_chunks, prompts(1)
    mine, theirs, right = (logprobs_of(engine, requests) for engine in (fast, plain, exact))
    assert fast.runner.num_replayed_chunks >= before + 2
    assert drift(mine, right) <= 1.3 * drift(theirs, right) + 1e-3


@pytest.mark.parametrize("num_requests", [1, 5])
def test_chunks_drift_from_fp32_no_more_than_plain_bf16(num_requests: int) -> None:
    low, wide = models()
    requests = forced_traffic(num_requests, seed=9, prompt_logprobs=0)
    mine, theirs, right = (
        logprobs_of(make(model, is_fast=is_fast), requests)
        for model, is_fast in ((low, True), (low, False), (wide, False))
    )
    assert drift(mine, right) <= 1.3 * drift(theirs, right) + 1e-3


def test_a_seeded_answer_is_the_same_eagerly_and_captured() -> None:
    """Eagerly, then captured: the same request gets the same answer every time."""
    model, _ = models()
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
    model, _ = models()
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
