"""Grammars on the fast path of a GPU: steps with masks are replayed from graphs, and outputs keep to their grammars."""

import re

import pytest
import torch

from lfm.chat.tokenizer import Tokenizer
from lfm.config import EnginePlan
from lfm.engine.build import assemble_engine
from lfm.engine.constraint import NEVER
from lfm.engine.engine import Engine
from lfm.engine.grammar_masks import token_table
from lfm.model.ops import FAST
from lfm.model.pack import pack
from lfm.protocol import EngineRequest, GrammarSpec, SamplingParams
from tests.engine.models import random_model
from tests.gpu.test_fast_path import VOCAB, small_config

pytestmark = pytest.mark.gpu

TOKENIZER = Tokenizer.byte_level(small_config())
EOS, TRIGGER = TOKENIZER.special.im_end, TOKENIZER.special.tool_call_start
RECORD = r'\{"number": [0-9]{3,6}, "word": "[a-z]{2,9}"\}'


def make() -> Engine:
    model = random_model(small_config(), dtype=torch.bfloat16, device="cuda")
    model.model.embed_tokens.weight.mul_(0.2)
    plan = EnginePlan(
        device="cuda:0", dtype="bfloat16", max_model_len=1024, max_running=48, step_tokens=256,
        step_tokens_decoding=128, block_size=64, num_blocks=256, memory_fraction=0.9, max_queue=64, plain_loop=False,
        prefix_caching=True, seed=0,
    )  # fmt: skip
    engine = assemble_engine(
        pack(model),
        plan,
        num_ids=TOKENIZER.num_ids,
        ops=FAST,
        make_table=lambda: token_table(TOKENIZER, vocab_size=VOCAB),
    )
    engine.runner.cache.fill(float("nan"))
    return engine


def traffic(turn: int, count: int) -> tuple[list[EngineRequest], dict[str, str]]:
    """Requests and the patterns of their texts: records, calls after a trigger, free text."""
    requests, patterns = [], {}
    for index in range(count):
        name = f"{turn}-{index}"
        sampling = {"temperature": [0.0, 0.8][turn % 2], "top_k": 50 * (turn % 2), "repetition_penalty": 1.05}
        grammar = None
        if index % 3 == 0:
            grammar, patterns[name] = GrammarSpec(text=f"start: /{RECORD}/"), RECORD
        elif index % 3 == 1:
            text = f'start: <[{TRIGGER}]> "[call(" /[0-9]{{1,9}}/ ")]"'
            grammar, patterns[name] = GrammarSpec(text=text, trigger_id=TRIGGER), "a call, if any"
        params = SamplingParams(max_tokens=80, seed=index, stop_token_ids=(EOS,), **sampling)  # type: ignore[arg-type]
        prompt = [8 + (turn * 7 + index * 13 + i) % 200 for i in range(5 + index % 40)]
        requests.append(EngineRequest(request_id=name, prompt_ids=prompt, sampling=params, grammar=grammar))
    return requests, patterns


@pytest.mark.parametrize("count", [1, 6, 40])
@pytest.mark.parametrize("min_chunk", [2, NEVER], ids=["chunks", "one by one"])
def test_outputs_keep_to_their_grammars_while_steps_are_replayed(count: int, min_chunk: int) -> None:
    engine = make()
    engine.grammars.min_chunk = min_chunk
    for turn in range(4):
        requests, patterns = traffic(turn, count)
        ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for request in requests:
            engine.add(request)
        while engine.has_work():
            for event in engine.step():
                assert event.error is None
                ids[event.request_id] += event.token_ids
            engine.scheduler.check()
        for name, pattern in patterns.items():
            found = ids[name]
            if pattern == RECORD:
                assert found[-1] == EOS
                assert re.fullmatch(pattern, TOKENIZER.decode(found))
            elif TRIGGER in found:
                call = TOKENIZER.decode(found[found.index(TRIGGER) :])
                assert "[call(".startswith(call[:6])
                assert found[-1] != EOS or re.fullmatch(r"\[call\([0-9]{1,9}\)\]", call)
    graphs = engine.runner._graphs
    assert graphs is not None
    assert engine.runner.num_replayed > 0
    assert any(flags.mask for graph in graphs._graphs.values() for flags in graph.samples)
