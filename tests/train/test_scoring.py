"""The scorers: what counts as right, and that nothing else does."""

import random

import pytest

from lfm.chat.messages import Message, ToolCall
from lfm.chat.tokenizer import Tokenizer
from lfm.model.presets import PRESETS
from lfm.train.evaluation import METRICS, Score, as_table, evaluate, turns_of
from lfm.train.examples import sft_row
from lfm.train.scoring import Answer, is_right, is_same_json, names_fact, read_answer, same_calls, same_value
from lfm.train.synthetic.generate import KINDS, examples
from lfm.train.synthetic.scenarios import Expected

WEATHER = ToolCall(name="get_weather", arguments={"city": "Rom", "days": 3})
TIMER = ToolCall(name="timer", arguments={"minutes": 5, "on": True})
SAID = Message(role="assistant", content="x")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.byte_level(PRESETS["tiny"])


def test_calls_match_in_any_order_with_all_arguments_and_no_other() -> None:
    assert same_calls([WEATHER, TIMER], [TIMER, WEATHER])
    assert same_calls([TIMER, TIMER], [TIMER, TIMER])
    assert not same_calls([WEATHER], [WEATHER, WEATHER])
    assert not same_calls([WEATHER, WEATHER], [WEATHER, TIMER])
    assert not same_calls([WEATHER], [])
    assert not same_calls([WEATHER], [ToolCall(name="get_weather", arguments={"city": "Rom"})])
    assert not same_calls([WEATHER], [ToolCall(name="get_weather", arguments={**WEATHER.arguments, "unit": "c"})])
    assert not same_calls([WEATHER], [ToolCall(name="weather", arguments=WEATHER.arguments)])


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (5, 5.0, True),
        (True, 1, False),
        (0, False, False),
        (None, 0, False),
        ("5", 5, False),
        ({"a": [1, {"b": None}]}, {"a": [1.0, {"b": None}]}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),
        ([1, 2], [2, 1], False),
        ("a", "A", False),
    ],
)
def test_values_are_compared_as_json(one: object, other: object, is_same: bool) -> None:
    assert same_value(one, other) is is_same
    assert same_value(other, one) is is_same


def test_json_is_compared_by_value() -> None:
    assert is_same_json('{"a": 1, "b": null}', '{"b":null,\n"a":1.0}')
    assert not is_same_json('{"a": 1}', '{"a": 1} and more')
    assert not is_same_json('{"a": 1}', "[" * 100_000)


def test_a_fact_is_no_part_of_a_longer_number() -> None:
    assert names_fact("It costs 12 euros [2].", "12")
    assert not names_fact("It costs 120 euros.", "12")
    assert not names_fact("It costs 0.12 euros.", "12")
    assert not names_fact("It costs 12.5 euros.", "12")
    assert names_fact("Er kostet 12.", "12")
    assert names_fact("价格12欧元", "12")


def test_an_answers_calls_and_text_are_told_apart_by_ids(tokenizer: Tokenizer) -> None:
    special = tokenizer.special
    start, end = special.tool_call_start, special.tool_call_end
    assert start is not None
    assert end is not None
    call = tokenizer.encode('[get_weather(city="Rom", days=3)]')
    as_json = tokenizer.encode('[{"name": "get_weather", "arguments": {"city": "Rom", "days": 3}}]')
    for written in (call, as_json):
        for tail in ([end], [end, special.im_end], []):
            assert read_answer(tokenizer, [start, *written, *tail]) == Answer("", (WEATHER,))
    assert read_answer(tokenizer, [*tokenizer.encode(" Hello "), special.im_end]) == Answer("Hello", ())
    assert read_answer(tokenizer, [start, *tokenizer.encode("[get_weather(city="), end]).calls is None
    both = read_answer(tokenizer, [start, *call, end, *tokenizer.encode("so")])
    assert both == Answer("so", (WEATHER,))


