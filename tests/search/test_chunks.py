"""Chunks are whole sentences that join to the document, each with one place to cite."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.search.chunks import TARGET_TOKENS, cut, num_tokens_estimated
from lfm.search.extracted import Extracted
from lfm.search.sentences import sentence_spans

MARKDOWN = """Before any heading.

# Install

## Linux

Run the command. It takes a minute.

```
# no heading, but a comment in code
make serve
```

## macOS ##

Not supported yet.

# Use
Ask a question.
"""


def sentences(text: str) -> list[str]:
    return [text[start:end].strip() for start, end in sentence_spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        (
            "Dr. Smith paid 3.14 dollars, e.g. to J. Doe. Then he left.",
            ["Dr. Smith paid 3.14 dollars, e.g. to J. Doe.", "Then he left."],
        ),
        ('He said: "Stop." She did.', ['He said: "Stop."', "She did."]),
        ("Wait... what?", ["Wait... what?"]),
        ("これは文です。次の文\uff01「はい。」と", ["これは文です。", "次の文\uff01", "「はい。」", "と"]),
        ("هل هذا صحيح؟ نعم.", ["هل هذا صحيح؟", "نعم."]),
        ("यह वाक्य है। दूसरा।", ["यह वाक्य है।", "दूसरा।"]),
        ("a line\nwrapped here\n\nnew paragraph", ["a line\nwrapped here", "new paragraph"]),
        ("- one\n- two\n3. three", ["- one", "- two", "3. three"]),
        ("", []),
    ],
)
def test_sentences_end_where_readers_see_it(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(alphabet=st.sampled_from("aB .!?\n\"'。」-#1東 \t"), max_size=200))
def test_sentences_join_to_the_text(text: str) -> None:
    assert "".join(text[start:end] for start, end in sentence_spans(text)) == text


def test_markdown_chunks_know_the_path_of_headings_that_they_stand_under() -> None:
    chunks = cut(Extracted(text=MARKDOWN, is_markdown=True))
    assert [chunk.heading for chunk in chunks] == ["", "Install > Linux", "Install > macOS", "Use"]
    assert chunks[1].text.startswith("# Install\n\n## Linux\n")
    assert "# no heading" in chunks[1].text


def test_a_text_that_is_no_markdown_has_no_headings() -> None:
    assert {chunk.heading for chunk in cut(Extracted(text=MARKDOWN))} == {""}


def test_no_chunk_runs_across_a_page() -> None:
    text = "First page.\n\n\n\nThird page, the second is blank.\n\n"
    chunks = cut(Extracted(text=text, page_starts=(0, 13, 15)))
    assert [(chunk.page, chunk.text.strip()) for chunk in chunks] == [
        (1, "First page."),
        (3, "Third page, the second is blank."),
    ]


def test_long_texts_are_cut_between_sentences() -> None:
    text = "".join(f"Sentence number {number} says that a pump needs power. " for number in range(400))
    chunks = cut(Extracted(text=text))
    assert len(chunks) > 10
    assert all(chunk.text.startswith("Sentence number") and chunk.text.endswith("power. ") for chunk in chunks)
    assert all(TARGET_TOKENS / 2 < num_tokens_estimated(chunk.text) <= TARGET_TOKENS for chunk in chunks[:-1])


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_a_blank_document_has_no_chunks(text: str) -> None:
    assert cut(Extracted(text=text, is_markdown=True)) == []


@given(
    st.text(alphabet=st.sampled_from("aB .!?\n#-` 東。"), max_size=300).filter(str.strip),
    st.booleans(),
    st.lists(st.integers(0, 300), max_size=4),
)
def test_chunks_join_to_the_document_and_none_is_blank(text: str, is_markdown: bool, breaks: list[int]) -> None:
    starts = tuple(sorted({0, *(at for at in breaks if at < len(text))})) if breaks else ()
    chunks = cut(Extracted(text=text, is_markdown=is_markdown, page_starts=starts))
    assert "".join(chunk.text for chunk in chunks) == text
    assert all(chunk.text == text[chunk.start : chunk.end] and chunk.text.strip() for chunk in chunks)


@pytest.mark.parametrize(
    "piece", ["a", ".", "\n", "# a\n", "# ", "日", "\n   ", '!""', ". ", "」。", "\n#\n", "a\n\n", "[.](", "> "]
)
def test_cutting_is_linear_whatever_the_text(piece: str) -> None:
    """A hostile page must not cost more than its size. Four times the text may take ten times as long, not sixteen."""

    def fastest_s(num_chars: int) -> float:
        """Of three: a collection of the whole test process's garbage may fall into one of them."""
        document = Extracted(text=piece * (num_chars // len(piece)), is_markdown=True)
        times = []
        for _ in range(3):
            start_s = time.process_time()
            cut(document)
            times.append(time.process_time() - start_s)
        return min(times)

    assert fastest_s(80_000) < 10 * fastest_s(20_000) + 0.1
