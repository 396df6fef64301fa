"""Every field that the official clients can send has an outcome: honoured, refused by name, or told to be idle.

The lists come from the clients' own types, so a field of a newer client fails here until somebody decides.
"""

import importlib

import pytest

from lfm.server.messages_input import MessagesRequest
from lfm.server.refusals import CHAT_RULES, MESSAGES_RULES, RESPONSES_RULES, FieldRules
from lfm.server.responses_input import ResponsesRequest
from lfm.server.schemas import ChatRequest, SamplingRequest

# Fields that ask for nothing of a server like this one, each with its reason.
LABELS = {"user", "metadata", "safety_identifier", "user_profile_id", "workspace_id"}  # for somebody's records
HINTS = {"prompt_cache_key", "cache_control"}  # every prefix is cached, and there is one server to route to
OF_TOOLS = {"max_tool_calls"}  # of tools that the vendor runs
OF_OTHERS = {"background_options", "image", "access_programs"}  # of background jobs, images and programs not here
PASSED = LABELS | HINTS | OF_TOOLS | OF_OTHERS | {"stream_options"}  # include_obfuscation only adds padding

CLIENTS: list[tuple[str, str, type[SamplingRequest], FieldRules]] = [
    ("openai.types.chat.completion_create_params", "CompletionCreateParamsBase", ChatRequest, CHAT_RULES),
    ("together.types.chat.completion_create_params", "CompletionCreateParamsBase", ChatRequest, CHAT_RULES),
    ("openai.types.responses.response_create_params", "ResponseCreateParamsBase", ResponsesRequest, RESPONSES_RULES),
    ("anthropic.types.message_create_params", "MessageCreateParamsBase", MessagesRequest, MESSAGES_RULES),
]


pytestmark = pytest.mark.slow  # the clients are large


@pytest.mark.parametrize(("module", "name", "request_type", "rules"), CLIENTS, ids=[c[0] for c in CLIENTS])
def test_every_field_has_an_outcome(
    module: str, name: str, request_type: type[SamplingRequest], rules: FieldRules
) -> None:
    pytest.importorskip(module.partition(".")[0])
    sent = set(getattr(importlib.import_module(module), name).__annotations__)
    assert {"model", "tools"} <= sent
    ruled = {path.partition(".")[0].removesuffix("[]") for path in (*rules.refused, *rules.without_effect)}
    undecided = sent - set(request_type.model_fields) - ruled - PASSED
    assert not undecided
