"""The engine with grammars against a full-recompute loop with masks; and what goes wrong costs one request."""

import threading
from collections import deque
from collections.abc import Callable
from functools import cache

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from lfm.config import EnginePlan
from lfm.engine import grammar_masks, grammars
from lfm.engine.constraint import NEVER
from lfm.engine.engine import Engine
from lfm.engine.grammar_library import TokenTable
from lfm.engine.grammar_masks import GrammarCache, GrammarMatcher, Masks, num_mask_words
from lfm.engine.sampler import sample
from lfm.engine.sampling_rows import RowStart, SamplingRows
from lfm.errors import RequestError
from lfm.model.full_forward import full_logits
from lfm.model.ops import PACKED
from lfm.protocol import EngineRequest, GrammarSpec, SamplingParams, TokenEvent
from tests.engine.models import DEVICES, EOS, NUM_IDS, VOCAB, make_engine, make_plan
from tests.engine.test_engine_equals_naive import GREEDY, MIXES, SAMPLINGS, Outcome, model_of, plans, shrink_pool

TRIGGER, OTHER_STOP = 5, 6
# Ids 8 and up: single characters, and pieces of several, so that one text can be written in different tokens.
TEXTS = [*"abcdef0123456789{}:,. ", "ab", "abc", "bc", "10", '{"', "a:"]
TOKENS = [b"<%d>" % i for i in range(8)] + [text.encode() for text in TEXTS]
GRAMMARS: dict[str, GrammarSpec | None] = {
    "none": None,
    "fields": GrammarSpec(text='start: "{" /[a-c]{1,4}/ ":" /[0-9]{1,3}/ "}"'),
    "forced runs": GrammarSpec(text='start: ("abcabc:" ("d" | "e"))+ "{10}abcabcabc"'),
    "a trigger": GrammarSpec(text=f'start: <[{TRIGGER}]> "abc{{" /[0-9]+/ "}}"', trigger_id=TRIGGER),
    "one text": GrammarSpec(text='start: "ab:10"'),
    "no text": GrammarSpec(text='start: ""'),
    "any letters": GrammarSpec(text="start: /[a-f]*/"),
}
WAYS = [*SAMPLINGS, {"temperature": 1.0, "logit_bias": {TRIGGER: 4.0}, "repetition_penalty": 1.2}]


def encode(text: str) -> list[int]:
    ids = []
    while text:
        token = max((one for one in TEXTS if text.startswith(one)), key=len)
        ids.append(8 + TEXTS.index(token))
        text = text[len(token) :]
    return ids


def spelt(ids: list[int]) -> str:
    return "".join(TEXTS[i - 8] for i in ids if i >= 8)


@cache
def table() -> TokenTable:
    tokens = TOKENS + [b""] * (VOCAB - len(TOKENS))
    return TokenTable(tokens, special_ids=range(8), stop_ids=[EOS, OTHER_STOP], encode=encode)


@cache
def compiled() -> GrammarCache:
    return GrammarCache(table)


def sampling_of(way: int, max_tokens: int, seed: int, **more: object) -> SamplingParams:
    given_ = {"stop_token_ids": (EOS,), **WAYS[way], **more}
    given_["min_tokens"] = min(int(given_.get("min_tokens", 0)), max_tokens)  # type: ignore[call-overload]
    return SamplingParams(max_tokens=max_tokens, seed=seed, **given_)  # type: ignore[arg-type]


def naive_loop(mix: str, prompt: list[int], sampling: SamplingParams, grammar: GrammarSpec | None) -> list[int]:
    """The oracle: recompute everything for every token, and sample it under the grammar's mask."""
    matcher = compiled().matcher(grammar) if grammar is not None else None
    stop_ids = {*sampling.stop_token_ids, *(matcher.stop_ids if matcher else ())}
    ids, forced = list(prompt), deque(matcher.take_forced() if matcher else ())
    while len(ids) - len(prompt) < sampling.max_tokens:
        if forced:
            ids.append(forced.popleft())
        else:
            ids.append(naive_sample(mix, ids, len(prompt), sampling, matcher))
            if matcher:
                matcher.accept(ids[-1])
        if ids[-1] in stop_ids:
            break
        if matcher and not forced:
            forced.extend(matcher.take_forced())
    return ids[len(prompt) :]


