"""docs/api.md says of every field what it means here."""

import re
from pathlib import Path

import pytest

from lfm.server.messages_input import MessagesRequest
from lfm.server.refusals import CHAT_RULES, MESSAGES_RULES, RESPONSES_RULES, FieldRules
from lfm.server.responses_input import ResponsesRequest
from lfm.server.schemas import ChatRequest, SamplingRequest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
SAID_TOGETHER = (
    "guided_",
    "prompt_cache_",
    "reasoning",
)  # "vLLM's guided_...", "the cache fields", the parts of reasoning


@pytest.mark.parametrize(
    ("request_type", "rules"),
    [(ChatRequest, CHAT_RULES), (ResponsesRequest, RESPONSES_RULES), (MessagesRequest, MESSAGES_RULES)],
    ids=["chat", "responses", "messages"],
)
def test_every_field_is_on_the_page(request_type: type[SamplingRequest], rules: FieldRules) -> None:
    fields = {*request_type.model_fields, *rules.refused, *rules.without_effect}
    named = {name.rpartition(".")[2] for name in fields if not name.startswith(SAID_TOGETHER)}
    missing = {name for name in named if not re.search(rf"\b{re.escape(name)}\b", PAGE)}
    assert not missing
