"""A small model's token on a CPU costs calls, not arithmetic: their number is kept here, since time cannot be."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lfm.config import ModelConfig
from lfm.engine.build import assemble_engine
from lfm.model.ops import CPU, REFERENCE, Ops
from lfm.model.pack import pack, store_by_columns
from lfm.protocol import SamplingParams
from tests.engine.models import ATTENTION, CONV, make_plan, make_request, random_model, tiny_config

# The built-in model's layers: attention at 2 and 6, the first two dense.
LAYERS = tuple(ATTENTION if index in (2, 6) else CONV for index in range(8))
# One decode step, sampling included, counted with torch 2.13 (other versions split some calls), and some room.
MOST_CALLS = {"greedy": 545, "random": 660}
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.3, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05, "seed": 1},
}


class CallCounter(TorchDispatchMode):
    """Counts every torch operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def config() -> ModelConfig:
    return replace(tiny_config(LAYERS), num_dense_layers=2)


def calls_of_a_decode_step(ops: Ops, name: str) -> Counter[str]:
    model = store_by_columns(pack(random_model(config(), dtype=torch.float32)))
    plan = make_plan(dtype="float32", block_size=16)
    engine = assemble_engine(model, plan, num_ids=model.config.vocab_size, ops=ops)
    engine.add(make_request("1", list(range(8, 28)), SamplingParams(max_tokens=20, **SAMPLINGS[name])))
    for _ in range(4):
        engine.step()
    with CallCounter() as counter:
        engine.step()
    return counter.calls


def test_a_decode_step_makes_few_calls() -> None:
    for name, most in MOST_CALLS.items():
        calls = calls_of_a_decode_step(CPU, name)
        assert calls.total() <= most, f"{name}: {calls.most_common(20)}"
        assert calls.total() < 0.7 * calls_of_a_decode_step(REFERENCE, name).total()


def test_no_step_indexes_with_tensors_in_a_layer() -> None:
    """`x[ids]` costs 20 us where `index_select` costs 5."""
    calls = calls_of_a_decode_step(CPU, "greedy")
    assert calls["aten.index.Tensor"] < len(LAYERS)