def naive_sample(
    mix: str, ids: list[int], num_prompt: int, sampling: SamplingParams, matcher: GrammarMatcher | None
) -> int:
    logits = full_logits(model_of(mix), [ids], PACKED)[0][-1:]
    rows = SamplingRows(1, VOCAB, num_ids=NUM_IDS, device=torch.device("cpu"))
    rows.start(RowStart(row=0, params=sampling, seed=sampling.seed or 0, ids=ids, num_prompt=num_prompt))
    if matcher is not None and matcher.needs_mask:
        mask = np.zeros((1, num_mask_words(VOCAB)), dtype=np.int32)
        matcher.fill(mask[0])
        rows.write_masks([0], torch.from_numpy(mask))
    zero, position = torch.tensor([0]), torch.tensor([len(ids)])
    return int(sample(rows, logits, row_R=zero, position_R=position, flags=rows.flags([0])).ids_R)


@cache
def expected_ids(mix: str, prompt: tuple[int, ...], way: int, max_tokens: int, seed: int, name: str) -> tuple[int, ...]:
    return tuple(naive_loop(mix, list(prompt), sampling_of(way, max_tokens, seed), GRAMMARS[name]))


class Arrival(msgspec.Struct, kw_only=True):
    """A request with n choices that comes after some steps; `abort_after` counts steps from then on."""

    step: int
    prompt: tuple[int, ...]
    way: int
    max_tokens: int
    seed: int
    n: int
    grammar: str
    abort_after: int | None
    logprobs: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 12),
        prompt=st.builds(
            lambda stem, rest: (*stem, *rest),
            st.sampled_from([(), (9, 10, 11, 12, 13, 14, 15, 16, 17)]),
            st.lists(st.integers(8, NUM_IDS - 1), min_size=1, max_size=8).map(tuple),
        ),
        way=st.integers(0, len(WAYS) - 1),
        max_tokens=st.integers(1, 15),
        seed=st.integers(0, 3),
        n=st.sampled_from([1, 1, 2, 3]),
        grammar=st.sampled_from(sorted(GRAMMARS)),
        abort_after=st.sampled_from([None, None, None, 0, 1, 3, 6]),
        logprobs=st.sampled_from([None, None, 0]),
    ),
    min_size=1,
    max_size=5,
)


