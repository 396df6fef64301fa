"""What is found in nine languages: questions as readers ask them, all passages of all languages in one index.

The set is ours: a manual, a library's rules and a town's history, 18 passages and 10 questions a language. The passages
of one subject share most of their words, so that the right one has to be told from its neighbours.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm.search.local_index import LocalIndex
from tests.search.indexes import BACKENDS, HAS_TANTIVY, document, open_index

SET = Path(__file__).parent / "data" / "retrieval.json"
LANGUAGES = ("ar", "de", "en", "es", "fr", "ja", "ko", "pt", "zh")
TOP = 5


# The third: as on a large index, where common words are left out of questions.
LARGE = pytest.param("large", marks=pytest.mark.skipif(not HAS_TANTIVY, reason="needs tantivy, of the extra search"))


def opened(kind: str, folder: Path) -> LocalIndex:
    if kind != "large":
        return open_index(kind, folder)
    from lfm.search.tantivy_index import TantivyIndex

    return LocalIndex(folder, text_index=TantivyIndex(folder / "bm25.tantivy", large_index=0))


@pytest.fixture(scope="module", params=[*BACKENDS, LARGE])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalIndex]:
    data = json.loads(SET.read_text(encoding="utf-8"))
    assert tuple(sorted(data)) == LANGUAGES
    with opened(str(request.param), tmp_path_factory.mktemp("retrieval")) as index:
        index.store.write(
            [
                document(f"/{language}/{number}.md", text, title="-")
                for language, entries in data.items()
                for number, text in enumerate(entries["passages"])
            ]
        )
        yield index


@pytest.mark.parametrize("language", LANGUAGES)
def test_nine_of_ten_questions_find_their_passage_among_the_first_five(index: LocalIndex, language: str) -> None:
    questions = json.loads(SET.read_text(encoding="utf-8"))[language]["questions"]
    missed = [
        question["text"]
        for question in questions
        if f"/{language}/{question['passage']}.md"
        not in {hit.chunk.path for hit in index.search(question["text"], limit=TOP)}
    ]
    assert len(missed) <= len(questions) // 10, missed
