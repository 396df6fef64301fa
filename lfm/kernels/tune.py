"""Measure the tiles of the streaming kernels on this GPU and write them as one of `tuned/*.json`.

    python -m lfm.kernels.tune [--kinds bf16,fp8] [--parts stream,pairs,grouped,prefill] [--output FILE]

The shapes are those of LFM2-24B-A2B. Every candidate runs through the public op, in a CUDA graph over copies of the
weights that together are larger than L2; the median of several replays counts. Candidates are compiled beforehand in
parallel processes that never touch the GPU. What is not measured is taken over from the tables in force.
Experts are measured with uniform and with skewed routing (Zipf), and the sum of both times counts.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfm.kernels import norm as projections
from lfm.kernels import short_conv
from lfm.kernels.dry_run import compile_only
from lfm.kernels.experts import experts
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.fp8 import FP8
from lfm.kernels.moe_grouped import experts_grouped
from lfm.kernels.moe_grouped_fp8 import experts_grouped_fp8
from lfm.kernels.moe_small import experts_small
from lfm.kernels.tuned import (
    FOLDER,
    GroupedTile,
    GroupedTiles,
    PairTile,
    StreamTile,
    Tuned,
    WeightKind,
    replaced,
    tuned_for,
)
from lfm.kernels.weights import ExpertScales, Linear, Norm

HIDDEN, DENSE, QKV, EXPERTS, WIDTH, CHOSEN = 2048, 11_776, 3072, 64, 1536, 4  # LFM2-24B-A2B
L2_BYTES = 100e6  # weights of one measurement are at least this large, twice the L2 of an H200
REPLAYS = 15
FOREVER = 1 << 62
GROUPED_TOKENS = (8, 32, 128, 512)  # the upper ends of classes; the last is for everything beyond
PREFILL_TOKENS = (64, 128, 192, 256, 384, 512, 1024)


class Case(NamedTuple):
    """One entry of the tables: which part, which weights, which kernel and how many tokens."""

    part: str
    kind: WeightKind
    what: str
    tokens: int


class Tensors:
    """Weights and inputs of one case on a device (meta: for compiling), `copies` of the weights."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case = case
        self._device = device
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self._device).normal_(generator=self._generator)

    def linear(self, num_outputs: int, num_inputs: int) -> Linear:
        if self._case.kind == "bf16":
            return Linear(self.draw(num_outputs, num_inputs))
        scale = torch.full((num_outputs,), 1e-3, device=self._device)
        return Linear(self.draw(num_outputs, num_inputs).to(FP8), scale=scale)

    def norm(self) -> Norm:
        return Norm(self.draw(HIDDEN), 1e-5)

    def integers(self, values: Tensor) -> Tensor:
        return values.to(self._device)

    def routing(self, *, is_skewed: bool) -> Tensor:
        """Chosen experts [T, A], no expert twice."""
        generator = torch.Generator().manual_seed(1)
        popularity = 1 / torch.arange(1, EXPERTS + 1) if is_skewed else torch.ones(EXPERTS)
        weights = popularity.expand(self._case.tokens, EXPERTS)
        return self.integers(torch.multinomial(weights, CHOSEN, generator=generator))


def calls_of(case: Case, device: torch.device) -> list[list[Callable[[], Any]]]:
    """Launches to be timed together, one list per routing: each call has weights of its own."""
    tensors = Tensors(case, device)
    if case.part == "stream":
        return [_stream_calls(case, tensors)]
    item = 2 if case.kind == "bf16" else 1
    touched = min(EXPERTS, case.tokens * CHOSEN) * 3 * HIDDEN * WIDTH * item
    copies = _num_copies(touched, device)
    layers = [_expert_weights(case, tensors) for _ in range(copies)]
    h, x = tensors.draw(case.tokens, HIDDEN), tensors.draw(case.tokens, HIDDEN)
    shares = torch.full((case.tokens, CHOSEN), 0.25, device=device)
    run: Callable[..., Tensor] = {"pairs": experts_small, "grouped": experts_grouped, "prefill": experts}[case.part]
    if case.part == "grouped" and case.kind == "fp8":
        run = experts_grouped_fp8
    return [
        [_bound(run, h, x, chosen, shares, *layer) for layer in layers]
        for chosen in (tensors.routing(is_skewed=False), tensors.routing(is_skewed=True))
    ]


