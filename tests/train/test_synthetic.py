"""The synthetic conversations: the same in every run, right in themselves, and train and test apart by construction."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from lfm.chat.tokenizer import Tokenizer
from lfm.errors import UsageError
from lfm.model.presets import PRESETS
from lfm.train.examples import JSON_CALLS, Conversation, sft_row
from lfm.train.recipe import SyntheticSettings
from lfm.train.synthetic import generate, scenarios
from lfm.train.synthetic.draw import Draw, slots_of
from lfm.train.synthetic.generate import KINDS, Example, conversations, examples
from lfm.train.synthetic.requests import bare_request
from lfm.train.synthetic.tables import LANGUAGES, Split, cities, language_table, part_of, split_of, words, world
from lfm.train.synthetic.tools import intent_named, verb_intent

PER_KIND = 12
# Values that are words of a standard or a language and not names of anything: they occur on both sides.
_NO_ENTITY = re.compile(
    r"\d{4}-\d\d-\d\d|\d\d:\d\d|[a-z]{2}|[A-Z]{3}|celsius|fahrenheit|[\d.]+ [-+*/] [\d.]+"
    r"|-?[\d.]+|\d+ [A-Z]{3}|\[\d\]"
)


def made(split: Split) -> list[Example]:
    return [
        e for kind in KINDS for language in LANGUAGES for e in examples(kind, language, split=split, count=PER_KIND)
    ]


@pytest.fixture(scope="module")
def train() -> list[Example]:
    return made("train")


@pytest.fixture(scope="module")
def test() -> list[Example]:
    return made("test")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    else:
        yield path, value


def lists_of(table: Mapping[str, Any]) -> dict[str, list[str]]:
    return {path: value for path, value in leaves(table) if isinstance(value, list)}


def definitions(conversation: Conversation) -> dict[str, Mapping[str, Any]]:
    plain = [tool.get("function", tool) for tool in conversation.tools]
    return {definition["name"]: definition for definition in plain}  # type: ignore[index,misc]


def calls_in(items: list[Example]) -> Iterator[tuple[Example, str, Mapping[str, Any]]]:
    for example in items:
        for message in example.conversation.messages:
            for call in message.tool_calls:
                yield example, call.name, call.arguments


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_says_everything(language: str) -> None:
    """The same intents, questions, documents and topics everywhere, each with enough phrases for both sides."""
    optional = {".sentence_join", ".wishes", ".first_person"}
    english, table = dict(leaves(language_table("en"))), dict(leaves(language_table(language)))
    assert english.keys() - optional == table.keys() - optional
    for path, phrases in lists_of(language_table(language)).items():
        assert len(phrases) >= 2 or path == ".first_person", path
        assert len(set(phrases)) == len(phrases), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_phrases_name_only_slots_that_exist(language: str) -> None:
    table = language_table(language)
    for name, phrases in table["intents"].items():
        spec = world()["intents"][name]
        known = {*spec["required"], *spec.get("optional", ())}
        for template in [*phrases["vp"], *phrases["free"]]:
            assert set(spec["required"]) <= set(slots_of(template)) <= known, template
        for template in phrases["bare"]:
            absent = set(spec["required"]) - set(slots_of(template))
            assert 1 <= len(absent) <= 2, template
            assert set(slots_of(template)) <= known, template
        for template in phrases["answer"]:
            assert set(slots_of(template)) <= known | set(spec["results"]), template
    for name, phrases in table["verbs"].items():
        spec = world()["verbs"][name]
        for template in phrases["vp"]:
            assert set(spec["required"]) == set(slots_of(template)) - {"a_noun", "the_noun"}, template
    for kind, fields in world()["documents"].items():
        for template in table["extract"][kind]:
            assert set(slots_of(template)) <= set(fields), template
    for attribute in world()["facts"]:
        for template in table["grounded"][attribute]["answers"]:
            assert {"value", "cite"} <= set(slots_of(template)) <= {"name", "value", "cite"}, template


def test_no_phrase_is_on_both_sides() -> None:
    """Over all tables and languages at once, capitals and spaces aside."""
    sides: dict[Split, set[str]] = {"train": set(), "test": set()}
    for table in (*(language_table(language) for language in LANGUAGES), world()["intents"], world()["verbs"]):
        for path, phrases in lists_of(table).items():
            if path.endswith((".required", ".optional", ".dates", ".names", ".first_person")):
                continue
            for split, found in sides.items():
                found.update(" ".join(phrase.casefold().split()) for phrase in part_of(phrases, split))
    assert len(sides["train"]) > 3000
    assert sides["train"] & sides["test"] == set()


def test_no_entity_is_on_both_sides(train: list[Example], test: list[Example]) -> None:
    sides = []
    for items in (train, test):
        values = {v for _, _, arguments in calls_in(items) for v in arguments.values() if isinstance(v, str)}
        facts = [e.contains for example in items for e in example.expected if e.kind != "one_of"]
        values |= {text for texts in facts for text in texts}
        sides.append({value.casefold() for value in values if not _NO_ENTITY.fullmatch(value)})
    assert min(len(side) for side in sides) > 500
    assert sides[0] & sides[1] == set()


def test_no_tool_name_is_on_both_sides(train: list[Example], test: list[Example]) -> None:
    """However it is written: a vendor's prefix, capitals and separators aside. The service's own tools aside."""
    vendors = world()["vendors"].split()
    served = set(world()["served"])

    def plain(name: str) -> str:
        for vendor in vendors:
            name = name.removeprefix(f"{vendor}_")
        return re.sub(r"[^a-z0-9]", "", name.casefold())

    sides = [
        {plain(name) for e in items for name in definitions(e.conversation) if name not in served}
        for items in (train, test)
    ]
    assert min(len(side) for side in sides) > 300
    assert sides[0] & sides[1] == set()


def test_both_sides_have_names_to_draw_from() -> None:
    for language in LANGUAGES:
        for split in ("train", "test"):
            assert len(cities(language, split)) >= 10
            for key in ("given", "family", "words"):
                assert len(words(language, key, split)) >= 3, (language, key, split)
    assert split_of("Paris") == split_of("PARIS")


def test_phrasings_come_in_thousands() -> None:
    """Whole request sentences before any entity is filled in: frames times verb phrases, and the free ones."""
    for language in LANGUAGES:
        table = language_table(language)
        frames = len(part_of(table["frames"], "train"))
        counts = [
            frames * len(part_of(p["vp"], "train")) + len(part_of(p.get("free", ["", ""]), "train"))
            for group in ("intents", "verbs")
            for p in table[group].values()
        ]
        assert sum(counts) > 600
    assert len(world()["verbs"]) * len(language_table("en")["nouns"]) + len(world()["intents"]) > 80


def test_a_seed_gives_the_same_conversations() -> None:
    settings = SyntheticSettings(conversations=10, seed=3, shards=3)
    shards = [list(conversations(settings, shard=shard)) for shard in range(3)]
    assert [len(shard) for shard in shards] == [4, 3, 3]
    assert shards[1] == list(conversations(settings, shard=1))
    assert shards[0][:3] != shards[1]
    assert list(conversations(SyntheticSettings(conversations=10, seed=4, shards=3), shard=0)) != shards[0]


@pytest.mark.slow
def test_another_process_makes_the_same_conversations() -> None:
    """The order of sets differs from process to process, and must decide nothing."""
    code = (
        "from lfm.train.recipe import SyntheticSettings; from lfm.train.synthetic.generate import conversations\n"
        "print(*conversations(SyntheticSettings(conversations=60, shards=1), shard=0), sep='\\n')"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(outputs[0].splitlines()) == 60
    assert outputs[0] == outputs[1]


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(UsageError, match=r"names 'xx'. Allowed: en, ar, "):
        next(conversations(SyntheticSettings(conversations=1, languages=("xx",)), shard=0))


def test_every_call_fits_its_tool(train: list[Example], test: list[Example]) -> None:
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    for example, name, arguments in calls_in(train + test):
        schema = definitions(example.conversation)[name]["parameters"]
        assert set(schema["required"]) <= set(arguments) <= set(schema["properties"])
        for key, value in arguments.items():
            assert isinstance(value, types[schema["properties"][key]["type"]])
            assert value in schema["properties"][key].get("enum", [value])


def test_every_turn_of_the_assistant_has_its_expectation(train: list[Example], test: list[Example]) -> None:
    for example in train + test:
        turns = [m for m in example.conversation.messages if m.role == "assistant"]
        assert len(turns) == len(example.expected)
        for turn, expected in zip(turns, example.expected, strict=True):
            assert bool(turn.tool_calls) == (expected.kind == "calls")
            is_enough = any if expected.kind == "one_of" else all
            assert is_enough(text in turn.text for text in expected.contains)
            if expected.kind == "json":
                json.loads(turn.text)


def test_what_the_answer_needs_is_in_the_conversation_before(train: list[Example], test: list[Example]) -> None:
    """Arguments that are copied, facts of answers, citations: nothing can be made up."""
    for example in train + test:
        seen = ""
        expected = iter(example.expected)
        for message in example.conversation.messages:
            if message.role == "assistant":
                wanted = next(expected)
                values = [v for call in message.tool_calls for v in call.arguments.values() if isinstance(v, str)]
                for value in [*values, *(wanted.contains if wanted.kind != "one_of" else ())]:
                    assert value in seen or _NO_ENTITY.fullmatch(value), (example.kind, example.language, value)
            seen += message.text + "\n"


def test_no_tool_means_that_none_fits() -> None:
    for language in LANGUAGES:
        draw = Draw(random.Random(language), language, "train")
        for _ in range(20):
            episode = scenarios.no_tool(draw)
            tools = generate._tools_for(draw, [episode])
            assert tools
            assert not {tool.intent.key for tool in tools} & episode.forbidden
            assert len({tool.name for tool in tools}) == len(tools)


def test_a_bare_request_lacks_what_it_does_not_say() -> None:
    draw = Draw(random.Random(0), "de", "train")
    request = bare_request(draw, intent_named("hotel"))
    assert request.missing
    assert all(request.values[slot].text not in request.text for slot in request.missing)
    assert bare_request(draw, verb_intent("create", "invoice")).missing == ("title",)


def test_every_conversation_can_be_a_row_and_calls_are_in_the_form_asked_for(train: list[Example]) -> None:
    tokenizer = Tokenizer.byte_level(PRESETS["tiny"])
    for example in train[::7]:
        conversation = example.conversation
        row = sft_row(tokenizer, conversation)
        target = b"".join(tokenizer.token_bytes(int(i)) for i in row.ids[row.is_target]).decode()
        assert target.count("<|im_end|>") == len(example.expected)
        asks_for_json = any(m.role == "system" and JSON_CALLS in m.text for m in conversation.messages)
        assert asks_for_json == (conversation.call_form == "json")
        if any(m.tool_calls for m in conversation.messages):
            assert ('<|tool_call_start|>[{"name": ' in target) == asks_for_json
