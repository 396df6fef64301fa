"""The built-in model as it is committed: its size, its shape, and that it does what it is for."""

import json
from collections.abc import Iterator

import pytest

from lfm.chat.messages import Message
from lfm.chat.prompt import build_prompt
from lfm.config import BUILTIN_FOLDER, EngineConfig, ModelConfig
from lfm.llm import LLM
from lfm.model.sizes import num_parameters
from lfm.protocol import SamplingParams
from lfm.train.evaluation import METRICS, evaluate
from lfm.train.scoring import read_answer

pytestmark = pytest.mark.skipif(
    not (BUILTIN_FOLDER / "config.json").is_file(), reason="lfm/builtin, the trained model, is not in this copy"
)
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def test_it_is_small_enough_for_a_repository_and_has_everything_on() -> None:
    files = list(BUILTIN_FOLDER.iterdir())
    shards = [path for path in files if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in files) <= 36_000_000
    assert max(path.stat().st_size for path in shards) <= 15_000_000
    config = ModelConfig.from_folder(BUILTIN_FOLDER)
    assert 12_000_000 <= num_parameters(config) <= 18_000_000
    assert len(config.conv_layers) == 3 * len(config.attention_layers)
    assert (config.num_experts_per_tok, config.use_expert_bias, config.num_dense_layers) == (4, True, 2)
    assert 8192 <= config.vocab_size <= 12_288


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(EngineConfig(model="builtin", device="cpu")) as loaded:
        yield loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "city"),
    [("What's the weather like in Prague?", "Prague"), ("Wie ist das Wetter in Hamburg?", "Hamburg")],
)
def test_it_calls_a_tool(llm: LLM, question: str, city: str) -> None:
    ids = build_prompt(llm.tokenizer, [Message(role="user", content=question)], tools=[WEATHER])
    sampling = SamplingParams(max_tokens=60, temperature=0.0, stop_token_ids=llm.tokenizer.stop_token_ids)
    answer = read_answer(llm.tokenizer, llm.generate([ids], sampling=sampling)[0].token_ids)
    assert answer.calls is not None
    assert [(call.name, dict(call.arguments)) for call in answer.calls] == [("get_weather", {"city": city})]


@pytest.mark.slow
def test_it_is_as_good_as_the_readme_says_within_chance(llm: LLM) -> None:
    """Few conversations of every kind: the whole table takes minutes."""
    sampling = SamplingParams(max_tokens=320, temperature=0.0, stop_token_ids=llm.tokenizer.stop_token_ids)
    scores = evaluate(
        llm.tokenizer,
        lambda prompts: [output.token_ids for output in llm.generate(prompts, sampling=sampling)],
        languages=("en", "ja"),
        num_per_kind=4,
        on_progress=lambda line: None,
    )
    shares = {(score.metric, score.language): score.share for score in scores}
    assert len(shares) == 2 * len(METRICS)
    assert sum(shares.values()) / len(shares) > 0.7, json.dumps({str(k): v for k, v in shares.items()})