def test_each_kind_of_turn_is_judged_by_what_it_needs() -> None:
    def right(expected: Expected, answer: Answer, gold: Message = SAID, language: str = "en") -> bool:
        return is_right(expected, gold, answer, language=language)

    called = Message(role="assistant", tool_calls=(WEATHER,))
    assert right(Expected("calls"), Answer("", (WEATHER,)), called)
    assert not right(Expected("calls"), Answer("", None), called)
    assert not right(Expected("calls"), Answer("I would call it"), called)
    assert right(Expected("text"), Answer("I have no tool for that."))
    assert not right(Expected("text"), Answer("", (WEATHER,)))
    assert not right(Expected("text"), Answer(""))
    assert right(Expected("text", ("21", "60")), Answer("21 degrees, 60 %"))
    assert not right(Expected("text", ("21", "60")), Answer("21 degrees"))
    declined = Expected("one_of", ("I have no tool for that.", "None of my tools can do that."))
    assert right(declined, Answer("Sorry! I have no tool for that."))
    assert not right(declined, Answer("Done: the light is on."))
    assert not right(declined, Answer("I have no tool for that.", (WEATHER,)))
    cited = Expected("cited", ("1954", "[2]"))
    assert right(cited, Answer("Since 1954 [2]."))
    assert not right(cited, Answer("Since 1954 [1]."))
    assert not right(cited, Answer("Since 1954 [1][2]."))
    assert not right(cited, Answer("Since 1955 [2]."))
    assert right(Expected("absent"), Answer("Das steht nicht in den Dokumenten."), language="de")
    assert not right(Expected("absent"), Answer("Das steht nicht in den Dokumenten [1]."), language="de")
    assert not right(Expected("absent"), Answer("Since 1954."))
    assert right(Expected("json"), Answer('{"a": 1}'), Message(role="assistant", content='{"a":1}'))


@pytest.mark.parametrize("kind", KINDS)
def test_the_made_conversations_score_full_marks_and_wrong_ones_none(tokenizer: Tokenizer, kind: str) -> None:
    """The gold turns, read back from their ids, are right; those of another conversation are not."""
    for language in ("en", "ja"):
        made = examples(kind, language, split="test", count=6)  # type: ignore[arg-type]
        for example in made:
            row = sft_row(tokenizer, example.conversation)
            for turn in turns_of(tokenizer, example):
                begin = len(turn.prompt_ids)
                end = row.ids.tolist().index(tokenizer.special.im_end, begin)
                answer = read_answer(tokenizer, row.ids[begin : end + 1].tolist())
                assert is_right(turn.expected, turn.gold, answer, language=language)
                if turn.expected.kind != "text" or turn.expected.contains:
                    assert not is_right(turn.expected, turn.gold, Answer("Hello."), language=language)


def test_an_evaluation_counts_conversations_that_are_right_throughout(tokenizer: Tokenizer) -> None:
    """An oracle that is wrong in one turn out of so many loses whole conversations."""
    answers: dict[tuple[int, ...], list[int]] = {}
    for kind in KINDS:
        for example in examples(kind, "fr", split="test", count=3):
            ids = sft_row(tokenizer, example.conversation).ids.tolist()
            for turn in turns_of(tokenizer, example):
                begin = len(turn.prompt_ids)
                answers[tuple(turn.prompt_ids)] = ids[begin : ids.index(tokenizer.special.im_end, begin) + 1]

    def oracle(prompts: list[list[int]]) -> list[list[int]]:
        return [answers[tuple(prompt)] for prompt in prompts]

    def often_wrong(prompts: list[list[int]]) -> list[list[int]]:
        generator = random.Random(0)
        return [[] if generator.random() < 0.4 else answers[tuple(prompt)] for prompt in prompts]

    def score(generate: object) -> list[Score]:
        return list(
            evaluate(tokenizer, generate, languages=["fr"], num_per_kind=3, on_progress=lambda line: None)  # type: ignore[arg-type]
        )

    perfect, poor = score(oracle), score(often_wrong)
    assert [s.metric for s in perfect] == list(METRICS)
    assert all(s.share == 1 for s in perfect)
    assert sum(s.num_right for s in poor) < 0.8 * sum(s.num_conversations for s in poor)
    assert as_table(perfect).splitlines()[2] == "| tool call | 100 |"
