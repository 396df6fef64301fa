"""Measure grammars on a CPU: what new tools cost, and what each constrained token costs.

    python bench/structured.py --output bench/results/NAME.jsonl

`build`: tools with a required string, a required enum, an optional integer and a nested object each, no two alike.
`read_ms` walks their schemas, `write_ms` writes the grammar, `compile_ms` is the library's work up to the first mask
after the start token, and `known_ms` is all of it when the same tools come again. Medians of the runs, in processor
time of the thread. The vocabulary is compiled before, once per server, in some 0.2 s.

`masks`: 32 requests with 32 different schemas, token by token, for calls in both forms, answers from a schema and
answers of any JSON object. The texts are sensible ones, made from the schemas and cut into the longest tokens, because
that is what a model writes. `mask_us` is the mask of one token that is chosen, `step_us` all that the grammar costs for
it: the token before it accepted, forced ones taken, the mask. `forced_share` is the share of tokens that the grammar
forces: they have no mask, and are computed several at once like a prompt.

`decode`: 32 requests at once on `random:tiny` in this process, with 32 different schemas whose answers are too long for
max_tokens, against the same requests without grammars; grammars known before. `forced`: runs of forced tokens taken at
once, as served, or every token sampled. A run has every way in turn, and is compared in itself. `ratio` is the tokens
per second against those without grammars, and `cpu_ratio` the same by processor time of the whole process, which what
else runs on the machine does not touch; so are `us_per_step`, and `row_us`, what each of the 32 rows adds to a step.

The vocabulary of all but `decode` is synthetic: 65,536 byte strings, LFM2's special tokens, the 256 bytes, then the
commonest pieces of words, numbers, punctuation and white space in Python's own standard library, as byte-pair merging
would find them.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import llguidance
import numpy as np
import torch

from lfm.chat.grammar import AnswerFormat, answer_grammar, calls_grammar
from lfm.chat.grammar_calls import ToolGrammar
from lfm.chat.grammar_tools import ToolChoice, ToolSets
from lfm.chat.messages import ToolCall
from lfm.chat.schema import read_schema
from lfm.chat.tokenizer import SpecialTokens
from lfm.chat.tokenizer_json import SPECIAL_TOKEN_TEXTS
from lfm.chat.tool_calls import CallForm, render_calls, render_json_calls
from lfm.config import EngineConfig
from lfm.engine.constraint import NEVER
from lfm.engine.grammar_library import TokenTable
from lfm.engine.grammar_masks import GrammarCache, GrammarMatcher, num_mask_words
from lfm.llm import LLM
from lfm.protocol import EngineRequest, GrammarSpec, SamplingParams

VOCABULARY = 65_536
MAX_PIECE = 16  # bytes of the longest token that is no run of white space
CONTEXT = 32_768
NUM_TOOLS = (1, 10, 50, 200)
NUM_SCHEMAS = 32
DECODE_TOKENS = 256
SPECIAL = SpecialTokens(bos=1, endoftext=2, im_start=6, im_end=7, tool_call_start=10, tool_call_end=11)
PIECES = re.compile(r" ?[A-Za-z]+|\d{1,3}| ?[^\sA-Za-z\d]+|\s+")
Result = dict[str, object]


class Vocabulary:
    """The synthetic tokens, and text cut into the longest of them."""

    def __init__(self) -> None:
        self.tokens = [text.encode() for text in SPECIAL_TOKEN_TEXTS] + [bytes((byte,)) for byte in range(256)]
        known = set(self.tokens)
        for piece in common_pieces():
            if len(self.tokens) == VOCABULARY:
                break
            if piece not in known:
                known.add(piece)
                self.tokens.append(piece)
        assert len(self.tokens) == VOCABULARY
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def encode(self, text: str) -> list[int]:
        rest, ids = text.encode(), []
        while rest:
            ids.append(next(self.longest_first(rest)))
            rest = rest[len(self.tokens[ids[-1]]) :]
        return ids

    def longest_first(self, data: bytes) -> Iterator[int]:
        """The tokens that the data begins with."""
        for length in range(min(MAX_PIECE, len(data)), 0, -1):
            if (token_id := self._ids.get(data[:length])) is not None:
                yield token_id

    def table(self) -> TokenTable:
        special_ids = range(len(SPECIAL_TOKEN_TEXTS))
        return TokenTable(self.tokens, special_ids=special_ids, stop_ids=[SPECIAL.im_end, 2], encode=self.encode)


def common_pieces() -> list[bytes]:
    """Pieces of the standard library's sources, the commonest first."""
    counts: Counter[str] = Counter()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for piece in PIECES.findall(path.read_text(encoding="utf-8", errors="replace")):
            for length in range(2, min(len(piece), MAX_PIECE) + 1):
                counts[piece[:length]] += 1
                counts[piece[-length:]] += 1
    found = sorted(counts, key=lambda piece: (-counts[piece], piece))
    rest = (f"{first}{last}" for first in found[:800] for last in found[:800])  # where the sources have too few
    return [piece.encode() for piece in [*found, *islice(rest, VOCABULARY)] if len(piece.encode()) <= MAX_PIECE]


