"""The tokenizers that the tests of lfm.chat share; built once."""

from collections.abc import Sequence

import pytest

from lfm.chat.tokenizer import Tokenizer
from tests.chat.checkpoints import tiny_config, tokenizer_json


def trained(*, unmarked: Sequence[str] = (), at_end: bool = False, prompt_form: str = "plain") -> Tokenizer:
    raw = tokenizer_json(unmarked=unmarked, at_end=at_end)
    return Tokenizer(
        raw, config=tiny_config(), origin="test", prompt_form="wrapped" if prompt_form == "wrapped" else "plain"
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer.byte_level(tiny_config())


@pytest.fixture(scope="session")
def plain_tokenizer() -> Tokenizer:
    """As LFM2-24B-A2B: special tokens first, no thinking tokens."""
    return trained()


@pytest.fixture(scope="session")
def wrapped_tokenizer() -> Tokenizer:
    """As LFM2-8B-A1B: markers around tool lists and responses."""
    return trained(prompt_form="wrapped")


@pytest.fixture(scope="session")
def thinking_tokenizer() -> Tokenizer:
    """As LFM2.5: special tokens behind the learned ones, thinking marks as added tokens that are not marked special.

    `weather` is a learned token that is also listed as added: the hardest kind to keep out of literal text.
    """
    return trained(unmarked=("<think>", "</think>", "weather"), at_end=True)


@pytest.fixture(scope="session", params=["byte", "plain", "thinking"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    return tokenizer
