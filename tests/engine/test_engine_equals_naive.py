"""The engine against a full-recompute loop, in float64, under random traffic; every pool starts filled with NaN."""

from dataclasses import dataclass, field, replace
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm.config import EnginePlan
from lfm.engine.engine import Engine
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import CPU, REFERENCE
from lfm.protocol import SamplingParams, TokenEvent
from tests.engine.models import (
    ATTENTION,
    CONV,
    DEVICES,
    EOS,
    NUM_IDS,
    make_engine,
    make_plan,
    make_request,
    naive_loop,
    random_model,
    run_all,
    tiny_config,
)

MIXES = {
    "hybrid": tiny_config(),
    "window longer than a block": tiny_config((CONV, ATTENTION, CONV), window=7),
    "attention first": tiny_config((ATTENTION, CONV), window=2),
    "conv only": tiny_config((CONV, CONV), window=4),
    "attention only": tiny_config((ATTENTION, ATTENTION)),
}
GREEDY = {"temperature": 0.0}
SAMPLINGS = [
    GREEDY,
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.05},
    {"temperature": 1.2, "top_p": 0.8, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 0.9, "min_p": 0.05, "logit_bias": {5: 3.0, 6: -4.0}, "min_tokens": 3},
]


@cache
def model_of(mix: str, device: str = "cpu") -> Lfm2:
    return random_model(MIXES[mix], seed=sum(map(ord, mix)), device=device)


@cache
def expected_ids(mix: str, prompt: tuple[int, ...], index: int, max_tokens: int, seed: int) -> tuple[int, ...]:
    return tuple(naive_loop(model_of(mix), list(prompt), sampling_of(index, max_tokens, seed)))


def sampling_of(index: int, max_tokens: int, seed: int) -> SamplingParams:
    settings_ = dict(SAMPLINGS[index])
    settings_["min_tokens"] = min(settings_.get("min_tokens", 0), max_tokens)
    return SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=(EOS,), **settings_)


@dataclass
class Arrival:
    """A request with n choices that arrives after some steps; `abort_after` counts steps from its arrival."""

    step: int
    prompt: tuple[int, ...]
    sampling: int
    max_tokens: int
    seed: int
    n: int
    tenant: str
    abort_after: int | None


@dataclass
class Outcome:
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def receive(self, event: TokenEvent) -> None:
        assert self.finish_reason is None, "an event after the terminal one"
        self.ids += event.token_ids
        self.finish_reason = event.finish_reason


def arrivals(max_model_len: int) -> st.SearchStrategy[list[Arrival]]:
    stems = [(), (9, 10, 11, 12), (9, 10, 11, 12, 13, 14, 15, 16, 17)]
    prompts = st.builds(
        lambda stem, rest: stem + tuple(rest),
        st.sampled_from(stems),
        st.lists(st.integers(8, NUM_IDS - 1), min_size=1, max_size=10),
    )
    return st.lists(
        st.builds(
            Arrival,
            step=st.integers(0, 12),
            prompt=prompts,
            sampling=st.integers(0, len(SAMPLINGS) - 1),
            max_tokens=st.integers(1, 12),
            seed=st.integers(0, 3),
            n=st.sampled_from([1, 1, 2, 3]),
            tenant=st.sampled_from(["", "other"]),
            abort_after=st.sampled_from([None, None, None, 0, 1, 3, 6]),
        ),
        min_size=1,
        max_size=6,
    )


plans = st.builds(
    make_plan,
    block_size=st.sampled_from([1, 2, 3, 4, 5, 8]),
    max_running=st.integers(1, 5),
    step_tokens=st.integers(1, 20),
    step_tokens_decoding=st.integers(1, 20),
    num_blocks=st.just(32),
    prefix_caching=st.sampled_from([True, True, True, False]),
)


