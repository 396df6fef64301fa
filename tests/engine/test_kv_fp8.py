"""An engine whose K and V are in fp8 against a full recompute that rounds K and V the same way, in float64."""

from dataclasses import replace

import pytest
from torch import Tensor

from lfm.kernels.attention import qkv_ref
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.fp8 import FP8
from lfm.kernels.kv_fp8 import dequantise_kv, quantise_kv
from lfm.kernels.weights import Linear, Norm, Rope
from lfm.model.ops import PACKED
from lfm.model.pack import pack
from lfm.model.quantise import quantise
from lfm.protocol import SamplingParams
from tests.engine.models import (
    ATTENTION,
    CONV,
    EOS,
    make_engine,
    make_plan,
    make_request,
    naive_loop,
    random_model,
    run_all,
    tiny_config,
)

PROMPTS = [[8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [8, 9, 10, 11, 12, 13, 14, 15, 30, 31], list(range(8, 33))]


def rounded_qkv(
    h_TD: Tensor, norm: Norm, qkv: Linear, q_norm: Norm, k_norm: Norm, rope: Rope, batch: ForwardBatch,
    k_NGBK: Tensor, v_NGBK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As without a cache, but K and V are what a cache in fp8 gives back."""
    q_THK, k_TGK, v_TGK = qkv_ref(h_TD, norm, qkv, q_norm, k_norm, rope, batch, k_NGBK, v_NGBK)
    return q_THK, *(dequantise_kv(*quantise_kv(x), x.dtype) for x in (k_TGK, v_TGK))  # type: ignore[return-value]


ROUNDED = replace(PACKED, qkv=rounded_qkv)


@pytest.mark.parametrize("layers", [(CONV, ATTENTION, CONV), (ATTENTION, ATTENTION), (CONV, CONV)])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(4, 32), (5, 9), (1, 50)])
def test_ids_equal_a_recompute_with_rounded_keys_and_values(
    layers: tuple[str, ...], quantised: bool, block_size: int, num_blocks: int
) -> None:
    """Chunks, prefix hits, preemption (9 blocks of 5) and decode together; with weights in fp8 too."""
    model = random_model(tiny_config(layers), seed=3)
    if quantised:
        model = pack(quantise(model))
    plan = make_plan(block_size=block_size, num_blocks=num_blocks, kv_dtype="fp8")
    engine = make_engine(model, plan, overlap=True)
    assert all(k.dtype == FP8 for k in engine.runner.cache.k)
    sampling = SamplingParams(max_tokens=8, seed=1, temperature=0.7, stop_token_ids=(EOS,))
    for _ in range(2):  # the second time most of the prompts is cached
        outputs = run_all(engine, [make_request(str(i), prompt, sampling) for i, prompt in enumerate(PROMPTS)])
        for i, prompt in enumerate(PROMPTS):
            assert outputs[str(i)] == naive_loop(model, prompt, sampling, ROUNDED)


def test_rounding_is_seen_by_the_recompute() -> None:
    """Else the test above would hold for any cache: without rounding some id is another."""
    model = random_model(tiny_config((ATTENTION, ATTENTION)), seed=3)
    sampling = SamplingParams(max_tokens=30, seed=1, temperature=1.5)
    prompts = [[8 + i, 9, 10] for i in range(12)]
    exact = [naive_loop(model, prompt, sampling) for prompt in prompts]
    assert exact != [naive_loop(model, prompt, sampling, ROUNDED) for prompt in prompts]