def drive(engine: Engine, traffic: list[Arrival]) -> list[tuple[Arrival, int, Outcome]]:
    """Run the traffic to its end; checks the pool's balance after every step."""
    outcomes: dict[str, tuple[Arrival, int, Outcome]] = {}
    aborts: dict[int, list[str]] = {}
    pending = sorted(traffic, key=lambda arrival: arrival.step)
    step = 0
    while pending or engine.has_work():
        while pending and pending[0].step <= step:
            arrival = pending.pop(0)
            for choice in range(arrival.n):
                name = str(len(outcomes))
                outcomes[name] = (arrival, choice, Outcome())
                engine.add(
                    EngineRequest(
                        request_id=name,
                        prompt_ids=list(arrival.prompt),
                        sampling=sampling_of(
                            arrival.way, arrival.max_tokens, arrival.seed + choice, logprobs=arrival.logprobs
                        ),
                        grammar=GRAMMARS[arrival.grammar],
                    )
                )
                if arrival.abort_after is not None:
                    aborts.setdefault(step + arrival.abort_after, []).append(name)
        for name in aborts.pop(step, []):
            if outcomes[name][2].finish_reason is None:
                engine.abort(name)
        for event in engine.step():
            asked = outcomes[event.request_id][0].logprobs is not None
            assert len(event.logprobs) == (len(event.token_ids) if asked else 0)
            outcomes[event.request_id][2].receive(event)
        engine.scheduler.check()
        step += 1
        assert step < 20_000, "no progress"
    assert engine.scheduler.pool.num_used == 0
    return list(outcomes.values())


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    mix=st.sampled_from(sorted(MIXES)),
    plan=plans,
    traffic=arrivals,
    overlap=st.booleans(),
    is_tight=st.booleans(),
    min_chunk=st.sampled_from([None, 1, 3, NEVER]),
)
def test_ids_equal_a_full_recompute_with_masks_under_random_traffic(
    device: str,
    mix: str,
    plan: EnginePlan,
    traffic: list[Arrival],
    overlap: bool,
    is_tight: bool,
    min_chunk: int | None,
) -> None:
    """Whether forced ids are taken in chunks or sampled one by one changes no id, greedy or not."""
    if is_tight:
        plan = shrink_pool(plan, max(len(arrival.prompt) + arrival.max_tokens for arrival in traffic))
    engine = make_engine(model_of(mix, device), plan, overlap=overlap, make_table=table)
    if min_chunk is not None:
        engine.grammars.min_chunk = min_chunk
    for arrival, choice, outcome in drive(engine, traffic):
        expected = expected_ids(
            mix, arrival.prompt, arrival.way, arrival.max_tokens, arrival.seed + choice, arrival.grammar
        )
        if outcome.finish_reason == "abort":
            assert arrival.abort_after is not None
            assert tuple(outcome.ids) == expected[: len(outcome.ids)]
        else:
            assert tuple(outcome.ids) == expected
            has_ended = expected[-1] == EOS or (expected[-1] == OTHER_STOP and arrival.grammar != "none")
            assert outcome.finish_reason == ("stop" if has_ended else "length")


def engine_of(*, overlap: bool = False, make_table: Callable[[], TokenTable] = table, **plan: int) -> Engine:
    return make_engine(model_of("hybrid"), make_plan(**plan), overlap=overlap, make_table=make_table)


def request(name: str, grammar: GrammarSpec | None, *, max_tokens: int = 30, **sampling: object) -> EngineRequest:
    params = sampling_of(0, max_tokens, 1, **{**GREEDY, **sampling})
    return EngineRequest(request_id=name, prompt_ids=[9, 10, 11], sampling=params, grammar=grammar)