def shrink_pool(plan: EnginePlan, num_tokens: int) -> EnginePlan:
    """The same plan with room for hardly more than the longest request, so that sequences preempt each other."""
    return replace(plan, num_blocks=-(-num_tokens // plan.block_size) + 1, max_model_len=64)


def drive(engine: Engine, traffic: list[Arrival]) -> dict[str, Outcome]:
    """Run the traffic to its end; checks the pool's balance after every step."""
    outcomes: dict[str, Outcome] = {}
    aborts: dict[int, list[str]] = {}
    pending = sorted(traffic, key=lambda arrival: arrival.step)
    step = 0
    while pending or engine.has_work():
        while pending and pending[0].step <= step:
            arrival = pending.pop(0)
            for choice in range(arrival.n):
                request_id = f"{len(outcomes)}"
                outcomes[request_id] = Outcome()
                sampling = sampling_of(arrival.sampling, arrival.max_tokens, arrival.seed + choice)
                engine.add(make_request(request_id, list(arrival.prompt), sampling, tenant=arrival.tenant))
                if arrival.abort_after is not None:
                    aborts.setdefault(step + arrival.abort_after, []).append(request_id)
        for request_id in aborts.pop(step, []):
            if outcomes[request_id].finish_reason is None:
                engine.abort(request_id)
        for event in engine.step():
            outcomes[event.request_id].receive(event)
        engine.scheduler.check()
        step += 1
        assert step < 5000, "no progress"
    assert engine.scheduler.pool.num_used == 0
    return outcomes


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    mix=st.sampled_from(sorted(MIXES)),
    plan=plans,
    traffic=arrivals(64),
    overlap=st.booleans(),
    is_tight=st.booleans(),
    has_cpu_ops=st.booleans(),
)
def test_ids_equal_a_full_recompute_under_random_traffic(
    device: str,
    mix: str,
    plan: EnginePlan,
    traffic: list[Arrival],
    overlap: bool,
    is_tight: bool,
    has_cpu_ops: bool,
) -> None:
    if is_tight:
        plan = shrink_pool(plan, max(len(arrival.prompt) + arrival.max_tokens for arrival in traffic))
    ops = CPU if has_cpu_ops and device == "cpu" else REFERENCE
    outcomes = drive(make_engine(model_of(mix, device), plan, overlap=overlap, ops=ops), traffic)
    ids = iter(outcomes.values())
    for arrival in sorted(traffic, key=lambda arrival: arrival.step):
        for choice in range(arrival.n):
            outcome, seed = next(ids), arrival.seed + choice
            expected = expected_ids(mix, arrival.prompt, arrival.sampling, arrival.max_tokens, seed)
            if outcome.finish_reason == "abort":
                assert arrival.abort_after is not None
                assert tuple(outcome.ids) == expected[: len(outcome.ids)]
            else:
                assert tuple(outcome.ids) == expected
                assert outcome.finish_reason == ("stop" if expected[-1] == EOS else "length")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mix", sorted(MIXES))
class TestNamedCases:
    def check(self, engine: Engine, mix: str, prompts: list[list[int]], max_tokens: int = 9) -> None:
        model = model_of(mix)
        sampling = SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.7, stop_token_ids=(EOS,))
        outputs = run_all(engine, [make_request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)])
        for request_id, prompt in enumerate(prompts):
            assert outputs[str(request_id)] == naive_loop(model, prompt, sampling)

    @pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
    def test_prompts_around_the_block_size(self, device: str, mix: str, overlap: bool, length: int) -> None:
        self.check(make_engine(model_of(mix, device), make_plan(), overlap=overlap), mix, [list(range(8, 8 + length))])

    @pytest.mark.parametrize("num_blocks_hit", [1, 2, 3])
    def test_a_hit_of_exactly_k_blocks_changes_no_token(
        self, device: str, mix: str, overlap: bool, num_blocks_hit: int
    ) -> None:
        engine = make_engine(model_of(mix, device), make_plan(), overlap=overlap)
        prompt = [8 + (3 * i) % 20 for i in range(4 * num_blocks_hit + 1)]
        self.check(engine, mix, [prompt])
        before = engine.stats().cached_prompt_tokens
        self.check(engine, mix, [prompt])
        assert engine.stats().cached_prompt_tokens - before == 4 * num_blocks_hit

    def test_a_prompt_of_whole_blocks_computes_its_last_block(self, device: str, mix: str, overlap: bool) -> None:
        engine = make_engine(model_of(mix, device), make_plan(), overlap=overlap)
        prompt = list(range(8, 16))
        self.check(engine, mix, [prompt, prompt])
        assert engine.stats().cached_prompt_tokens == 4

    def test_preemption_changes_no_token(self, device: str, mix: str, overlap: bool) -> None:
        plan = make_plan(num_blocks=7, max_running=4)
        engine = make_engine(model_of(mix, device), plan, overlap=overlap)
        self.check(engine, mix, [[8 + i, 9, 10 + i] for i in range(4)], max_tokens=20)
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_another_tenant_computes_its_own_blocks(overlap: bool) -> None:
    engine = make_engine(model_of("hybrid"), make_plan(), overlap=overlap)
    sampling = SamplingParams(max_tokens=4, temperature=0.0, seed=0)
    prompt = list(range(8, 20))
    first = run_all(engine, [make_request("a", prompt, sampling, tenant="a")])
    second = run_all(engine, [make_request("b", prompt, sampling, tenant="b")])
    assert first["a"] == second["b"]
    assert engine.stats().cached_prompt_tokens == 0


def test_a_whole_conversation_is_cached_block_by_block() -> None:
    """The next turn's prompt begins with the last turn's prompt and answer."""
    engine = make_engine(model_of("hybrid"), make_plan(), overlap=True)
    sampling = SamplingParams(max_tokens=10, temperature=0.0, seed=0)
    prompt = list(range(8, 18))
    answer = run_all(engine, [make_request("1", prompt, sampling)])["1"]
    next_turn = [*prompt, *answer, 30, 31]
    outputs = run_all(engine, [make_request("2", next_turn, sampling)])
    assert outputs["2"] == naive_loop(model_of("hybrid"), next_turn, sampling)
    assert engine.stats().cached_prompt_tokens == (len(prompt) + len(answer) - 1) // 4 * 4
