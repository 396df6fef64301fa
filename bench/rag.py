"""Measure retrieval: how fast documents go in, how long a question takes on tantivy and on FTS5, and whole answers.

    PYTHONPATH=. python bench/rag.py --output bench/results/NAME.jsonl
    PYTHONPATH=. python bench/rag.py --parts answers --model random:tiny

index    Chunks are synthetic: 60 words of a vocabulary of 200,000 with Zipf's frequencies, 20 chunks to a document. A
         question has six words, two of the `--common` commonest and four of a chunk that exists; any of them may match,
         the best 10 are returned. Each backend answers the same questions in every run. `index_*` is the BM25 index
         alone, `search_*` is what a caller waits for: terms, BM25, and the texts of the hits from SQLite.
files    `lfm index add` of Markdown files, new and unchanged.
answers  A server of its own, 64 callers at once, each with its next question as soon as the last one is answered:
         `documents` asks about the same documents, sent with every question; `search` has the model search first, in an
         index of 10,000 chunks. A model with random weights writes noise, at the cost of a real one of its size.

Each result is one JSON line.
"""

import argparse
import asyncio
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

import httpx2

from lfm.cli.own_server import own_server
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
NUM_WARM_UP = 20
BATCH_DOCUMENTS = 200
TOP = 10
FILE_CHUNKS = 10  # of the documents that are read from files
NUM_DOCUMENTS = 4  # that are sent with every question
ANSWER_TOKENS = 32
SEARCH_TOKENS = 128  # for the call and the answer: noise ends where it likes
QUOTE_BIAS = {"48": 6.0}  # the byte-level tokenizer's quote, so that a query of noise ends within some dozen characters


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

    def question(self, chunk: str, num_common: int) -> str:
        rare = [word for word in chunk.lower().replace(".", "").split() if word not in self.words[:num_common]]
        words = self._random.sample(self.words[:num_common], 2) + self._random.sample(rare, 4)
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
    backend: str, folder: Path, *, num_chunks: int, num_questions: int, num_common: int, num_runs: int, seed: int
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
        questions = [corpus.question(chunks[chunk_id].text, num_common) for chunk_id in ids]
        result: dict[str, object] = {
            "measure": "questions",
            "backend": backend,
            "chunks": num_chunks,
            "megabytes": round(num_bytes / 1e6, 1),
            "questions": num_questions,
            "common": num_common,
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


class Outcome(NamedTuple):
    """One question: seconds until its answer, and its tokens. `is_searched`: a search was made and could be."""

    latency_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    is_searched: bool


def measure_answers(
    kind: str, folder: Path, *, model: str, num_questions: int, concurrency: int, num_runs: int, seed: int
) -> dict[str, object]:
    """Whole answers over HTTP. `kind` is documents or search."""
    corpus = Corpus(seed)
    with LocalIndex(folder) as index:
        index.store.write(list(corpus.documents(10_000)))
        index.sync()
    with own_server(model, {"--index": folder, "--max-searches": 1}) as root:
        runs = [
            asyncio.run(ask_all(root, kind, corpus, model=model, num_questions=num_questions, concurrency=concurrency))
            for _ in range(num_runs + 1)  # the first one warms up
        ][1:]
    rates = [num_questions / duration_s for duration_s, _ in runs]
    outcomes = [outcome for _, found in runs for outcome in found]
    latencies = [outcome.latency_s for outcome in outcomes]
    num_prompt = sum(outcome.num_prompt_tokens for outcome in outcomes)
    median = statistics.median(rates)
    return {
        "measure": f"answers from {kind}",
        "model": model,
        "concurrency": concurrency,
        "questions": num_questions,
        "runs": num_runs,
        "questions_per_s": round(median, 2),
        "spread": round((max(rates) - min(rates)) / median, 3),
        "latency_p50_ms": round(quantile_ms(latencies, 0.5), 1),
        "latency_p99_ms": round(quantile_ms(latencies, 0.99), 1),
        "prompt_tokens": round(num_prompt / len(outcomes), 1),
        "output_tokens": round(sum(outcome.num_output_tokens for outcome in outcomes) / len(outcomes), 1),
        "prefix_hit_rate": round(sum(outcome.num_cached_tokens for outcome in outcomes) / num_prompt, 4),
        "searched": sum(outcome.is_searched for outcome in outcomes),
    }


async def ask_all(
    root: str, kind: str, corpus: Corpus, *, model: str, num_questions: int, concurrency: int
) -> tuple[float, list[Outcome]]:
    """Seconds for all questions, and what became of each."""
    documents = [corpus.text().strip() for _ in range(NUM_DOCUMENTS)]
    questions = [corpus.question(documents[number % NUM_DOCUMENTS], 20) for number in range(num_questions)]
    waiting, outcomes = iter(questions), []
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(timeout=600.0, limits=limits) as client:

        async def one_caller() -> None:
            for question in waiting:
                outcomes.append(await ask(client, root, kind, question, documents, model=model))

        start_s = time.perf_counter()
        await asyncio.gather(*(one_caller() for _ in range(concurrency)))
        return time.perf_counter() - start_s, outcomes


async def ask(
    client: httpx2.AsyncClient, root: str, kind: str, question: str, documents: Sequence[str], *, model: str
) -> Outcome:
    if kind == "documents":
        path, body = (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": question}],
                "documents": list(documents),
                "max_tokens": ANSWER_TOKENS,
                "ignore_eos": True,
            },
        )
    else:
        path, body = (
            "/v1/responses",
            {
                "input": question,
                "tools": [{"type": "web_search", "external_web_access": False, "search_context_size": "low"}],
                "tool_choice": {"type": "web_search"},
                "max_output_tokens": SEARCH_TOKENS,
                "logit_bias": QUOTE_BIAS if model.startswith("random:") else None,
                "store": False,
            },
        )
    start_s = time.perf_counter()
    response = await client.post(f"{root}{path}", json={"model": model, **body})
    latency_s = time.perf_counter() - start_s
    response.raise_for_status()
    answer = response.json()
    usage = answer["usage"]
    if kind == "documents":
        counts = (usage["prompt_tokens"], usage["cached_tokens"], usage["completion_tokens"])
        return Outcome(latency_s, *counts, is_searched=False)
    items = [item for item in answer["output"] if item["type"] == "web_search_call"]
    counts = (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"], usage["output_tokens"])
    return Outcome(latency_s, *counts, is_searched=any(item["status"] == "completed" for item in items))


def size_of(folder: Path, pattern: str) -> int:
    found = (path for match in folder.glob(pattern) for path in (match, *match.rglob("*")))
    return sum(path.stat().st_size for path in found if path.is_file())


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


def index_results(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, object]]:
    for num_chunks in options.chunks:
        for backend in options.backends:
            yield measure(
                backend,
                folder / f"{backend}-{num_chunks}",
                num_chunks=num_chunks,
                num_questions=options.questions,
                num_common=options.common,
                num_runs=options.runs,
                seed=options.seed,
            )


def file_results(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, object]]:
    place = folder / "add"
    place.mkdir()
    yield measure_files(place, num_files=options.files, num_runs=options.runs, seed=options.seed)


def answer_results(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, object]]:
    for kind in ("documents", "search"):
        yield measure_answers(
            kind,
            folder / f"answers-{kind}",
            model=options.model,
            num_questions=options.answers,
            concurrency=options.concurrency,
            num_runs=options.runs,
            seed=options.seed,
        )


PARTS = {"index": index_results, "files": file_results, "answers": answer_results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--chunks", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--backends", nargs="+", default=["tantivy", "fts5"], choices=["tantivy", "fts5"])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--common", type=int, default=20)
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--model", default="random:tiny")
    parser.add_argument("--answers", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    where = machine()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            for result in PARTS[part](options, Path(folder)):
                results.append(result | where)
                print(json.dumps(results[-1]), flush=True)
    if options.output:
        options.output.write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
