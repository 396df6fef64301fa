"""A text is found by the words that its readers would type, in every script that the model speaks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.search.analyser import MAX_QUERY_TERMS, MAX_TERM_CHARS, index_terms, query_terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The QUICK brown-fox, 24B.", ["the", "quick", "brown", "fox", "24b"]),
        ("max_tokens don't", ["max", "tokens", "don", "t"]),
        ("Café Ångström naïve", ["cafe", "angstrom", "naive"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("Ελλάδα ΕΛΛΑΔΑ", ["ελλαδα", "ελλαδα"]),
        ("\ufb01ne \uff2c\uff26\uff2d\uff12 \u2460", ["fine", "lfm2", "1"]),
        ("йога ёлка", ["йога", "ёлка"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("co\u00adoperate", ["cooperate"]),
        ("", []),
        (" .,;!?  \n\t", []),
    ],
)
def test_words_are_folded(text: str, terms: list[str]) -> None:
    assert index_terms(text) == terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("東京都", ["東", "京", "都", "東京", "京都"]),
        ("カメラ", ["カ", "メ", "ラ", "カメ", "メラ"]),
        ("ｶﾒﾗ", ["カ", "メ", "ラ", "カメ", "メラ"]),
        ("서울에", ["서", "울", "에", "서울", "울에"]),
        ("検\n索", ["検", "索", "検索"]),
        ("LFM2は速い", ["lfm2", "は", "速", "い", "は速", "速い"]),
        ("ไทย", ["ไ", "ท", "ย", "ไท", "ทย"]),
    ],
)
def test_scripts_without_spaces_give_characters_and_pairs(text: str, terms: list[str]) -> None:
    assert index_terms(text) == terms


@pytest.mark.parametrize(
    ("written", "typed"),
    [
        ("العَرَبِيَّةُ", "عربية"),
        ("إسلام أحمد آدم", "اسلام احمد ادم"),
        ("مدرسة", "مدرسه"),
        ("والكتاب بالكتاب للكتاب", "كتاب كتاب كتاب"),
        ("كـتـاب", "كتاب"),
        ("على", "علي"),
        ("کتاب فارسی", "كتاب فارسي"),
        ("٢٠٢٤ ۲۰۲۴", "2024 2024"),
        ("שָׁלוֹם", "שלום"),
    ],
)
def test_letters_with_several_forms_are_one(written: str, typed: str) -> None:
    assert index_terms(written) == index_terms(typed)


def test_a_short_arabic_word_keeps_what_looks_like_an_article() -> None:
    assert index_terms("الم") == ["الم"]


def test_a_query_of_pairs_leaves_single_characters_out() -> None:
    assert query_terms("東京都 京 east east") == ["東京", "京都", "京", "east"]


def test_a_query_is_bounded_and_a_term_too() -> None:
    assert len(query_terms(" ".join(f"w{i}" for i in range(1000)))) == MAX_QUERY_TERMS
    assert query_terms("x" * 100_000) == ["x" * MAX_TERM_CHARS]


@pytest.mark.parametrize("text", ['a" OR "b', "NEAR(a b)", "title:a", "a* ^b", "-a +b", "{a} [b]", "'; DROP TABLE x"])
def test_query_syntax_is_only_text(text: str) -> None:
    assert all(term.isalnum() for term in query_terms(text))


@given(st.text())
def test_every_query_term_of_a_text_is_an_index_term_of_it(text: str) -> None:
    """So a text is always found by itself. Terms hold no white space: both backends split there."""
    terms = index_terms(text)
    assert set(query_terms(text)) <= set(terms)
    assert all(term and not any(char.isspace() for char in term) and len(term) <= MAX_TERM_CHARS for term in terms)
