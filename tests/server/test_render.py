"""POST .../render: what the engine would be given, by the same checks, with nothing generated."""

from typing import Any

import pytest

from tests.server.fakes import CHAT_PATH, MODEL, AppClient, chat_body

USER = {"role": "user", "content": "Hi"}
BODIES: dict[str, dict[str, Any]] = {
    CHAT_PATH: {"messages": [USER]},
    "/v1/completions": {"prompt": ["a", "<|im_end|>b"]},
    "/v1/responses": {"input": "Hi", "instructions": "Be brief.", "store": False},
    "/v1/messages": {"messages": [USER], "system": "Be brief.", "max_tokens": 5},
}


@pytest.fixture
def client() -> AppClient:
    return AppClient()


@pytest.mark.parametrize("path", BODIES)
def test_the_prompts_are_those_that_the_engine_gets(client: AppClient, path: str) -> None:
    body = {"model": MODEL, **BODIES[path], "temperature": 0.5, "seed": 5, "logit_bias": {"20": 1}}
    rendered = client.post(f"{path}/render", body)
    assert rendered.status_code == 200
    assert client.backend.requests == []
    assert client.post(path, body).status_code == 200
    answer = rendered.json()
    assert [prompt["token_ids"] for prompt in answer["prompts"]] == [r.prompt_ids for r in client.backend.requests]
    for prompt in answer["prompts"]:
        assert prompt["num_tokens"] == len(prompt["token_ids"])
        assert client.post("/detokenize", {"tokens": prompt["token_ids"]}).json()["prompt"] == prompt["text"]
    sampling = client.backend.requests[0].sampling
    assert answer["sampling"]["temperature"] == 0.5 == sampling.temperature
    assert answer["sampling"]["seed"] == 5
    assert answer["sampling"]["logit_bias"] == {"20": 1.0}
    assert answer["sampling"]["max_tokens"] == sampling.max_tokens
    assert set(answer["sampling"]) == set(sampling.__struct_fields__)


def test_a_chat_prompt_is_shown_with_its_control_tokens(client: AppClient) -> None:
    answer = client.post(f"{CHAT_PATH}/render", chat_body(n=3, stop="x", reasoning_effort="low", stream=True)).json()
    (prompt,) = answer["prompts"]
    assert prompt["text"] == "<|startoftext|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (answer["object"], answer["n"], answer["stop"]) == ("rendered_prompt", 3, ["x"])
    assert answer["sampling"]["seed"] is None  # each real request draws its own
    assert answer["warnings"][0]["message"].startswith("reasoning_effort has no effect")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "wizard", "content": ""}]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "no name"}}]}),
        ("temperature", {"temperature": 3}),
        ("max_completion_tokens", {"max_completion_tokens": 10**7}),
        ("messages", {"messages": [{"role": "user", "content": "a" * 5000}]}),
        ("n", {"n": 0}),
        ("stop[0]", {"stop": ""}),
        ("logit_bias", {"logit_bias": {"100000": 1}}),
    ],
)
def test_what_the_real_request_refuses_is_refused(client: AppClient, param: str, fields: dict[str, Any]) -> None:
    real, rendered = (client.post(f"{CHAT_PATH}{suffix}", chat_body(**fields)) for suffix in ("", "/render"))
    assert real.status_code == rendered.status_code == 400
    assert real.json() == rendered.json()
    assert rendered.json()["error"]["param"] == param


def test_an_error_of_messages_render_is_in_anthropics_form(client: AppClient) -> None:
    assert client.post("/v1/messages/render", {"model": MODEL}).json()["type"] == "error"
