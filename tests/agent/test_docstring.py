"""Docstrings in the layouts that people use."""

import pytest

from lfm.agent.docstring import parse_docstring

GOOGLE = """Say how warm it is.

Asks the nearest station.

Args:
    city: Name of the city,
        in English: no abbreviation.
    days (list[int]): Which days.
    unit (str, optional):
        Either unit.

Returns:
    city: not an argument.
"""
NUMPY = """Say how warm it is.

Asks the nearest station.

Parameters
----------
city : str
    Name of the city,
    in English: no abbreviation.
days : list of int
    Which days.
unit
    Either unit.

Returns
-------
city : not an argument.
"""
SPHINX = """Say how warm it is.

Asks the nearest station.

:param city: Name of the city,
    in English: no abbreviation.
:param list days: Which days.
:param unit: Either unit.
:type unit: str
:returns: city: not an argument.
"""


@pytest.mark.parametrize("text", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_summary_and_arguments_are_found(text: str) -> None:
    found = parse_docstring(text)
    assert found.summary == "Say how warm it is.\n\nAsks the nearest station."
    assert found.arguments == {
        "city": "Name of the city, in English: no abbreviation.",
        "days": "Which days.",
        "unit": "Either unit.",
    }


@pytest.mark.parametrize("text", [None, "", "   \n"])
def test_nothing_is_an_empty_summary(text: str | None) -> None:
    assert parse_docstring(text) == ("", {})


def test_a_text_without_a_layout_is_all_summary() -> None:
    text = "Note: this says\n  a: b\nand\n---\nmore."
    assert parse_docstring(text) == (text, {})
