"""What is expected of the model can be known: from the prompt, or from what training has shown in other words."""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lfm.search.sources import CITE_INSTRUCTION
from lfm.server.server_tools import SearchTool
from lfm.train.recipe import SyntheticSettings
from lfm.train.synthetic import generate, scenarios
from lfm.train.synthetic.documents import extraction
from lfm.train.synthetic.draw import Draw, Value, slots_of
from lfm.train.synthetic.generate import KINDS, Example, conversations, examples
from lfm.train.synthetic.requests import full_request, needed_in
from lfm.train.synthetic.tables import LANGUAGES, Split, language_table, part_of, world
from lfm.train.synthetic.tools import intent_named, served_tool

_COMMON = 4  # a word in so many groups of phrases says nothing of any of them


def words_of(phrase: str, language: str) -> set[str]:
    """What carries the meaning: words; characters where there are none; of Korean words the first two syllables."""
    plain = re.sub(r"\{[^}]*\}", " ", phrase).casefold()
    if language in ("zh", "ja"):
        return set(re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]", plain))
    words = re.findall(r"[^\W\d_]+", plain)
    return {word[:2] for word in words} if language == "ko" else set(words)


def phrase_groups(language: str) -> Iterator[tuple[str, list[Sequence[str]]]]:
    """The lists of phrases that mean one thing. What is left out of a request counts with the request."""
    table = language_table(language)
    for group in ("intents", "verbs"):
        for name, phrases in table[group].items():
            yield f"{group}.{name}", [phrases[key] for key in ("vp", "free", "bare") if key in phrases]
    for name, chain in table["chains"].items():
        yield f"chains.{name}", [chain["ask"]]
    for name, fact in table["grounded"].items():
        if isinstance(fact, dict):
            yield f"grounded.{name}.asks", [fact["asks"]]
            yield f"grounded.{name}.says", [fact["says"]]
    for group in ("extract", "sums"):
        for name, phrases in table[group].items():
            yield f"{group}.{name}", [phrases]
    for name, topic in table["self"].items():
        yield f"self.{name}", [topic["asks"]]
    for name in ("frames", "wishes", "openers", "closers", "joiners", "replies"):
        if name in table:
            yield name, [table[name]]


