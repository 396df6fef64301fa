"""Measure the local index: how fast documents go in, and how long a question takes on tantivy and on FTS5.

    python bench/search.py --output bench/results/NAME.jsonl

Chunks are synthetic: 60 words of a vocabulary of 200,000 with Zipf's frequencies, 20 chunks to a document. A question
has six words, two of the 20 commonest and four of a chunk that exists; any of them may match, the best 10 are returned.
Each backend answers the same questions in every run. `index_*` is the BM25 index alone, `search_*` is what a caller
waits for: terms, BM25, and the texts of the hits from SQLite. Each result is one JSON line.
"""

import argparse
import json
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lfm.search.analyser import query_terms
from lfm.search.chunks import Chunk
from lfm.search.extraction import Extractor
from lfm.search.fts5_index import Fts5Index
from lfm.search.indexing import add_paths
from lfm.search.local_index import LocalIndex
from lfm.search.store import NewDocument
from lfm.search.tantivy_index import TantivyIndex
from lfm.search.text_index import TextIndex

VOCABULARY = 200_000
WORDS_PER_CHUNK = 60
CHUNKS_PER_DOCUMENT = 20
NUM_COMMON = 20  # the words that count as common
NUM_WARM_UP = 20
BATCH_DOCUMENTS = 200
TOP = 10
FILE_CHUNKS = 10  # of the documents that are read from files