def run(engine: Engine, requests: list[EngineRequest]) -> dict[str, tuple[list[int], TokenEvent]]:
    """Ids and the terminal event of each request."""
    for one in requests:
        engine.add(one)
    ids: dict[str, list[int]] = {one.request_id: [] for one in requests}
    ends: dict[str, TokenEvent] = {}
    while engine.has_work():
        for event in engine.step():
            ids[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                ends[event.request_id] = event
        engine.scheduler.check()
    return {name: (found, ends[name]) for name, found in ids.items()}


@pytest.mark.parametrize("overlap", [False, True])
def test_forced_ids_save_steps(overlap: bool) -> None:
    counts = []
    for min_chunk in (NEVER, 2):
        engine = engine_of(overlap=overlap)
        engine.grammars.min_chunk = min_chunk
        (ids, end), *_ = run(engine, [request("a", GrammarSpec(text='start: ("a" | "b") "0123456789" "{}"'))]).values()
        assert end.finish_reason == "stop"
        assert spelt(ids)[1:] == "0123456789{}"
        counts.append(engine.stats().steps)
    assert counts[1] < counts[0] / 3


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("trigger_bias", [300.0, 85.0], ids=["at once", "later"])
def test_ids_after_a_trigger_are_masked_though_no_sequence_starts(trigger_bias: float, overlap: bool) -> None:
    """What the rows of a step need of the sampler is remembered from step to step; that once missed this change."""
    spec = GrammarSpec(text=f"start: <[{TRIGGER}]> /[a-f]{{3}}/", trigger_id=TRIGGER)
    bias = {encode("9")[0]: 100.0, TRIGGER: min(100.0, trigger_bias), EOS: 70.0}
    if trigger_bias > 100:
        del bias[encode("9")[0]]
    asked = request("a", spec, logit_bias=bias, frequency_penalty=2.0)
    (ids, end), *_ = run(engine_of(overlap=overlap), [asked]).values()
    called = ids[ids.index(TRIGGER) + 1 :]
    assert end.finish_reason == "stop"
    assert len(spelt(called)) == 3
    assert set(spelt(called)) <= set("abcdef")


def test_forced_ids_are_counted_as_output() -> None:
    engine = engine_of()
    (ids, _), *_ = run(engine, [request("a", GRAMMARS["one text"])]).values()
    assert engine.stats().generated_tokens == len(ids) == len(encode("ab:10")) + 1


@pytest.mark.parametrize("overlap", [False, True])
def test_forced_ids_fill_blocks_that_later_prompts_find(overlap: bool) -> None:
    engine = engine_of(overlap=overlap)
    spec = GrammarSpec(text='start: ("a" | "b") "0123456789:0123456789" ("c" | "d")')
    (ids, _), *_ = run(engine, [request("a", spec)]).values()
    again = EngineRequest(
        request_id="b", prompt_ids=[9, 10, 11, *ids[:-1], 12], sampling=sampling_of(0, 3, 1, **GREEDY)
    )
    (found, _), *_ = run(engine, [again]).values()
    assert engine.stats().cached_prompt_tokens >= 20
    assert found == naive_loop("hybrid", again.prompt_ids, again.sampling, None)


@pytest.mark.parametrize(("max_tokens", "text"), [(1, "a"), (3, "a01"), (11, "a0123456789")])
def test_max_tokens_cuts_forced_ids(max_tokens: int, text: str) -> None:
    engine = engine_of()
    spec = GrammarSpec(text='start: "a0123456789" ("a" | "b")')
    (ids, end), *_ = run(engine, [request("a", spec, max_tokens=max_tokens)]).values()
    assert end.finish_reason == "length"
    assert len(ids) <= max_tokens
    assert "a0123456789".startswith(spelt(ids))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("text", ["begin: /a/", "start: /(/", "nonsense"])
def test_a_grammar_that_is_none_is_a_bad_request_and_the_others_go_on(text: str, overlap: bool) -> None:
    engine = engine_of(overlap=overlap)
    bad, good = request("bad", GrammarSpec(text=text)), request("good", GRAMMARS["one text"])
    found = run(engine, [bad, good])
    ids, end = found["bad"]
    assert (ids, end.finish_reason) == ([], "error")
    assert end.error is not None
    assert (end.error.status, end.error.code) == (400, "invalid_grammar")
    assert spelt(found["good"][0]) == "ab:10"


@pytest.mark.parametrize(
    ("grammar", "what"),
    [
        (GrammarSpec(text=""), "0 bytes"),
        (GrammarSpec(text="x" * (4 * 2**20 + 1)), "4194305 bytes"),
        (GrammarSpec(text="\ud800"), "surrogate"),
        (GrammarSpec(text="start: /a/", trigger_id=NUM_IDS), "trigger_id=36"),
        (GrammarSpec(text="start: /a/", trigger_id=-1), "trigger_id=-1"),
    ],
    ids=["empty", "too long", "lone surrogate", "unknown trigger", "negative trigger"],
)
def test_a_grammar_out_of_bounds_is_refused(grammar: GrammarSpec, what: str) -> None:
    with pytest.raises(RequestError, match=what) as caught:
        engine_of().add(request("a", grammar))
    assert caught.value.param == "grammar"


def test_an_engine_without_a_tokenizer_refuses_grammars() -> None:
    engine = make_engine(model_of("hybrid"), make_plan(), overlap=False)
    with pytest.raises(RequestError, match="no tokenizer"):
        engine.add(request("a", GRAMMARS["one text"]))
    assert not engine.has_work()


@pytest.mark.parametrize("banned", [(40,), (-1,), tuple(range(1025))], ids=["too large", "negative", "too many"])
def test_banned_ids_out_of_bounds_are_refused(banned: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="banned_ids"):
        engine_of().add(request("a", None, banned_ids=banned))


@pytest.mark.parametrize("grammar", ["none", "any letters"])
def test_banned_ids_are_never_sampled(grammar: str) -> None:
    engine = engine_of()
    a, b, c = encode("a"), encode("b"), encode("c")
    bias = dict.fromkeys([*a, *b, *c], 100.0)
    banned = (*a, *b, *encode("ab"), *encode("abc"), *encode("bc"))
    for _ in range(2):  # the row's mask is the next sequence's no more
        requests = [
            request("banned", GRAMMARS[grammar], max_tokens=8, logit_bias=bias, banned_ids=banned),
            request("free", GRAMMARS[grammar], max_tokens=8, logit_bias=bias),
        ]
        found = run(engine, requests)
        assert found["banned"][0] == c * 8
        assert found["free"][0][0] in a + b + c
        found = run(engine, [request("after", None, max_tokens=8, logit_bias=dict.fromkeys(a, 100.0))])
        assert found["after"][0] == a * 8


def test_an_abort_ends_a_request_whose_grammar_is_being_compiled() -> None:
    gate = threading.Event()

    def slow_table() -> TokenTable:
        assert gate.wait(30)
        return table()

    engine = engine_of(make_table=slow_table)
    engine.add(request("a", GRAMMARS["one text"]))
    engine.add(request("b", GRAMMARS["one text"]))
    engine.add(request("free", None, max_tokens=3))
    events = [event for _ in range(8) for event in engine.step()]  # nothing of these two can start
    assert {event.request_id for event in events} == {"free"}
    engine.abort("a")
    assert [(event.request_id, event.finish_reason) for event in engine.step()] == [("a", "abort")]
    assert engine.has_work()
    gate.set()
    ids = []
    while engine.has_work():
        for event in engine.step():
            assert event.request_id == "b"
            ids += event.token_ids
    assert spelt(ids) == "ab:10"


def test_a_grammar_that_compiles_for_ever_costs_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "COMPILE_S", 2.0)
    gate, num_tried = threading.Event(), 0
    compile_grammar = grammar_masks.compile_grammar

    def hang(tokenizer: LLTokenizer, text: str) -> LLMatcher:
        nonlocal num_tried
        if text == "start: /x/":
            num_tried += 1
            assert gate.wait(60)
        return compile_grammar(tokenizer, text)

    monkeypatch.setattr(grammar_masks, "compile_grammar", hang)
    endless = GrammarSpec(text="start: /x/")
    found = run(
        engine_of(),
        [request(name, endless) for name in ("a", "b")] + [request(name, GRAMMARS["one text"]) for name in ("c", "d")],
    )
    gate.set()
    for name in ("a", "b"):
        _, end = found[name]
        assert end.error is not None
        assert end.error.code == "grammar_timeout"
    assert [spelt(found[name][0]) for name in ("c", "d")] == ["ab:10"] * 2
    assert num_tried == 1, "the second request of that grammar does not hang another thread"


