"""The messages between the processes: out comes what went in, and what cannot travel is refused where it starts."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.config import EngineConfig
from lfm.engine.wire import (
    MAX_REQUEST_FRAME_BYTES,
    Add,
    Events,
    Failed,
    Setup,
    client_frame_decoder,
    encode_adds,
    engine_frame_decoder,
    requests_of,
    setup_decoder,
    to_error_info,
    to_exception,
    to_failure,
    to_request_error,
)
from lfm.errors import (
    InternalError,
    LfmError,
    MachineError,
    ModelError,
    NotFoundError,
    OverloadedError,
    RequestError,
    UsageError,
)
from lfm.protocol import (
    MAX_GRAMMAR_BYTES,
    MAX_N,
    EngineRequest,
    EngineStats,
    ErrorInfo,
    GrammarSpec,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)

INT32 = st.integers(-(2**31), 2**31 - 1)


def decoded(frames: list[bytes]) -> list[EngineRequest]:
    messages = [client_frame_decoder.decode(frame) for frame in frames]
    return [request for message in messages if isinstance(message, Add) for request in requests_of(message)]


def a_request(name: str, prompt_ids: list[int], *, max_tokens: int = 1) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_ids=prompt_ids, sampling=SamplingParams(max_tokens=max_tokens))


@given(
    prompts=st.lists(st.lists(INT32), max_size=4),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.dictionaries(INT32, st.floats(-100, 100), max_size=4),
    tenant=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_requests_arrive_as_they_were_sent(
    prompts: list[list[int]], seed: int | None, logit_bias: dict[int, float], tenant: str
) -> None:
    sampling = SamplingParams(max_tokens=3, seed=seed, logit_bias=logit_bias, stop_token_ids=(7, 2), logprobs=0)
    requests = [
        EngineRequest(request_id=f"r-{i}", prompt_ids=prompt, sampling=sampling, tenant=tenant, priority=-i)
        for i, prompt in enumerate(prompts)
    ]
    assert decoded(encode_adds(requests)) == requests


def test_choices_share_one_prompt_on_the_wire_and_in_memory() -> None:
    prompt_ids = list(range(30_000))
    frames = encode_adds([a_request(f"a-{i}", prompt_ids) for i in range(128)] + [a_request("b", [1])])
    assert len(frames) == 2
    assert len(frames[0]) < 4 * 30_000 + 128 * 100
    requests = decoded(frames)
    assert requests[0].prompt_ids == prompt_ids
    assert requests[127].prompt_ids is requests[0].prompt_ids


def test_choices_share_one_grammar_on_the_wire_and_in_memory() -> None:
    prompt_ids = [1]
    long, other = GrammarSpec(text="x" * 100_000), GrammarSpec(text="y", trigger_id=10)
    requests = [
        msgspec.structs.replace(a_request(f"a-{i}", prompt_ids), grammar=grammar)
        for i, grammar in enumerate([long] * 20 + [other, None])
    ]
    frames = encode_adds(requests)
    assert len(frames) == 3
    assert sum(map(len, frames)) < 105_000
    arrived = decoded(frames)
    assert arrived == requests
    assert arrived[19].grammar is arrived[0].grammar


def test_the_largest_request_fits_into_a_frame() -> None:
    sampling = SamplingParams(
        max_tokens=1,
        logit_bias=dict.fromkeys(range(2**20, 2**20 + 1024), -99.9),
        banned_ids=tuple(range(2**20, 2**20 + 1024)),
    )
    grammar, prompt_ids = GrammarSpec(text="x" * MAX_GRAMMAR_BYTES), [0] * 2**20
    request = EngineRequest(request_id="a", prompt_ids=prompt_ids, sampling=sampling, grammar=grammar)
    frames = encode_adds([msgspec.structs.replace(request, request_id=f"a-{i}") for i in range(MAX_N)])
    assert len(frames) == 1


@pytest.mark.parametrize("token_id", [2**31, -(2**31) - 1, 10**30, "7", 1.0, None])
def test_a_token_id_that_is_no_int32_is_refused(token_id: object) -> None:
    with pytest.raises(RequestError, match="int32") as caught:
        encode_adds([a_request("a", [1, token_id])])  # type: ignore[list-item]
    assert caught.value.param == "prompt"


def test_a_prompt_beyond_the_frame_limit_is_refused() -> None:
    with pytest.raises(RequestError, match="4194304 tokens") as caught:
        encode_adds([a_request("a", [0] * (MAX_REQUEST_FRAME_BYTES // 4))])
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens="many"),  # type: ignore[arg-type]
        SamplingParams(max_tokens=1, seed=10**30),
        SamplingParams(max_tokens=1, logit_bias={"a": 1.0}),  # type: ignore[dict-item]
        SamplingParams(max_tokens=1, temperature=1j),  # type: ignore[arg-type]
    ],
)
def test_a_value_that_the_engine_could_not_read_is_refused_before_it_is_sent(sampling: SamplingParams) -> None:
    with pytest.raises(RequestError, match="wrong type or size"):
        encode_adds([EngineRequest(request_id="a", prompt_ids=[1], sampling=sampling)])


def test_a_lone_surrogate_is_refused_before_it_is_sent() -> None:
    with pytest.raises(RequestError):
        encode_adds([a_request("\ud800", [1])])


def test_events_arrive_as_they_were_sent() -> None:
    event = TokenEvent(
        request_id="a",
        token_ids=[5, 6],
        logprobs=[TokenLogprob(5, -0.5, [(5, -0.5), (9, float("-inf"))])],
        prompt_logprobs=[None, TokenLogprob(1, -2.0)],
        num_cached_tokens=0,
        finish_reason="error",
        error=ErrorInfo(message="no finite numbers", code="x", retry_after_s=1.5),
    )
    message = Events([event], EngineStats(steps=3, num_running=1))
    assert engine_frame_decoder.decode(msgspec.msgpack.encode(message)) == message


def test_the_setup_arrives_with_its_checked_config() -> None:
    setup = Setup(
        config=EngineConfig(model="random:tiny", max_model_len=64),
        factory="a:b",
        address="ipc:///x",
        heartbeat_path="/y",
        parent_pid=1,
        stuck_seconds=0.5,
        log_level=20,
    )
    line = msgspec.json.encode(setup)
    assert setup_decoder.decode(line) == setup
    with pytest.raises(UsageError, match="max-model-len"):
        setup_decoder.decode(line.replace(b'"max_model_len":64', b'"max_model_len":0'))


@pytest.mark.parametrize(
    "error",
    [
        RequestError("m", param="p", code="c"),
        NotFoundError("m", param="p", code="c"),
        OverloadedError("m", retry_after_s=2.5, code="c"),
    ],
)
def test_a_refusal_is_raised_as_itself(error: RequestError) -> None:
    copy = to_request_error(to_error_info(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)


def test_a_refusal_by_our_own_fault_is_an_internal_error() -> None:
    assert isinstance(to_request_error(ErrorInfo(message="m", status=500)), InternalError)


@pytest.mark.parametrize("kind", [UsageError, MachineError, ModelError, InternalError])
def test_an_error_that_ends_the_engine_keeps_its_class(kind: type[LfmError]) -> None:
    copy = to_exception(to_failure(kind("cause. fix.")))
    assert (type(copy), str(copy)) == (kind, "cause. fix.")


def test_an_unknown_error_becomes_one_line_of_ours() -> None:
    failure = to_failure(ZeroDivisionError("first line\nsecond line"))
    assert failure == Failed("InternalError", "ZeroDivisionError: first line")
    assert isinstance(to_exception(Failed("SystemExit", "x")), InternalError)
