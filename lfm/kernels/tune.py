"""Measure the tiles of the streaming kernels on this GPU and write them as one of `tuned/*.json`.

    python -m lfm.kernels.tune [--kinds bf16,fp8] [--parts stream,pairs,grouped,prefill] [--output FILE]

The shapes are those of LFM2-24B-A2B. Every candidate runs through the public op, in a CUDA graph over copies of the
weights that together are larger than L2; the median of several replays counts. Candidates are compiled beforehand in
parallel processes that never touch the GPU. What is not measured is taken over from the tables in force.
Experts are measured with uniform and with skewed routing (Zipf), and the sum of both times counts.
"""

import argparse
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lfm.kernels.tune_calls import DENSE, HIDDEN, Case, calls_of
from lfm.kernels.tune_compile import compile_all
from lfm.kernels.tuned import (
    FOLDER,
    FOREVER,
    GroupedTile,
    GroupedTiles,
    PairTile,
    StreamTile,
    Tuned,
    WeightKind,
    replaced,
    tuned_for,
    write_tables,
)

REPLAYS = 15
GROUPED_TOKENS = (8, 32, 128, 512)  # the upper ends of classes; the last is for everything beyond
PREFILL_TOKENS = (64, 128, 192, 256, 384, 512, 1024)


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
        for variant in (False, True):
            if is_fp8 and case.what == "down" and variant != mine.is_all_fp8:
                continue
            tile = GroupedTile(feature, inputs, warps, stages, is_fp8 or variant)
            tiles = mine._replace(pairs=pairs, is_all_fp8=is_fp8 and variant)
            yield tiles._replace(up=tile) if case.what == "up" else tiles._replace(down=tile)


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
        candidates_of_all = [(case, choice) for case, choices in jobs.items() for choice in choices]
        for line in compile_all(candidates_of_all, 10 * major + minor, workers=workers):
            print(line, flush=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lfm.kernels.tune", description="Measure tiles on this GPU.")
    parser.add_argument("--kinds", default="bf16,fp8")
    parser.add_argument("--parts", default="stream,pairs,grouped,prefill")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
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