def tool(index: int) -> Result:
    """One of many tools: an API's function with a nested object."""
    schema = {
        "type": "object",
        "properties": {
            f"city_{index}": {"type": "string", "description": "Name of the city"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit", f"unit {index}"]},
            "days": {"type": "integer", "description": "How far ahead"},
            "options": {
                "type": "object",
                "properties": {f"limit_{index}": {"type": "integer"}, "language": {"type": "string"}},
                "required": [f"limit_{index}", "language"],
            },
        },
        "required": [f"city_{index}", "unit"],
    }
    return {"type": "function", "function": {"name": f"get_weather_{index}", "description": "D", "parameters": schema}}


def arguments(index: int, choice: random.Random) -> dict[str, object]:
    """Sensible arguments of `tool(index)`."""
    words = ["the", "weather", "in", "a", "small", "town", "by", "the", "sea,", "north", "of", "old", "ports"]
    return {
        f"city_{index}": " ".join(choice.choices(words, k=choice.randint(2, 12))),
        "unit": choice.choice(["celsius", "fahrenheit", f"unit {index}"]),
        "days": choice.randint(1, 14),
        "options": {f"limit_{index}": choice.randint(0, 9999), "language": choice.choice(["en", "de", "fr"])},
    }


def cpu_ms(work: Callable[[], object]) -> float:
    """Milliseconds of this thread's processor time in one call: what else runs on the machine does not count."""
    started = time.thread_time()
    work()
    return (time.thread_time() - started) * 1e3


def wall_us(work: Callable[[], object]) -> float:
    """Microseconds of one call."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e6


def measure_builds(table: TokenTable, *, runs: int) -> Iterator[Result]:
    """What tools cost that were never seen, and what they cost the second time."""
    row = np.zeros(num_mask_words(VOCABULARY), dtype=np.int32)
    forms: tuple[CallForm, ...] = ("pythonic", "json")
    for form in forms:
        for count in NUM_TOOLS:
            tools = [tool(index) for index in range(count)]
            times: dict[str, list[float]] = {"read_ms": [], "write_ms": [], "compile_ms": [], "known_ms": []}
            for _ in range(runs):
                cache, sets = GrammarCache(lambda: table), ToolSets(max_tokens=CONTEXT)
                cache.matcher(answer_grammar(AnswerFormat()))  # the first one has the vocabulary compiled, once
                spec: list[GrammarSpec] = []

                def write() -> None:
                    spec.append(sets.read(tools).grammar(ToolChoice(), special=SPECIAL, form=form))  # noqa: B023

                def first_mask() -> None:
                    matcher = cache.matcher(spec[-1])  # noqa: B023
                    matcher.accept(SPECIAL.tool_call_start or 0)
                    matcher.fill(row)
                    assert matcher.error is None, matcher.error

                times["read_ms"].append(cpu_ms(lambda: sets.read(tools)))  # noqa: B023
                times["write_ms"].append(cpu_ms(write))
                times["compile_ms"].append(cpu_ms(first_mask))
                times["known_ms"].append(cpu_ms(write) + cpu_ms(first_mask))
                cache.close()
            medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
            yield {"measure": "build", "form": form, "tools": count, "grammar_chars": len(spec[-1].text), **medians}


def requests(kind: str, choice: random.Random) -> Iterator[tuple[GrammarSpec, str]]:
    """Grammars and texts that they allow, each from another schema."""
    for index in range(NUM_SCHEMAS):
        definition = tool(index)["function"]
        assert isinstance(definition, dict)
        schema = read_schema(definition["parameters"], param="p", max_tokens=CONTEXT)
        call = ToolCall(name=str(definition["name"]), arguments=arguments(index, choice))
        if kind in ("pythonic", "json"):
            form: CallForm = "json" if kind == "json" else "pythonic"
            spec = calls_grammar([ToolGrammar(call.name, schema)], special=SPECIAL, form=form, is_required=True)
            block = render_json_calls([call] * 2) if kind == "json" else render_calls([call] * 2)
            yield spec, f"<|tool_call_start|>{block}<|tool_call_end|>"
        else:
            answer = AnswerFormat(schema=schema) if kind == "schema" else AnswerFormat()
            yield answer_grammar(answer), json.dumps(call.arguments)


def measure_masks(vocabulary: Vocabulary, table: TokenTable, *, runs: int) -> Iterator[Result]:
    """What each token of constrained texts costs."""
    cache = GrammarCache(lambda: table)
    for kind in ("pythonic", "json", "schema", "any object"):
        walks = [
            walk(cache.matcher(spec), vocabulary, text)
            for run in range(runs)
            for spec, text in requests(kind, random.Random(run))
        ]
        num_chosen, num_forced = sum(len(one.mask_us) for one in walks), sum(one.num_forced for one in walks)
        yield {
            "measure": "masks",
            "kind": kind,
            "schemas": NUM_SCHEMAS,
            "tokens": num_chosen + num_forced,
            **{f"mask_us_{name}": value for name, value in spread([us for one in walks for us in one.mask_us]).items()},
            **{f"step_us_{name}": value for name, value in spread([us for one in walks for us in one.step_us]).items()},
            "forced_share": round(num_forced / (num_chosen + num_forced), 3),
        }
    cache.close()


@dataclass
class Walk:
    """The costs of one text: of each mask, and of all that a chosen token costs (accepted, forced ones taken, mask)."""

    mask_us: list[float] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)
    num_forced: int = 0


def walk(matcher: GrammarMatcher, vocabulary: Vocabulary, text: str) -> Walk:
    """Follow a text as the engine does: take what is forced, mask where there is a choice, accept what is chosen.

    Control tokens are written as their own text. Forced tokens may cut it elsewhere than the longest tokens would.
    """
    found = Walk()
    rest = text.encode()
    row = np.zeros(num_mask_words(VOCABULARY), dtype=np.int32)
    address = row.ctypes.data
    accepting_us = 0.0
    while True:
        started = time.perf_counter()
        forced = matcher.take_forced()
        forcing_us = (time.perf_counter() - started) * 1e6
        if SPECIAL.im_end in forced:
            return found
        spelt = b"".join(vocabulary.tokens[token_id] for token_id in forced)
        assert rest.startswith(spelt), f"{spelt!r} is forced where {rest[:80]!r} was meant"
        rest, found.num_forced = rest[len(spelt) :], found.num_forced + len(forced)
        mask_us = wall_us(lambda: matcher.fill(row, address=address))
        found.mask_us.append(mask_us)
        found.step_us.append(accepting_us + forcing_us + mask_us)
        if not rest:
            return found
        token_id = next(one for one in vocabulary.longest_first(rest) if row[one // 32] >> (one % 32) & 1)
        rest = rest[len(vocabulary.tokens[token_id]) :]
        accepting_us = wall_us(lambda: matcher.accept(token_id))  # noqa: B023
        assert matcher.error is None, matcher.error


class DecodeTime(NamedTuple):
    """What a batch of requests took."""

    wall_s: float
    cpu_s: float
    num_steps: int

    @property
    def step_us(self) -> float:
        return self.cpu_s / self.num_steps * 1e6


def decode_requests(run: int, *, is_constrained: bool, sampling: dict[str, object]) -> list[EngineRequest]:
    """One request for each schema: an array of more of its objects than fit."""
    found = []
    for index in range(NUM_SCHEMAS):
        definition = tool(index)["function"]
        assert isinstance(definition, dict)
        schema = {"type": "array", "items": definition["parameters"], "minItems": DECODE_TOKENS // 16}
        answer = AnswerFormat(schema=read_schema(schema, param="p", max_tokens=CONTEXT))
        params = SamplingParams(max_tokens=DECODE_TOKENS, seed=index, **sampling)  # type: ignore[arg-type]
        prompt = [1, *(20 + (run * 31 + index * 7 + i) % 200 for i in range(16))]
        found.append(
            EngineRequest(
                request_id=f"{run}-{index}-{is_constrained}",
                prompt_ids=prompt,
                sampling=params,
                grammar=answer_grammar(answer) if is_constrained else None,
            )
        )
    return found


def measure_decode(*, runs: int) -> Iterator[Result]:
    """Constrained against unconstrained decoding, end to end."""
    samplings: dict[str, dict[str, object]] = {"greedy": {"temperature": 0.0}, "random": {"temperature": 1.0}}
    config = EngineConfig(model="random:tiny", device="cpu", max_model_len=1024, max_running=NUM_SCHEMAS)
    torch.set_num_threads(1)
    with LLM(config) as llm:
        chunk = llm.engine.grammars.min_chunk
        for name, sampling in samplings.items():
            ways = {"none": (False, chunk), "one by one": (True, NEVER), "at once": (True, chunk)}
            times: dict[str, list[DecodeTime]] = {way: [] for way in ways}
            for run in range(runs + 1):
                for way, (is_constrained, llm.engine.grammars.min_chunk) in ways.items():
                    requests = decode_requests(run, is_constrained=is_constrained, sampling=sampling)
                    one = time_decode(llm, requests)
                    if run:  # the first one compiles the grammars
                        times[way].append(one)
            for way, found in times.items():
                pairs = list(zip(found, times["none"], strict=True))
                wall = [free.wall_s / one.wall_s for one, free in pairs]
                yield {
                    "measure": "decode",
                    "sampling": name,
                    "forced": way,
                    "requests": NUM_SCHEMAS,
                    "vocabulary": llm.source.config.vocab_size,
                    "tokens_per_s": round(NUM_SCHEMAS * DECODE_TOKENS / statistics.median(one.wall_s for one in found)),
                    "steps": found[0].num_steps,
                    "us_per_step": round(statistics.median(one.step_us for one in found)),
                    "row_us": round(
                        statistics.median(one.step_us - free.step_us for one, free in pairs) / NUM_SCHEMAS, 1
                    ),
                    "ratio": round(statistics.median(wall), 3),
                    "ratio_spread": [round(min(wall), 3), round(max(wall), 3)],
                    "cpu_ratio": round(statistics.median(free.cpu_s / one.cpu_s for one, free in pairs), 3),
                }


def time_decode(llm: LLM, requests: Sequence[EngineRequest]) -> DecodeTime:
    """Seconds and steps until all of them have ended, each by its length."""
    steps, started_s, started_cpu_s = llm.engine.stats().steps, time.perf_counter(), time.process_time()
    for events in llm.run(requests):
        for event in events:
            assert event.finish_reason in (None, "length"), event
    num_steps = llm.engine.stats().steps - steps
    return DecodeTime(time.perf_counter() - started_s, time.process_time() - started_cpu_s, num_steps)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the 99th percentile and the largest, in the unit of the values."""
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[int(len(ordered) * 0.99)], 2),
        "max": round(ordered[-1], 2),
    }


def place() -> Result:
    """Where this was measured."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "vocabulary": VOCABULARY,
        "commit": commit or "unknown",
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "llguidance": llguidance.__version__,
    }


def main() -> None:
    """Measure, print a line per result, and write them as JSON lines."""
    parser = argparse.ArgumentParser(description="Measure grammars on a CPU.")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=["build", "masks", "decode"], help="default: all three")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    vocabulary = Vocabulary()
    table = vocabulary.table()
    where = place()
    lines = []
    measures = {
        "build": measure_builds(table, runs=options.runs),
        "masks": measure_masks(vocabulary, table, runs=options.runs),
        "decode": measure_decode(runs=options.runs),
    }
    for results in (measures[name] for name in options.only or measures):
        for result in results:
            print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)
            lines.append(json.dumps({"runs": options.runs, **where, **result}) + "\n")
    if options.output is not None:
        options.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