def _bound(run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: run(*args)


def _num_copies(touched_bytes: float, device: torch.device) -> int:
    return 1 if device.type == "meta" else max(1, round(0.5 + L2_BYTES / touched_bytes))


def _expert_weights(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor, ExpertScales | None]:
    if case.kind == "bf16":
        return tensors.draw(EXPERTS, 2 * WIDTH, HIDDEN), tensors.draw(EXPERTS, HIDDEN, WIDTH), None
    gate_up = tensors.draw(EXPERTS, 2 * WIDTH, HIDDEN).to(FP8)
    down = tensors.draw(EXPERTS, HIDDEN, WIDTH).to(FP8)
    device = gate_up.device
    scales = ExpertScales(
        torch.full((EXPERTS, 2 * WIDTH), 1e-3, device=device), torch.full((EXPERTS, HIDDEN), 1e-3, device=device)
    )
    return gate_up, down, scales


def _stream_calls(case: Case, tensors: Tensors) -> list[Callable[[], Any]]:
    shapes = {
        "project": (HIDDEN, HIDDEN), "norm_project": (QKV, HIDDEN), "project_add": (HIDDEN, HIDDEN),
        "down": (HIDDEN, DENSE), "gate_up": (2 * DENSE, HIDDEN), "conv_in": (3 * HIDDEN, HIDDEN),
    }  # fmt: skip
    outputs, inputs = shapes[case.what]
    h, x, a_norm = tensors.draw(case.tokens, HIDDEN), tensors.draw(case.tokens, inputs), tensors.norm()
    item = 2 if case.kind == "bf16" else 1
    calls: list[Callable[[], Any]] = []
    for _ in range(_num_copies(outputs * inputs * item, h.device)):
        weight = tensors.linear(outputs, inputs)
        if case.what == "project":
            calls.append(_bound(projections.project, x, weight))
        elif case.what == "norm_project":
            calls.append(_bound(projections.norm_project, h, a_norm, weight))
        elif case.what in ("project_add", "down"):
            calls.append(_bound(projections.project_add, h, x, weight))
        elif case.what == "gate_up":
            calls.append(_bound(projections.gated, h, a_norm, weight))
        else:
            taps, tails = Linear(tensors.draw(HIDDEN, 3)), tensors.draw(case.tokens + 1, 2, HIDDEN)
            calls.append(_bound(short_conv.conv_in, h, a_norm, weight, taps, _decode_batch(case, tensors), tails))
    return calls


def _decode_batch(case: Case, tensors: Tensors) -> ForwardBatch:
    """Rows of one token each, as the short convolution sees them."""
    count = case.tokens
    rows = tensors.integers(torch.arange(count))
    ones = tensors.integers(torch.arange(1, count + 1))
    return ForwardBatch(
        ids_T=rows, positions_T=ones, rows_T=rows, slots_T=rows, starts_S=ones,
        row_starts_S1=tensors.integers(torch.arange(count + 1)), block_tables_SN=rows[:, None],
        tail_read_S=ones, tail_write_W=ones, tail_token_W=rows, sample_T=rows,
        row_starts=tuple(range(count + 1)), starts=(1,) * count, num_positions=count + 2,
    )  # fmt: skip


def cases(kinds: Sequence[WeightKind], parts: Sequence[str]) -> Iterator[Case]:
    for kind, part in itertools.product(kinds, parts):
        if part == "stream":
            names = (
                "norm_project",
                "project_add",
                "down",
                "gate_up",
                "conv_in",
                *(["project"] if kind == "bf16" else []),
            )
            yield from (Case(part, kind, what, slots) for what in names for slots in (8, 16, 32))
        elif part == "pairs":
            yield from (Case(part, kind, what, tokens) for what, tokens in (("up", 1), ("down_one", 1), ("down", 3)))
        elif part == "grouped":
            yield from (Case(part, kind, what, tokens) for tokens in GROUPED_TOKENS for what in ("up", "down"))
        elif kind == "fp8":
            yield from (Case(part, kind, "prefill", tokens) for tokens in PREFILL_TOKENS)


def candidates(case: Case, tables: Tuned) -> list[Tuned]:
    """The tables to compare for one case: those in force first, each with one entry replaced by a candidate."""
    kind = case.kind
    if case.part == "stream":
        entries = tables.stream[kind]
        key = case.what, case.tokens
        without = {other: tile for other, tile in entries.items() if other != key}
        choices = [{**entries}, without] + [{**without, key: tile} for tile in _stream_tiles(case)]
        return [tables._replace(stream={**tables.stream, kind: choice}) for choice in choices]
    if case.part == "pairs":
        ahead = (4, 8) if case.what == "up" else (8, 12, 16, 24)
        tiles = [PairTile(*tile) for tile in itertools.product((4, 8, 16), (2, 4, 8), ahead)]
        mine = tables.pairs[kind]
        pair_choices = [mine] + [mine._replace(**{case.what: tile}) for tile in tiles]
        return [tables._replace(pairs={**tables.pairs, kind: choice}) for choice in pair_choices]
    if case.part == "grouped":
        mine_grouped = next(tiles for tiles in tables.grouped[kind] if case.tokens <= tiles.tokens)
        choices_grouped = [mine_grouped, *_grouped_tiles(case, mine_grouped)]
        return [
            tables._replace(grouped={**tables.grouped, kind: (tiles._replace(tokens=FOREVER),)})
            for tiles in choices_grouped
        ]
    return [tables._replace(fp8_prefill_tokens=first) for first in (FOREVER, 1)]


def _stream_tiles(case: Case) -> Iterator[StreamTile]:
    rows = {8: (8, 16), 16: (8, 16), 32: (16, 32)}[case.tokens]
    for row, warps, runs, ahead in itertools.product(rows, (4, 8), (4, 8, 16), (1, 2)):
        parts = -(-(DENSE if case.what == "down" else HIDDEN) // (32 * warps * runs))
        values = runs * max(row, case.tokens) * 4  # a lane's values of one part of the larger operand
        if ahead <= parts and values <= 1024:
            yield StreamTile(row, warps, runs, ahead, 255 if values * ahead > 256 else 168)


def _grouped_tiles(case: Case, mine: GroupedTiles) -> Iterator[GroupedTiles]:
    is_fp8 = case.kind == "fp8"
    item = 1 if is_fp8 else 2
    features = (32, 64, 128) if case.what == "up" else (64, 128)
    heights = (16,) if case.tokens < 64 else (16, 32, 64)
    if case.what == "down":
        heights = (mine.pairs,)
    shapes = itertools.product(heights, features, (64, 128, 256), (4, 8), (3, 4, 5))
    for pairs, feature, inputs, warps, stages in shapes:
        rows = feature * (2 if case.what == "up" else 1)
        stage_bytes = inputs * (rows * item + pairs * 2)
        is_narrow = rows < 64 or (warps == 8 and rows < 128)
        if not 16_000 <= stage_bytes * stages <= 110_000 or (is_fp8 and is_narrow):
            continue
        for swapped in (True,) if is_fp8 else (False, True):
            tile = GroupedTile(feature, inputs, warps, stages, swapped)
            yield mine._replace(pairs=pairs, up=tile) if case.what == "up" else mine._replace(pairs=pairs, down=tile)


def compile_all(jobs: Sequence[tuple[Case, Tuned]], capability: int, workers: int) -> None:
    """Fill Triton's cache with the kernels of all jobs, in processes of their own."""
    shares = [list(jobs[i::workers]) for i in range(workers)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for failed in pool.map(_compile_share, shares, itertools.repeat(capability)):
            for line in failed:
                print(line, flush=True)


def _compile_share(jobs: Sequence[tuple[Case, Tuned]], capability: int) -> list[str]:
    torch.set_num_threads(1)
    failed = []
    with compile_only(capability):
        for case, tables in jobs:
            try:
                with replaced(tables):
                    for calls in calls_of(case, torch.device("meta")):
                        calls[0]()
            except Exception as error:  # noqa: BLE001  (a candidate may not compile; it is named, and left out later)
                failed.append(f"{case}: does not compile: {type(error).__name__}: {str(error)[:100]}")
    return failed


def time_us(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one call, in a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * statistics.median(times) / len(calls)


def measure(case: Case, tables: Sequence[Tuned]) -> list[float]:
    """Microseconds for each of the tables, summed over routings; infinity where a kernel cannot run."""
    groups = calls_of(case, torch.device("cuda"))
    results = []
    for choice in tables:
        try:
            with replaced(choice):
                results.append(sum(time_us(calls) for calls in groups) / len(groups))
        except Exception as error:  # noqa: BLE001  (too much shared memory, too many registers: not this tile)
            print(f"  {case}: left out: {type(error).__name__}: {str(error)[:100]}", flush=True)
            results.append(float("inf"))
    return results


def tune(kinds: Sequence[WeightKind], parts: Sequence[str], *, workers: int) -> Tuned:
    """The tables in force, with the best of all candidates where those were measured."""
    device = torch.device("cuda", torch.cuda.current_device())
    tables = tuned_for(device)
    found: dict[Case, Tuned] = {}
    for stage in range(3):  # products of experts one after the other, then what is compared with the best of both
        now = [case for case in cases(kinds, parts) if _stage(case) == stage]
        if not now:
            continue
        so_far = _collect(tables, found)
        jobs = {case: candidates(case, found.get(case._replace(what="up"), so_far)) for case in now}
        major, minor = torch.cuda.get_device_capability(device)
        compile_all(
            [(case, choice) for case, choices in jobs.items() for choice in choices], 10 * major + minor, workers
        )
        for case, choices in jobs.items():
            times = measure(case, choices)
            best = min(range(len(times)), key=times.__getitem__)
            if times[best] > 0.98 * times[0]:
                best = 0
            found[case] = choices[best]
            tile = f", {_entry(case, choices[best])}" if best else ""
            print(f"{case.kind} {case.what} {case.tokens}: {times[0]:.2f} -> {times[best]:.2f} us{tile}", flush=True)
    return _collect(tables, found)


def _entry(case: Case, tables: Tuned) -> object:
    """What a case's tables say about it."""
    if case.part == "stream":
        return tables.stream[case.kind].get((case.what, case.tokens), "the library")
    if case.part == "pairs":
        return getattr(tables.pairs[case.kind], case.what)
    return tables.grouped[case.kind][0] if case.part == "grouped" else tables.fp8_prefill_tokens


def _stage(case: Case) -> int:
    if case.part == "prefill":
        return 2
    return 1 if case.part in ("pairs", "grouped") and case.what == "down" else 0


def _collect(tables: Tuned, found: dict[Case, Tuned]) -> Tuned:
    stream, pairs, grouped = dict(tables.stream), dict(tables.pairs), dict(tables.grouped)
    prefill = tables.fp8_prefill_tokens
    for case, choice in found.items():
        kind = case.kind
        if case.part == "stream":
            key = case.what, case.tokens
            stream[kind] = {k: tile for k, tile in stream[kind].items() if k != key}
            if key in choice.stream[kind]:
                stream[kind] = {**stream[kind], key: choice.stream[kind][key]}
        elif case.part == "pairs":
            pairs[kind] = pairs[kind]._replace(**{case.what: getattr(choice.pairs[kind], case.what)})
    for kind in ("bf16", "fp8"):
        if classes := [choice.grouped[kind][0]._replace(tokens=case.tokens) for case, choice in found.items()
                       if case.part == "grouped" and case.kind == kind and case.what == "down"]:  # fmt: skip
            grouped[kind] = tuple(_without_repeats(classes))
    if measured := {c.tokens: tables.fp8_prefill_tokens for c, tables in found.items() if c.part == "prefill"}:
        losing = [tokens for tokens, first in measured.items() if first > 1]
        prefill = max(losing) + 1 if losing else min(measured)
    return Tuned(stream, pairs, grouped, prefill)


def _without_repeats(classes: Sequence[GroupedTiles]) -> Iterator[GroupedTiles]:
    """The largest class is for everything beyond; neighbours with equal tiles are one class."""
    last = classes[-1]._replace(tokens=FOREVER)
    for tiles, following in itertools.pairwise([*classes[:-1], last]):
        if tiles[1:] != following[1:]:
            yield tiles
    yield last


def write_tables(tables: Tuned, path: Path, *, gpu: str) -> None:
    """Write tables so that `tuned.read_tables` reads them back."""
    stream: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, entries in tables.stream.items():
        for (what, slots), tile in sorted(entries.items()):
            stream.setdefault(kind, {}).setdefault(what, {})[str(slots)] = list(tile)
    content = {
        "gpu": gpu,
        "stream": stream,
        "pairs": {
            kind: {name: list(tile) for name, tile in tiles._asdict().items()} for kind, tiles in tables.pairs.items()
        },
        "grouped": {
            kind: [
                {
                    "tokens": None if t.tokens == FOREVER else t.tokens,
                    "pairs": t.pairs,
                    "up": list(t.up),
                    "down": list(t.down),
                }
                for t in classes
            ]
            for kind, classes in tables.grouped.items()
        },
        "fp8_prefill_tokens": tables.fp8_prefill_tokens,
    }
    path.write_text(_as_text(content, depth=0) + "\n", encoding="utf-8")


def _as_text(value: Any, *, depth: int) -> str:
    """JSON with one tile, or one class of tokens, per line."""
    flat = json.dumps(value)
    is_leaf = not isinstance(value, dict | list) or depth > 2 or len(flat) <= 20
    if is_leaf:
        return flat
    pad = "  " * depth
    if isinstance(value, dict):
        inner = [f"{pad}  {json.dumps(key)}: {_as_text(item, depth=depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner) + f"\n{pad}}}"
    return "[\n" + ",\n".join(f"{pad}  {json.dumps(item)}" for item in value) + f"\n{pad}]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lfm.kernels.tune", description="Measure tiles on this GPU.")
    parser.add_argument("--kinds", default="bf16,fp8")
    parser.add_argument("--parts", default="stream,pairs,grouped,prefill")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(3, "There is no GPU to measure. Run it on the GPU that the tables are for.\n")
    gpu = torch.cuda.get_device_name()
    output = args.output or FOLDER / f"{gpu.lower().replace(' ', '_')}.json"
    write_tables(tune(args.kinds.split(","), args.parts.split(","), workers=args.workers), output, gpu=gpu)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
