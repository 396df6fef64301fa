"""Tile sizes by GPU, kernel and number of tokens, from `tuned/*.json`, which `python -m lfm.kernels.tune` measures.

A file names the GPU that it was measured on; every other GPU gets `default.json` of its class: "large" where a
multiprocessor has 228 KB of shared memory (Hopper, large Blackwell), "small" elsewhere (100 to 164 KB), not measured.
Entries are keyed by tokens and kind of weights, never by a mean load: an expert's share of the tokens is not known.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

WeightKind = Literal["bf16", "fp8"]
FOLDER = Path(__file__).with_name("tuned")
LARGE_CAPABILITIES = (9, 10)


class StreamTile(NamedTuple):
    """What a program of stream_gemm holds at a time: rows of W, by the warps that share K, by runs of 32 inputs each.

    `ahead` such parts of W are loaded before the first is used. `registers` per thread decide how many programs share a
    multiprocessor; left alone, the assembler spends too few of them on loads in flight.
    """

    rows: int
    warps: int
    runs: int
    ahead: int
    registers: int


class PairTile(NamedTuple):
    """Of moe_small: rows of weights per program, its warps, how many loads are issued ahead (of a wait, in `down`)."""

    rows: int
    warps: int
    ahead: int


class GroupedTile(NamedTuple):
    """Of moe_grouped: features per program, inputs per step; warps and stages; whether weights take the rows of the
    matrix unit."""

    features: int
    inputs: int
    warps: int
    stages: int
    is_swapped: bool = False


class GroupedTiles(NamedTuple):
    """For up to `tokens`: pairs per tile, and the tiles of the two products."""

    tokens: int
    pairs: int
    up: GroupedTile
    down: GroupedTile


class PairTiles(NamedTuple):
    """Tiles of moe_small: of `up`, and of `down` for one token and for more."""

    up: PairTile
    down_one: PairTile
    down: PairTile


class Tuned(NamedTuple):
    """All tables of one GPU, by kind of weights. A missing stream entry means that the library is as fast."""

    stream: Mapping[WeightKind, Mapping[tuple[str, int], StreamTile]]
    pairs: Mapping[WeightKind, PairTiles]
    grouped: Mapping[WeightKind, tuple[GroupedTiles, ...]]
    fp8_prefill_tokens: int  # from here on experts in fp8 are large products, both operands in fp8


_replacements: list[Tuned] = []


def tuned_for(device: torch.device) -> Tuned:
    """The tables of a device; those of a small GPU for a CPU, where only the interpreter asks."""
    return _replacements[-1] if _replacements else _tables_of(device)


@contextmanager
def replaced(tables: Tuned) -> Iterator[None]:
    """All kernels take `tables` meanwhile, on every device and thread: for measuring and for tests."""
    _replacements.append(tables)
    try:
        yield
    finally:
        _replacements.pop()


@cache
def _tables_of(device: torch.device) -> Tuned:
    if device.type != "cuda":
        return read_tables(FOLDER / "default_small.json")
    name = torch.cuda.get_device_name(device).lower().replace(" ", "_")
    is_large = torch.cuda.get_device_capability(device)[0] in LARGE_CAPABILITIES
    own = FOLDER / f"{name}.json"
    return read_tables(own if own.is_file() else FOLDER / f"default_{'large' if is_large else 'small'}.json")


def read_tables(path: Path) -> Tuned:
    """The tables of a file: gpu, stream[kind][what][slots], pairs[kind], grouped[kind], fp8_prefill_tokens."""
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Tuned(
        stream={
            kind: {
                (what, int(slots)): StreamTile(*tile)
                for what, by_slots in table.items()
                for slots, tile in by_slots.items()
            }
            for kind, table in raw["stream"].items()
        },
        pairs={
            kind: PairTiles(*(PairTile(*tiles[part]) for part in PairTiles._fields))
            for kind, tiles in raw["pairs"].items()
        },
        grouped={kind: tuple(_grouped(entry) for entry in entries) for kind, entries in raw["grouped"].items()},
        fp8_prefill_tokens=raw["fp8_prefill_tokens"],
    )


def _grouped(entry: dict[str, Any]) -> GroupedTiles:
    up, down = GroupedTile(*entry["up"]), GroupedTile(*entry["down"])
    return GroupedTiles(entry["tokens"] or 1 << 62, entry["pairs"], up, down)
