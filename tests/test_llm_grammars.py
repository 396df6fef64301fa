"""Structured outputs of `lfm.LLM` on random weights: whatever the model would say, the answer keeps to its form."""

import json
import re
from collections.abc import Iterator

import jsonschema
import pytest
import torch

from lfm.chat.messages import Message
from lfm.config import EngineConfig
from lfm.errors import RequestError
from lfm.llm import LLM
from lfm.protocol import EngineRequest, GrammarSpec, SamplingParams

SCHEMAS: dict[str, dict[str, object]] = {
    "a person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "mail": {"type": "string", "format": "email", "maxLength": 20},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested arrays": {
        "type": "object",
        "properties": {
            "rows": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {"type": "array", "maxItems": 2, "items": {"type": "integer", "multipleOf": 5}},
            }
        },
        "required": ["rows"],
        "additionalProperties": False,
    },
    "a union": {
        "anyOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]},
            {"enum": ["x", 7, None, [1, {"y": 2}]]},
            {"type": "string", "pattern": "^[a-c]{2,4}$"},
        ]
    },
    "a reference": {
        "$defs": {
            "tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}, "leaf": {"type": "boolean"}}}
        },
        "$ref": "#/$defs/tree",
    },
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    torch.set_num_threads(1)
    with LLM(EngineConfig(model="random:tiny", device="cpu", max_model_len=1024, max_running=64)) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left_behind(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.has_work()
    assert llm.engine.stats().num_blocks_used == 0


def sampling(seed: int, **more: object) -> SamplingParams:
    given = {"max_tokens": 400, "temperature": 1.0, "seed": seed, "stop_token_ids": (7, 2)} | more
    return SamplingParams(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "way", [{}, {"temperature": 0.0}, {"top_k": 40, "repetition_penalty": 1.3}, {"logprobs": 1}], ids=str
)
def test_answers_validate_against_their_schemas_unless_cut(llm: LLM, way: dict[str, object]) -> None:
    schemas = [schema for schema in SCHEMAS.values() for _ in range(4)]
    grammars = [llm.grammar({"type": "json_schema", "json_schema": {"schema": schema}}) for schema in schemas]
    outputs = llm.generate(
        ["Answer in JSON. "] * len(schemas),
        sampling=[sampling(seed, **way) for seed in range(len(schemas))],
        grammar=grammars,
    )
    for schema, output in zip(schemas, outputs, strict=True):
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)
        else:
            assert output.finish_reason == "length"
            assert len(output.token_ids) == 400
    assert sum(output.finish_reason == "stop" for output in outputs) >= len(outputs) // 2


def test_a_cut_answer_says_length(llm: LLM) -> None:
    grammar = llm.grammar({"type": "json_schema", "json_schema": {"schema": SCHEMAS["a person"]}})
    output = llm.generate(["x"], sampling=sampling(1, max_tokens=9), grammar=grammar)[0]
    assert (output.finish_reason, len(output.token_ids), output.text) == ("length", 9, '{"name": ')


def test_other_forms(llm: LLM) -> None:
    messages = [Message(role="user", content="Is water wet?")]
    yes_or_no = llm.grammar({"type": "regex", "pattern": "yes|no"})
    assert llm.chat(messages, grammar=yes_or_no, sampling=sampling(1)).text in ("yes", "no")
    lark = llm.grammar({"type": "grammar", "grammar": 'start: "<" /[a-z]{1,8}/ ">"'})
    assert re.fullmatch(r"<[a-z]{1,8}>", llm.generate(["x"], grammar=lark, sampling=sampling(3, top_k=5))[0].text)
    stream = llm.stream("x", grammar=GrammarSpec(text='start: "one" | "two"'), sampling=sampling(1))
    assert "".join(delta.text for delta in stream) in ("one", "two")


def test_grammars_and_free_prompts_share_a_batch_and_disturb_no_ids(llm: LLM) -> None:
    grammar = llm.grammar({"type": "json_object"})
    plans = [sampling(seed, max_tokens=40, top_k=[0, 30][seed % 2], repetition_penalty=1.1) for seed in range(6)]
    prompts = [f"prompt {index}" for index in range(6)]
    mixed = llm.generate(prompts, sampling=plans, grammar=[grammar, None] * 3)
    alone = llm.generate(prompts, sampling=plans)
    constrained = llm.generate(prompts, sampling=plans, grammar=grammar)
    assert [output.token_ids for output in mixed[1::2]] == [output.token_ids for output in alone[1::2]]
    assert [output.token_ids for output in mixed[::2]] == [output.token_ids for output in constrained[::2]]


def test_logprobs_of_forced_tokens_are_the_models_own(llm: LLM) -> None:
    grammar = GrammarSpec(text='start: "forced text" /[a-z]/')
    output = llm.generate(["x"], sampling=sampling(1, logprobs=0), grammar=grammar)[0]
    prompt_ids = llm.tokenizer.encode_raw("x")
    free = EngineRequest(
        request_id="free",
        prompt_ids=[*prompt_ids, *output.token_ids],
        sampling=sampling(1, max_tokens=1, prompt_logprobs=0),
    )
    events = [event for events in llm.run([free]) for event in events]
    scores = next(event.prompt_logprobs for event in events if event.prompt_logprobs)[len(prompt_ids) :]
    expected = [score.logprob for score in scores if score is not None]
    assert [score.logprob for score in output.logprobs] == pytest.approx(expected, abs=1e-3)
    without = llm.generate(["x"], sampling=sampling(1), grammar=grammar)[0]
    assert without.token_ids == output.token_ids


@pytest.mark.parametrize(
    ("response_format", "what"),
    [
        ({"type": "text"}, "no grammar"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}, "type"),
        ({"type": "regex", "pattern": "("}, "pattern"),
    ],
    ids=["text", "a bad schema", "a bad pattern"],
)
def test_a_form_that_no_grammar_can_hold_is_refused(llm: LLM, response_format: dict[str, object], what: str) -> None:
    with pytest.raises(RequestError, match=what):
        llm.grammar(response_format)


@pytest.mark.slow
def test_a_grammar_that_the_library_refuses_is_refused_before_it_runs_here(llm: LLM) -> None:
    with pytest.raises(RequestError, match="cannot be used"):
        llm.generate(["x"], sampling=sampling(1), grammar=GrammarSpec(text="start: nothing"))


def test_one_grammar_for_each_prompt_or_one_for_all(llm: LLM) -> None:
    with pytest.raises(RequestError, match="1 grammars for 2 prompts"):
        llm.generate(["x", "y"], sampling=sampling(1), grammar=[GrammarSpec(text='start: "a"')])


def test_64_requests_with_schemas_of_their_own(llm: LLM) -> None:
    def schema(index: int) -> dict[str, object]:
        field = {"type": "integer", "minimum": index, "maximum": index + 5}
        return {
            "type": "object",
            "properties": {f"f{index}": field},
            "required": [f"f{index}"],
            "additionalProperties": False,
        }

    grammars = [llm.grammar({"type": "json_schema", "json_schema": {"schema": schema(i)}}) for i in range(64)]
    outputs = llm.generate(["x"] * 64, sampling=[sampling(i) for i in range(64)], grammar=grammars)
    for index, output in enumerate(outputs):
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), schema(index))
