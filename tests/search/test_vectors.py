"""Dense vectors find by meaning what words alone do not; without their server, words decide."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm.errors import UsageError
from lfm.search.embeddings import EmbeddingClient
from lfm.search.errors import EmbeddingError
from lfm.search.local_index import LocalIndex
from lfm.search.vectors import FILE
from tests.search.indexes import document, paths_found
from tests.search.web import Answer, Seen, Web, serve

MEANINGS = {"car": 0, "automobile": 0, "water": 1, "sea": 1, "music": 2, "song": 2}


def vector(text: str) -> list[float]:
    """Which of three meanings a text has, and a little of its length, so that no vector is zero."""
    row = [0.0, 0.0, 0.0, 0.01 * (1 + len(text) % 7)]
    for word in text.lower().replace(".", " ").split():
        if word in MEANINGS:
            row[MEANINGS[word]] += 1.0
    return row


def embeddings(seen: Seen) -> Answer:
    """What an OpenAI-compatible server answers, in an order of its own."""
    body = json.loads(seen.body)
    assert set(body) == {"model", "input", "encoding_format"}
    data = [
        {"object": "embedding", "index": index, "embedding": vector(text)} for index, text in enumerate(body["input"])
    ]
    answer = {"object": "list", "data": data[::-1], "model": body["model"], "usage": {"total_tokens": 1}}
    return Answer(body=json.dumps(answer).encode(), content_type="application/json")


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as web:
        web.answers["/v1/embeddings"] = embeddings
        yield web


def open_index(folder: Path, web: Web, model: str = "m") -> LocalIndex:
    return LocalIndex(folder, embeddings=EmbeddingClient(web.root, model, api_key="k"))


DOCUMENTS = {
    "/1.md": "The automobile needs fuel.",
    "/2.md": "The sea is deep.",
    "/3.md": "A song about nothing.",
}


def add(index: LocalIndex, documents: dict[str, str]) -> None:
    index.store.write([document(path, text) for path, text in documents.items()])


def num_embedded(web: Web) -> int:
    return sum(len(json.loads(seen.body)["input"]) for seen in web.seen)


def test_a_synonym_is_found_and_both_rankings_count(web: Web, tmp_path: Path) -> None:
    with open_index(tmp_path, web) as index:
        add(index, {**DOCUMENTS, "/words.md": "A car park, where a car is."})
        index.sync()
        found = paths_found(index, "which car")
        assert found[0] == "/words.md", "words and meaning"
        assert found[1] == "/1.md", "meaning alone"
        assert all(
            one.score >= other.score for one, other in zip(index.search("car"), index.search("car")[1:], strict=False)
        )
        assert len(index.search("car", limit=1)) == 1
    assert web.seen[0].headers["Authorization"] == "Bearer k"


def test_only_texts_that_are_new_are_embedded(web: Web, tmp_path: Path) -> None:
    with open_index(tmp_path, web) as index:
        add(index, DOCUMENTS)
        index.sync()
        index.sync()
        assert num_embedded(web) == 3
        text = "# One\n\nThe sea is deep.\n\n# Two\n\nMusic plays."
        add(index, {"/two.md": text, "/copy.md": DOCUMENTS["/1.md"]})
        index.sync()
        assert num_embedded(web) == 5, "the copy's text was known"
        add(index, {"/two.md": text.replace("plays", "sounds")})
        index.sync()
        assert num_embedded(web) == 6


def test_what_was_removed_is_not_found_by_meaning_either(web: Web, tmp_path: Path) -> None:
    with open_index(tmp_path, web) as index:
        add(index, DOCUMENTS)
        index.sync()
        assert paths_found(index, "car")[0] == "/1.md"
        index.store.write(remove=["/1.md"])
        assert "/1.md" not in paths_found(index, "car")
        index.sync()
        assert "/1.md" not in paths_found(index, "car")


def test_another_process_s_vectors_are_used(web: Web, tmp_path: Path) -> None:
    with open_index(tmp_path, web) as reader, open_index(tmp_path, web) as writer:
        assert paths_found(reader, "car") == []
        add(writer, DOCUMENTS)
        writer.sync()
        assert paths_found(reader, "car")[0] == "/1.md"


def test_two_models_keep_their_own_vectors(web: Web, tmp_path: Path) -> None:
    with open_index(tmp_path, web, "one") as index:
        add(index, DOCUMENTS)
        index.sync()
    with open_index(tmp_path, web, "other") as index:
        assert paths_found(index, "car") == [], "no vectors of this model yet"
        index.sync()
        assert paths_found(index, "car")[0] == "/1.md"
    assert num_embedded(web) == 3 + 3 + 1


def test_when_the_server_fails_words_decide_and_the_log_says_so(
    web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_index(tmp_path, web) as index:
        add(index, DOCUMENTS)
        index.sync()
        web.answers.clear()
        with caplog.at_level(logging.WARNING):
            assert paths_found(index, "the sea") == ["/2.md", "/1.md"]
        assert "searching by words alone: The embeddings server answers with status 404" in caplog.text


def test_when_the_server_fails_while_adding_words_are_indexed_and_the_rest_is_done_later(
    web: Web, tmp_path: Path
) -> None:
    web.answers.clear()
    with open_index(tmp_path, web) as index:
        add(index, DOCUMENTS)
        with pytest.raises(EmbeddingError):
            index.sync()
        assert paths_found(index, "sea") == ["/2.md"]
        web.answers["/v1/embeddings"] = embeddings
        index.sync()
        assert paths_found(index, "car")[0] == "/1.md"


def test_a_damaged_file_of_vectors_is_begun_anew(web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_index(tmp_path, web) as index:
        add(index, DOCUMENTS)
        index.sync()
    (tmp_path / FILE).write_bytes(b"nonsense" * 1000)
    with open_index(tmp_path, web) as index, caplog.at_level(logging.WARNING):
        assert paths_found(index, "sea") == ["/2.md"]
        assert "searching by words alone" in caplog.text
        index.sync()
        assert "computed again" in caplog.text
        assert paths_found(index, "car")[0] == "/1.md"


def test_a_model_that_changed_its_dimensions_is_told(
    web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_index(tmp_path, web) as index:
        add(index, DOCUMENTS)
        index.sync()
        answer = {"data": [{"index": 0, "embedding": [1.0] * 9}]}
        web.answers["/v1/embeddings"] = Answer(body=json.dumps(answer).encode())
        assert paths_found(index, "sea") == ["/2.md"]
    assert "have another length now" in caplog.text


def test_texts_are_sent_in_batches_and_rows_have_length_1(web: Web) -> None:
    with EmbeddingClient(f"{web.root}/v1/", "m") as client:
        rows = client.embed([f"car {number}" for number in range(150)])
    assert rows.shape == (150, 4)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0)
    assert [len(json.loads(seen.body)["input"]) for seen in web.seen] == [64, 64, 22]


def answered(data: Any) -> Answer:
    return Answer(body=json.dumps({"data": data}).encode())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(status=401), "status 401"),
        (Answer(status=500), "status 500"),
        (Answer(body=b"no json"), "is not what OpenAI's would be"),
        (Answer(body=b"[]"), "is not what OpenAI's would be"),
        (Answer(body=b"[" * 100_000), "is not what OpenAI's would be"),
        (answered([{"index": 0, "embedding": "AAAA"}]), "is not what OpenAI's would be"),
        (answered([]), "gave 0 vectors for 2 texts"),
        (answered([{"index": 0, "embedding": [1.0]}] * 2), "gave 2 vectors for 2 texts"),
        (answered([{"index": i, "embedding": [1.0] * (i + 1)} for i in range(2)]), "gave 2 vectors for 2 texts"),
        (answered([{"index": i, "embedding": []} for i in range(2)]), "have 0 dimensions"),
        (answered([{"index": i, "embedding": [1.0] * 16_385} for i in range(2)]), "have 16385 dimensions"),
        (answered([{"index": i, "embedding": [0.0]} for i in range(2)]), "a vector of no length"),
        (answered([{"index": i, "embedding": [float("nan")]} for i in range(2)]), "a vector of no length"),
        (answered([{"index": i, "embedding": [1e39]} for i in range(2)]), "a vector of no length"),
        (Answer(raw=b"garbage\r\n\r\n"), "cannot be reached"),
        (Answer(status=302, headers={"Location": "/v1/embeddings"}), "status 302"),
    ],
)
def test_an_answer_of_no_use_is_an_error(web: Web, answer: Answer, message: str) -> None:
    web.answers["/v1/embeddings"] = answer
    with EmbeddingClient(web.root, "m") as client, pytest.raises(EmbeddingError, match=message):
        client.embed(["a", "b"])


def test_an_endless_answer_is_cut_off(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm.search.embeddings._MAX_BYTES", 1000)
    web.answers["/v1/embeddings"] = Answer(raw=b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 100_000, holds=True)
    with EmbeddingClient(web.root, "m") as client, pytest.raises(EmbeddingError, match="is larger than 1,000 bytes"):
        client.embed(["a"])


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="is no web address"):
        EmbeddingClient("localhost:8001", "m")
