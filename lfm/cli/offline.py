"""Runs the workloads of `bench offline` and describes the results.

Token ids go in and come out: no tokenizer, no HTTP, ids beyond the tokenizer allowed. `limit_share` compares with what
the device's memory and arithmetic allow (`lfm.model.limits`); it is null for devices whose peak was not measured.
"""

import contextlib
import gc
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lfm.cli.facts import git_commit, run
from lfm.cli.loading import load_llm
from lfm.cli.terminal import note
from lfm.config import EngineConfig
from lfm.errors import InternalError, MachineError
from lfm.kernels.weights import Norm, Router
from lfm.llm import LLM
from lfm.model.limits import PEAKS, Workload, limit_seconds
from lfm.protocol import EngineRequest, SamplingParams

ZIPF_SCALE = 0.19 * 6**0.5 / math.pi
COUNTED_TOKENS = 64  # decoding steps in which the experts are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Where a result was measured; None where the machine does not tell."""

    commit: str | None
    gpu: str | None
    driver: str | None
    torch: str
    triton: str | None

    @classmethod
    def of_this_machine(cls, commit: str | None) -> "Facts":
        """`commit` stands in where there is no git checkout."""
        has_gpu = torch.cuda.is_available()
        return cls(
            commit=git_commit() or commit,
            gpu=torch.cuda.get_device_name() if has_gpu else None,
            driver=run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if has_gpu else None,
            torch=torch.__version__,
            triton=_version_of("triton"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One workload's result. `spread` is (slowest - fastest) / median; rates are of the median run."""

    workload: str
    model: str
    quantize: str
    kv_dtype: str
    dtype: str
    commit: str | None
    gpu: str | None
    driver: str | None
    torch: str
    triton: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    sampling: str
    runs_s: list[float]
    spread: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    limit_share: float | None
    experts_hit: float | None
    host_ms_per_step: float | None
    cache_tokens: int  # that K, V and tails of the pool have room for


def measure(config: EngineConfig, workloads: Sequence[Workload], *, num_runs: int, facts: Facts) -> Iterator[Result]:
    """Load the model (once without and once with prefix caching, as needed) and yield each workload's result."""
    for has_prefix in (False, True):
        group = [workload for workload in workloads if bool(workload.shared_tokens) is has_prefix]
        if not group:
            continue
        yield from _measure_group(replace(config, prefix_caching=has_prefix), group, num_runs=num_runs, facts=facts)
        _free_device_memory()


def _measure_group(
    config: EngineConfig, workloads: Sequence[Workload], *, num_runs: int, facts: Facts
) -> Iterator[Result]:
    with load_llm(config) as llm:
        for workload in workloads:
            note(f"{workload.name}: one run to warm up, {num_runs} timed")
            yield _measure(llm, workload, config=config, num_runs=num_runs, facts=facts)


def _free_device_memory() -> None:
    """Give back what an engine that nobody holds any more took: the next one needs all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure(llm: LLM, workload: Workload, *, config: EngineConfig, num_runs: int, facts: Facts) -> Result:
    prompts = _Prompts(workload, vocab_size=llm.source.config.vocab_size)
    with _routing(llm, workload):
        hit = _mean_experts_hit(llm, prompts.new_requests(max_output_tokens=COUNTED_TOKENS))
        _run_once(llm, prompts.new_requests(), workload)
        llm.engine.host_ms.clear()
        runs_s = [_run_once(llm, prompts.new_requests(), workload) for _ in range(num_runs)]
    median_s = statistics.median(runs_s)
    input_tokens = workload.shared_tokens + workload.input_tokens
    output_tokens = workload.num_timed_tokens
    timed_tokens = output_tokens + (0 if workload.is_decode_only else workload.requests * input_tokens)
    return Result(
        workload=workload.name,
        model=llm.source.name,
        quantize=config.quantize,
        kv_dtype=config.kv_dtype,
        dtype=llm.engine.info.dtype,
        **asdict(facts),
        requests=workload.requests,
        input_tokens=input_tokens,
        output_tokens=workload.output_tokens,
        sampling=workload.sampling,
        runs_s=[round(seconds, 5) for seconds in runs_s],
        spread=round((max(runs_s) - min(runs_s)) / median_s, 4),
        output_tokens_per_s=round(output_tokens / median_s, 1),
        total_tokens_per_s=round(timed_tokens / median_s, 1),
        limit_share=_limit_share(llm, workload, config, seconds=median_s, gpu=facts.gpu, hit=hit),
        experts_hit=None if hit is None else round(hit, 2),
        host_ms_per_step=round(statistics.median(llm.engine.host_ms), 4) if llm.engine.host_ms else None,
        cache_tokens=llm.engine.info.num_blocks * llm.engine.info.block_size,
    )


class _Prompts:
    """New random ids for every run, so that nothing is found in a cache; the runs of two processes are the same."""

    def __init__(self, workload: Workload, *, vocab_size: int) -> None:
        self._workload = workload
        self._vocab_size = vocab_size
        self._random = random.Random(workload.name)
        self._num_made = 0

    def new_requests(self, *, max_output_tokens: int | None = None) -> list[EngineRequest]:
        shared = self._ids(self._workload.shared_tokens)
        output_tokens = min(self._workload.output_tokens, max_output_tokens or self._workload.output_tokens)
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0)
        if self._workload.sampling == "default":
            sampling = SamplingParams(max_tokens=output_tokens, temperature=0.1, top_k=50, repetition_penalty=1.05)
        requests = []
        for _ in range(self._workload.requests):
            self._num_made += 1
            requests.append(
                EngineRequest(
                    request_id=f"{self._workload.name}-{self._num_made}",
                    prompt_ids=shared + self._ids(self._workload.input_tokens),
                    sampling=sampling,
                    mask_padded_ids=False,
                )
            )
        return requests

    def _ids(self, count: int) -> list[int]:
        return self._random.choices(range(self._vocab_size), k=count)


def _run_once(llm: LLM, requests: list[EngineRequest], workload: Workload | None = None) -> float:
    """Seconds from the submission of all requests, or from everyone's first token, to the last token on the host."""
    num_expected = sum(request.sampling.max_tokens for request in requests)
    num_tokens = 0
    waits_for_first = {request.request_id for request in requests} if workload and workload.is_decode_only else set()
    start_s = time.perf_counter()
    for events in llm.run(requests):
        num_tokens += sum(len(event.token_ids) for event in events)
        if waits_for_first:
            waits_for_first -= {event.request_id for event in events if event.token_ids}
            start_s = time.perf_counter()
    seconds = time.perf_counter() - start_s
    if num_tokens != num_expected:
        raise InternalError(f"The engine made {num_tokens} tokens where {num_expected} were asked for.")
    return seconds


def _mean_experts_hit(llm: LLM, requests: list[EngineRequest]) -> float | None:
    """Distinct experts per MoE layer and step that only decodes, counted in a run of its own: counting waits."""
    runner, counts = llm.engine.runner, list[int]()
    ops = runner.ops

    def route(h_TD: Tensor, norm: Norm, router: Router, is_real_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x_TD, chosen_TA, weights_TA = ops.route(h_TD, norm, router, is_real_T)
        if len(h_TD) <= len(requests):  # a step with a chunk of a prompt has more tokens than there are sequences
            counts.append(len(set(chosen_TA.flatten().tolist())))
        return x_TD, chosen_TA, weights_TA

    with runner.observed(replace(ops, route=route, moe=None)):
        _run_once(llm, requests)
    return statistics.fmean(counts) if counts else None


def _limit_share(
    llm: LLM, workload: Workload, config: EngineConfig, *, seconds: float, gpu: str | None, hit: float | None
) -> float | None:
    """The share of the best possible speed; None for a device of unknown peak or a dtype that it does not hold for."""
    peak = PEAKS.get(gpu or "")
    if peak is None or llm.engine.info.dtype != "bfloat16":
        return None
    limit_s = limit_seconds(
        llm.source.config,
        workload,
        peak,
        decode_experts_hit=hit,
        quantize=config.quantize,
        kv_dtype=config.kv_dtype,
    )
    return round(limit_s / seconds, 4)


@contextlib.contextmanager
def _routing(llm: LLM, workload: Workload) -> Iterator[None]:
    """Bias every router so that experts are as popular as a Zipf law says, where the workload asks for it.

    The best of scores plus -c ln(rank) follows the law if the scores' noise is Gumbel-like with scale c. The scores of
    random weights are sigmoids of normal numbers of deviation 0.9: their deviation is 0.19, and c = 0.19 sqrt(6) / pi.
    """
    biases = [buffer for name, buffer in llm.engine.runner.model.named_buffers() if name.endswith("expert_bias")]
    kept = [bias.clone() for bias in biases]
    for bias in biases if workload.routing == "zipf" else ():
        bias -= ZIPF_SCALE * torch.arange(1, len(bias) + 1, device=bias.device).log()
    try:
        yield
    finally:
        for bias, values in zip(biases, kept, strict=True):
            bias.copy_(values)


@contextlib.contextmanager
def results_file(path: Path | None) -> Iterator[Callable[[Result], None]]:
    """A function that writes a result to `path` at once, as one JSON line. Raises MachineError for a bad path."""

    if path is None:
        yield lambda result: None
        return
    try:
        file = path.open("w", encoding="utf-8")  # before the model loads: a bad path should not cost minutes
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error.strerror}). Choose another --output.") from error
    with file:

        def write(result: Result) -> None:
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()

        yield write


def print_results(results: Sequence[Result]) -> None:
    """A table for people, then one JSON line per workload for programs."""
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("workload", "n x in/out", "median s", "spread", "out tok/s", "all tok/s", "limit", "host ms"):
        table.add_column(heading, justify="left" if heading == "workload" else "right", no_wrap=True)
    for result in results:
        share = "-" if result.limit_share is None else f"{result.limit_share:.1%}"
        table.add_row(
            result.workload,
            f"{result.requests} x {result.input_tokens}/{result.output_tokens}",
            f"{statistics.median(result.runs_s):.3f}",
            f"{result.spread:.1%}",
            f"{result.output_tokens_per_s:,.0f}",
            f"{result.total_tokens_per_s:,.0f}",
            share,
            "-" if result.host_ms_per_step is None else f"{result.host_ms_per_step:.2f}",
        )
    Console().print(table)
    Console().print("the cache holds " + ", ".join(sorted({f"{r.cache_tokens:,} tokens" for r in results})))
    for result in results:
        print(json.dumps(asdict(result)), flush=True)


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