class BrokenMatcher(GrammarMatcher):
    """The library fails at a certain call."""

    def __init__(self, inner: GrammarMatcher, *, at: str) -> None:
        super().__init__(inner._matcher, trigger_id=None, stop_ids=sorted(inner.stop_ids))
        self.at = at
        self.num_accepted = 0

    def accept(self, token_id: int) -> bool:
        self.num_accepted += 1
        if self.at == "accept" and self.num_accepted == 2:
            self.error = "as no library should"
        return super().accept(token_id)

    def fill(self, row: Masks, *, address: int | None = None) -> None:
        if self.at == "fill" and self.num_accepted == 2:
            self.error = "as no library should"
        if self.at == "hang" and self.num_accepted == 2:
            assert HANGING.wait(60)
        super().fill(row, address=address)


HANGING = threading.Event()


def break_matcher(engine: Engine, name: str, at: str) -> list[TokenEvent]:
    """Let the sequence's matcher fail as soon as it has one. Returns the events until then."""
    sequence = engine.scheduler._by_id[name]
    events = []
    while sequence.constraint is None:
        events += engine.step()
    sequence.constraint.matcher = BrokenMatcher(sequence.constraint.matcher, at=at)
    return events


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", ["accept", "fill", "hang"])
def test_a_library_that_fails_costs_its_own_request(at: str, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MASK_S", 1.0)
    HANGING.clear()
    engine = engine_of(overlap=overlap, max_running=4)
    spec = GrammarSpec(text="start: /[a-f]{40}/")
    engine.add(request("broken", spec, max_tokens=50))
    for index in range(3):
        engine.add(request(f"good{index}", spec, max_tokens=50))
    events = break_matcher(engine, "broken", at)
    ids: dict[str, list[int]] = {}
    ends: dict[str, TokenEvent] = {}
    while engine.has_work():
        events += engine.step()
        while events:
            event = events.pop(0)
            ids.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish_reason is not None:
                ends[event.request_id] = event
        engine.scheduler.check()
    HANGING.set()
    broken = ends.pop("broken")
    assert broken.finish_reason == "error"
    assert broken.error is not None
    assert broken.error.code == ("grammar_timeout" if at == "hang" else "grammar_error")
    assert broken.error.status == 500
    for name, end in ends.items():
        assert end.finish_reason == "stop"
        assert len(spelt(ids[name])) == 40
    assert len(ends) == 3


def test_a_sampler_that_strays_from_forced_ids_ends_in_error() -> None:
    engine = engine_of()
    engine.grammars.min_chunk = NEVER
    engine.add(request("a", GRAMMARS["one text"]))
    engine.step()
    while engine.scheduler._by_id["a"].constraint is None:
        engine.step()
    constraint = engine.scheduler._by_id["a"].constraint
    constraint._forced = deque([encode("b")[0], EOS])  # what comes is not what was awaited
    constraint.advance(encode("c")[0])
    assert constraint.error is not None
    engine.abort("a")
    while engine.has_work():
        engine.step()


@pytest.mark.parametrize("overlap", [False, True])
def test_64_requests_with_grammars_of_their_own(overlap: bool) -> None:
    engine = engine_of(overlap=overlap, max_running=16, num_blocks=128, step_tokens=64, step_tokens_decoding=64)
    specs = {f"{i}": GrammarSpec(text=f'start: "{i:04d}:" ("a" | "b" | "c")+ "{{{i}}}"') for i in range(64)}
    requests = [request(name, spec, max_tokens=60, temperature=1.0) for name, spec in specs.items()]
    found = run(engine, requests)
    for name, (ids, end) in found.items():
        assert spelt(ids).startswith(f"{int(name):04d}:")
        if end.finish_reason == "stop":
            assert spelt(ids).endswith(f"{{{name}}}")
        else:
            assert (end.finish_reason, len(ids)) == ("length", 60)


def test_a_sequence_that_is_preempted_keeps_its_place_in_its_grammar() -> None:
    plan = make_plan(num_blocks=9, max_running=4)
    engine = make_engine(model_of("hybrid"), plan, overlap=True, make_table=table)
    spec = GrammarSpec(text='start: (/[a-f]/ "0123456789")+')
    requests = [request(f"{i}", spec, max_tokens=24) for i in range(3)]
    found = run(engine, [replace_prompt(one, [9 + i, 10, 11]) for i, one in enumerate(requests)])
    assert engine.stats().preemptions > 0
    for i, (ids, _) in enumerate(found.values()):
        assert ids == naive_loop("hybrid", [9 + i, 10, 11], requests[i].sampling, spec)


def replace_prompt(one: EngineRequest, prompt_ids: list[int]) -> EngineRequest:
    return msgspec.structs.replace(one, prompt_ids=prompt_ids)
