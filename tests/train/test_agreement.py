"""Endings that follow from what stands beside them."""

import pytest

from lfm.train.synthetic.agreement import agree
from lfm.train.synthetic.draw import render
from lfm.train.synthetic.generate import KINDS, examples
from lfm.train.synthetic.tables import LANGUAGES


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("서울{과/와} 파리{과/와}", "서울과 파리와"),
        ('"물"{으로/로}, "집"{으로/로}, "배"{으로/로}', '"물"로, "집"으로, "배"로'),
        ("21{으로/로} 3{으로/로} 5{을/를}", "21로 3으로 5를"),
        ("ABN{은/는} ABC{은/는}", "ABN은 ABC는"),
        ("{이/가}", "가"),
        ("vol {de/d'}Oslo, {de/d'}Paris, {de/d'}Élise", "vol d'Oslo, de Paris, d'Élise"),
        ("{de/d'}", "de "),
        ("5 {ليال/ليلة} 12 {ليال/ليلة} 2 {ليال/ليلة}", "5 ليال 12 ليلة 2 ليلة"),
        ('{"a": "b/c", "d": {}}', '{"a": "b/c", "d": {}}'),
        ("1/2 and {x}", "1/2 and {x}"),
    ],
)
def test_one_form_of_each_mark_is_kept(template: str, text: str) -> None:
    assert agree(template) == text


def test_endings_agree_with_values_and_not_with_slots() -> None:
    assert render("{city}{은/는}", {"city": "서울"}) == "서울은"
    assert render("{city}{은/는}", {"city": "파리"}) == "파리는"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_mark_is_left_over(language: str) -> None:
    marks = ("{은/", "{이/", "{을/", "{과/", "{으로/", "{이라고/", "{이에요/", "{de/", "{ليال/", "{دقائق/", "{أيام/")
    for kind in KINDS:
        for example in examples(kind, language, split="train", count=8, seed=5):
            text = "\n".join(message.text for message in example.conversation.messages)
            assert not [mark for mark in marks if mark in text]