def words_in(lists: list[Sequence[str]], split: Split, language: str) -> set[str]:
    return {word for phrases in lists for phrase in part_of(phrases, split) for word in words_of(phrase, language)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_of_held_out_phrases_occur_in_training(language: str) -> None:
    """In other phrases that mean the same: a verb that was never seen cannot be understood."""
    groups = dict(phrase_groups(language))
    train = {name: words_in(lists, "train", language) for name, lists in groups.items()}
    common = Counter(word for words in train.values() for word in words)
    unseen = {
        name: sorted(word for word in words_in(lists, "test", language) - train[name] if common[word] < _COMMON)
        for name, lists in groups.items()
    }
    assert {name: words for name, words in unseen.items() if words} == {}


@pytest.fixture(scope="module")
def made() -> list[Example]:
    splits: tuple[Split, ...] = ("train", "test")
    return [
        example
        for split in splits
        for kind in KINDS
        for language in LANGUAGES
        for example in examples(kind, language, split=split, count=6, seed=11)
    ]


def turns(items: list[Example]) -> Iterator[tuple[str, str, str]]:
    """Of every assistant's turn: its kind, all that stands before it, and what it says."""
    for example in items:
        before = json.dumps([example.conversation.call_form, *example.conversation.tools], ensure_ascii=False)
        expected = iter(example.expected)
        for message in example.conversation.messages:
            calls = [[call.name, dict(call.arguments)] for call in message.tool_calls]
            said = f"{message.text}{json.dumps(calls, ensure_ascii=False)}"
            if message.role == "assistant":
                yield next(expected).kind, before, said
            before += f"\n{message.role}: {said}"


def test_equal_prompts_have_equal_calls_and_data(made: list[Example]) -> None:
    answers: dict[str, set[str]] = defaultdict(set)
    for kind, before, said in turns(made):
        answers[before].add(said if kind in ("calls", "json") else kind)
    assert len(answers) > 1500
    assert [before for before, found in answers.items() if len(found) > 1] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_answer_needs_only_what_every_phrase_for_it_names(language: str) -> None:
    table = language_table(language)
    for name, phrases in table["intents"].items():
        results = world()["intents"][name]["results"]
        needed = set(needed_in(phrases["answer"])) & set(results)
        assert all(needed <= set(slots_of(template)) for template in phrases["answer"])
    assert {"flight_number", "departure", "price"} <= set(needed_in(table["intents"]["flights"]["answer"]))
    assert "deleted_id" not in needed_in(table["verbs"]["delete"]["answer"])


def schema_in(prompt: str) -> dict[str, Any]:
    decoder = json.JSONDecoder()
    found = (decoder.raw_decode(prompt, match.start())[0] for match in re.finditer(r"\{\"", prompt))
    schema: dict[str, Any] = next(found)
    return schema


def test_a_schema_tells_what_may_be_null_and_how_dates_are_written() -> None:
    num_nulls = num_nullable = num_dates = 0
    for seed in range(300):
        draw = Draw(random.Random(seed), LANGUAGES[seed % 9], ("train", "test")[seed % 2])
        prompt, answer = extraction(draw).messages
        schema, data = schema_in(prompt.text), json.loads(answer.text)
        fields = schema.get("properties", schema)
        assert list(fields) == list(data)
        for name, value in data.items():
            kind = json.dumps(fields[name])
            num_nulls += value is None
            num_nullable += "null" in kind
            assert value is not None or "null" in kind
            if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
                num_dates += 1
                assert "date" in kind
    assert num_nulls > 20
    assert num_nullable > 2 * num_nulls  # so "may be null" does not give away that it is
    assert num_dates > 50


def test_a_parameter_says_how_dates_times_and_sums_are_written(made: list[Example]) -> None:
    told = {"date": r"YYYY-MM-DD|ISO", "time": r"HH:MM|24", "expression": r"\d [-+*/] \d"}
    slots = world()["slots"]
    for slot, pattern in told.items():
        assert slots[slot]["told"]
        assert all(re.search(pattern, description) for description in slots[slot]["descriptions"])


def test_search_tools_and_their_results_are_those_of_the_service(made: list[Example]) -> None:
    for name in ("web_search", "file_search"):
        served = SearchTool(name=name).definition()
        assert {"type": "function", **served_tool(name).definition} == served
    searches = [example for example in made if example.kind == "search"]
    for example in searches:
        messages = example.conversation.messages
        question, call, result = messages[-4:-1]
        assert call.tool_calls[0].arguments["query"] in question.text
        assert result.text.startswith((f"{CITE_INSTRUCTION}\n\n===== Source [", "Nothing was", "The results hold"))
    assert {len(example.expected) for example in searches} > {2}


def test_small_talk_is_learnt_without_tools_and_without_a_system_prompt() -> None:
    seen: Counter[tuple[bool, bool]] = Counter()
    topics = set()
    for language in LANGUAGES:
        answers = {topic: part_of(t["answers"], "train") for topic, t in language_table(language)["self"].items()}
        for example in examples("small_talk", language, split="train", count=140):
            messages = example.conversation.messages
            seen[bool(example.conversation.tools), messages[0].role == "system"] += 1
            topics |= {(language, topic) for topic, said in answers.items() if messages[-1].text in said}
    assert min(seen.values()) > 60
    assert len(seen) == 4
    assert len(topics) == 9 * len(language_table("en")["self"])


def test_without_a_calculator_only_small_sums_are_answered() -> None:
    for seed in range(200):
        draw = Draw(random.Random(seed), LANGUAGES[seed % 9], "train")
        episode = scenarios.toolless(draw)
        sums = [fact for e in episode.expected if e.kind == "text" for fact in e.contains]
        assert all(int(result) <= 100 for result in sums)


@pytest.mark.parametrize(
    ("expression", "is_easy"),
    [("2 + 2", True), ("20 - 7", True), ("21 + 2", False), ("9 * 10", True), ("9 * 11", False), ("100 / 10", True)],
)
def test_a_small_sum_needs_no_calculator(expression: str, is_easy: bool) -> None:
    draw = Draw(random.Random(0), "en", "train")
    request = full_request(draw, intent_named("calculator"), {"expression": Value(expression, expression)})
    assert scenarios.is_easy(request) == is_easy
    assert not scenarios.is_easy(full_request(draw, intent_named("clock")))


def test_every_kind_and_language_has_its_share() -> None:
    """Of conversations: eight of a hundred for each kind, sums aside, which are calls of one tool like others."""
    shares = generate._SHARES
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) == set(KINDS)
    assert all(share >= (0.04 if kind == "arithmetic" else 0.08) for kind, share in shares.items())
    settings = SyntheticSettings(conversations=900, seed=2, shards=1)
    letters = Counter(script_of(c.messages[-1].text) for c in conversations(settings, shard=0))
    for script in ("zh", "ja", "ko", "ar"):
        assert 0.06 < letters[script] / 900 < 0.16, letters
    assert letters["latin"] > 450


def script_of(text: str) -> str:
    for language, letters in (("ja", r"[\u3040-\u30ff]"), ("ko", r"[\uac00-\ud7a3]"), ("ar", r"[\u0620-\u064a]")):
        if len(re.findall(letters, text)) > len(text) / 6:
            return language
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) and not re.search(r"[a-z]{4}", text) else "latin"


def test_held_out_prompts_are_no_longer_than_training_has_shown() -> None:
    def longest(split: Split, count: int) -> dict[str, int]:
        return {
            kind: max(
                sum(len(message.text) for message in example.conversation.messages)
                for language in ("en", "de", "ja")
                for example in examples(kind, language, split=split, count=count)
            )
            for kind in KINDS
        }

    train, test = longest("train", 40), longest("test", 10)
    assert {kind for kind in KINDS if test[kind] > train[kind]} == set()