class Corpus:
    """The same synthetic text for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = {"".join(self._random.choices(letters, k=self._random.randint(2, 10))) for _ in range(2 * VOCABULARY)}
        self.words = sorted(words)[:VOCABULARY]
        self._random.shuffle(self.words)
        total, self._cumulative = 0.0, []
        for rank in range(1, len(self.words) + 1):
            total += 1 / rank
            self._cumulative.append(total)

    def text(self) -> str:
        """One chunk, in sentences of twelve words."""
        words = self._random.choices(self.words, cum_weights=self._cumulative, k=WORDS_PER_CHUNK)
        sentences = (words[first : first + 12] for first in range(0, len(words), 12))
        return " ".join(" ".join(sentence).capitalize() + "." for sentence in sentences) + "\n\n"

    def documents(self, num_chunks: int) -> Iterator[NewDocument]:
        for number in range(num_chunks // CHUNKS_PER_DOCUMENT):
            texts = [self.text() for _ in range(CHUNKS_PER_DOCUMENT)]
            chunks, end = [], 0
            for text in texts:
                chunks.append(Chunk(start=end, end=end + len(text), text=text))
                end += len(text)
            yield NewDocument(
                path=f"/{number}.txt",
                title=f"document {number}",
                kind="text",
                sha256=number.to_bytes(8, "big"),
                recipe="bench",
                num_bytes=end,
                chunks=chunks,
            )

    def question(self, chunk: str) -> str:
        rare = [word for word in chunk.lower().replace(".", "").split() if word not in self.words[:NUM_COMMON]]
        words = self._random.sample(self.words[:NUM_COMMON], 2) + self._random.sample(rare, 4)
        self._random.shuffle(words)
        return " ".join(words)


def quantile_ms(seconds: Sequence[float], share: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, round(share * len(seconds)))] * 1e3


class Timing(NamedTuple):
    """What one question took: seconds of the clock, and of the processor in this process."""

    wall_s: float
    cpu_s: float


def timed(call: Callable[[str], object], questions: Sequence[str]) -> list[Timing]:
    timings = []
    for question in questions:
        start = Timing(time.perf_counter(), time.process_time())
        call(question)
        timings.append(Timing(time.perf_counter() - start.wall_s, time.process_time() - start.cpu_s))
    return timings


def latency(name: str, call: Callable[[str], object], questions: Sequence[str], num_runs: int) -> dict[str, object]:
    """p50 and p99 of each run in ms: the medians over the runs, and (largest - smallest) / median.

    `cpu` is processor time, which does not count what else runs on the machine.
    """
    timed(call, questions[:NUM_WARM_UP])
    runs = [timed(call, questions) for _ in range(num_runs)]
    result: dict[str, object] = {}
    for label, share in (("p50", 0.5), ("p99", 0.99)):
        for kind, column in (("ms", 0), ("cpu_ms", 1)):
            values = [quantile_ms([timing[column] for timing in run], share) for run in runs]
            median = statistics.median(values)
            result[f"{name}_{label}_{kind}"] = round(median, 3)
            result[f"{name}_{label}_{kind}_spread"] = round((max(values) - min(values)) / median, 3)
    return result


def measure(
    backend: str, folder: Path, *, num_chunks: int, num_questions: int, num_runs: int, seed: int
) -> dict[str, object]:
    """Build an index of `num_chunks` and ask it. The truth is written first, then the BM25 index follows it."""
    corpus = Corpus(seed)
    text_index: TextIndex
    text_index = TantivyIndex(folder / "bm25.tantivy") if backend == "tantivy" else Fts5Index(folder / "bm25.sqlite")
    with LocalIndex(folder, text_index=text_index) as index:
        batch: list[NewDocument] = []
        num_bytes, write_s = 0, 0.0
        for document in corpus.documents(num_chunks):
            batch.append(document)
            num_bytes += document.num_bytes
            if len(batch) == BATCH_DOCUMENTS or (document.path == f"/{num_chunks // CHUNKS_PER_DOCUMENT - 1}.txt"):
                start_s = time.perf_counter()
                index.store.write(batch)
                write_s += time.perf_counter() - start_s
                batch = []
        start_s = time.perf_counter()
        index.sync()
        build_s = time.perf_counter() - start_s
        ids = corpus._random.sample(range(1, num_chunks + 1), num_questions)
        chunks = index.store.chunks(ids)
        questions = [corpus.question(chunks[chunk_id].text) for chunk_id in ids]
        result: dict[str, object] = {
            "measure": "questions",
            "backend": backend,
            "chunks": num_chunks,
            "megabytes": round(num_bytes / 1e6, 1),
            "questions": num_questions,
            "runs": num_runs,
            "write_truth_s": round(write_s, 2),
            "build_index_s": round(build_s, 2),
            "build_megabytes_per_s": round(num_bytes / 1e6 / build_s, 2),
            "index_megabytes": round(size_of(folder, "bm25*") / 1e6, 1),
            "truth_megabytes": round(size_of(folder, "documents.sqlite") / 1e6, 1),
        }
        result |= latency(
            "index", lambda question: text_index.search(query_terms(question), limit=TOP), questions, num_runs
        )
        result |= latency("search", lambda question: index.search(question, limit=TOP), questions, num_runs)
    return result


def measure_files(folder: Path, *, num_files: int, num_runs: int, seed: int) -> dict[str, object]:
    """`lfm index add` of Markdown files: reading, hashing, cutting, writing and indexing; then again, unchanged."""
    corpus = Corpus(seed)
    files = folder / "files"
    files.mkdir()
    num_bytes = 0
    for number in range(num_files):
        text = "".join(f"## Part {part}\n\n{corpus.text()}" for part in range(FILE_CHUNKS))
        num_bytes += (files / f"{number}.md").write_text(text)
    added_s, unchanged_s = [], []
    for run in range(num_runs):
        with LocalIndex(folder / f"index-{run}") as index:
            for seconds in (added_s, unchanged_s):
                start_s = time.perf_counter()
                add_paths(index, [files], extractor=Extractor(), on_progress=lambda line: None)
                seconds.append(time.perf_counter() - start_s)
    median_s = statistics.median(added_s)
    return {
        "measure": "add files",
        "files": num_files,
        "megabytes": round(num_bytes / 1e6, 1),
        "runs": num_runs,
        "added_s": round(median_s, 3),
        "spread": round((max(added_s) - min(added_s)) / median_s, 3),
        "documents_per_s": round(num_files / median_s),
        "megabytes_per_s": round(num_bytes / 1e6 / median_s, 2),
        "unchanged_documents_per_s": round(num_files / statistics.median(unchanged_s)),
    }


def size_of(folder: Path, pattern: str) -> int:
    return sum(
        path.stat().st_size for match in folder.glob(pattern) for path in (match, *match.rglob("*")) if path.is_file()
    )


def machine() -> dict[str, object]:
    """Where this was measured. The load tells how much else ran at the start."""
    import tantivy

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "tantivy": tantivy.__version__,
        "sqlite": sqlite3.sqlite_version,
        "commit": commit or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[10_000, 200_000])
    parser.add_argument("--backends", nargs="+", default=["tantivy", "fts5"], choices=["tantivy", "fts5"])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    where = machine()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for num_chunks in options.chunks:
            for backend in options.backends:
                place = Path(folder, f"{backend}-{num_chunks}")
                result = measure(
                    backend,
                    place,
                    num_chunks=num_chunks,
                    num_questions=options.questions,
                    num_runs=options.runs,
                    seed=options.seed,
                )
                results.append(result | where)
                print(json.dumps(results[-1]), flush=True)
        place = Path(folder, "add")
        place.mkdir()
        result = measure_files(place, num_files=options.files, num_runs=options.runs, seed=options.seed)
        results.append(result | where)
        print(json.dumps(results[-1]), flush=True)
    if options.output:
        options.output.write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
