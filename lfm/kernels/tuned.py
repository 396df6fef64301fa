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
FOREVER = 1 << 62  # tokens of the last class


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
    """For up to `tokens`: pairs per tile, and the tiles of the two products.

    Of weights in fp8: whether activations are in fp8 too (moe_grouped_fp8) or stay as they are (moe_grouped).
    """

    tokens: int
    pairs: int
    up: GroupedTile
    down: GroupedTile
    is_all_fp8: bool = False


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


def grouped_tiles(device: torch.device, kind: WeightKind, num_tokens: int) -> GroupedTiles:
    """The tiles of the class that `num_tokens` falls into."""
    return next(tiles for tiles in tuned_for(device).grouped[kind] if num_tokens <= tiles.tokens)


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
    """The tables of a file."""
    return from_text(path.read_text(encoding="utf-8"))


def from_text(text: str) -> Tuned:
    """The tables in JSON: gpu, stream[kind][what][slots], pairs[kind], grouped[kind], fp8_prefill_tokens."""
    raw: dict[str, Any] = json.loads(text)
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
    return GroupedTiles(entry["tokens"] or FOREVER, entry["pairs"], up, down, entry["is_all_fp8"])


def write_tables(tables: Tuned, path: Path, *, gpu: str) -> None:
    """Write tables so that `read_tables` reads them back."""
    path.write_text(to_text(tables, gpu=gpu), encoding="utf-8")


def to_text(tables: Tuned, *, gpu: str) -> str:
    """Tables as `from_text` reads them, one tile or one class of tokens per line."""
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
                    "is_all_fp8": t.is_all_fp8,
                }
                for t in classes
            ]
            for kind, classes in tables.grouped.items()
        },
        "fp8_prefill_tokens": tables.fp8_prefill_tokens,
    }
    return _as_text(content, depth=0) + "\n"


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
