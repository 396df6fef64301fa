"""The fast path on a GPU with weights, and K and V, in fp8: graphs, chunks and prefixes together, on a small model."""

import copy

import pytest
import torch

from lfm.model.pack import pack
from lfm.model.quantise import quantise
from tests.engine.models import random_model
from tests.gpu.test_fast_path import drift, forced_traffic, logprobs_of, make, small_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_requests", [1, 8, 40])
def test_rounding_activations_costs_no_more_than_rounding_weights(num_requests: int) -> None:
    """Against the same fp8 weights in fp32, the fast path may drift half as far again as those weights do from bf16."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9 or later")
    low = random_model(small_config(), dtype=torch.bfloat16, device="cuda")
    low.model.embed_tokens.weight.mul_(0.2)  # logits of the size that a trained model has
    wide = copy.deepcopy(low).float()
    rounded = pack(quantise(copy.deepcopy(wide)))
    fast = make(pack(quantise(low)), is_fast=True, kv_dtype="fp8")
    exact = make(pack(wide), is_fast=False)
    same_weights = make(rounded, is_fast=False, kv_dtype="fp8")
    for seed in range(2):  # these rounds make graphs wanted
        logprobs_of(fast, forced_traffic(num_requests, seed=seed))
    rounds = [forced_traffic(num_requests, seed=seed) for seed in range(2, 2 + max(1, 16 // num_requests))]
    mine, theirs, right = (
        [value for requests in rounds for value in logprobs_of(engine, requests)]
        for engine in (fast, same_weights, exact)
    )
    assert fast.runner.num_replayed > 0
    assert drift(mine, theirs) <= 1.5 * drift(theirs, right) + 1e-3
