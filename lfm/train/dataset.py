"""Token rows on disk. No torch: the processes that prepare data start in a moment.

A shard is two raw little-endian files: `NAME.tokens`, uint32 ids with bit 31 set on the tokens that are to be
predicted, and `NAME.ends`, int64, where each row ends. `manifest.json` is written last and says how long each file is:
a folder without it is not finished, and a file of another length is truncated.
"""

import bisect
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lfm.errors import UsageError

MANIFEST = "manifest.json"
_TARGET_BIT = np.uint32(1 << 31)


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: its ids, and which of them the model has to predict (the first never counts)."""

    ids: np.ndarray  # integers [length]
    is_target: np.ndarray  # bool [length]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What a shard holds. `num_dropped`: examples without anything to predict within the length limit."""

    name: str
    num_rows: int
    num_tokens: int
    num_targets: int
    num_dropped: int = 0


def write_shard(folder: Path, name: str, rows: Iterable[Row], *, max_length: int) -> ShardInfo:
    """Write one shard; rows are cut at `max_length` ids, and left out if then nothing is to be predicted."""
    ends, num_tokens, num_targets, num_dropped = [], 0, 0, 0
    with (folder / f"{name}.tokens").open("wb") as file:
        for row in rows:
            ids, is_target = row.ids[:max_length], row.is_target[:max_length]
            if not is_target[1:].any():
                num_dropped += 1
                continue
            file.write(np.where(is_target, ids.astype("<u4") | _TARGET_BIT, ids).astype("<u4").tobytes())
            num_tokens += len(ids)
            num_targets += int(is_target[1:].sum())
            ends.append(num_tokens)
    (folder / f"{name}.ends").write_bytes(np.asarray(ends, dtype="<i8").tobytes())
    return ShardInfo(name, len(ends), num_tokens, num_targets, num_dropped)


def write_manifest(folder: Path, shards: list[ShardInfo], *, key: Mapping[str, Any]) -> None:
    """Declare the shards complete. `key` says what they were made from."""
    content = {"key": dict(key), "shards": [shard_as_dict(shard) for shard in shards]}
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)


def shard_as_dict(shard: ShardInfo) -> dict[str, Any]:
    return {name: getattr(shard, name) for name in ShardInfo.__slots__}


class Dataset:
    """All rows of a prepared folder, by number. The files are mapped, not read."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError if the folder is unfinished, or a file is missing or has the wrong length."""
        manifest = read_manifest(folder)
        if manifest is None:
            raise UsageError(f"{folder} has no {MANIFEST}: its preparation did not end. Remove the folder.")
        self.shards = [ShardInfo(**shard) for shard in manifest["shards"]]
        self._tokens, self._ends = [], []
        for shard in self.shards:
            self._tokens.append(_mapped(folder / f"{shard.name}.tokens", "<u4", shard.num_tokens))
            self._ends.append(_mapped(folder / f"{shard.name}.ends", "<i8", shard.num_rows))
        self._first_rows = [0, *itertools.accumulate(shard.num_rows for shard in self.shards)]
        self.num_rows = self._first_rows[-1]
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self.num_targets = sum(shard.num_targets for shard in self.shards)
        if not self.num_rows:
            raise UsageError(f"{folder} holds no examples to learn from. Check [data] of the recipe.")

    def __getitem__(self, index: int) -> Row:
        packed = self.packed(index)
        return Row(*unpack(packed))

    def packed(self, index: int) -> np.ndarray:
        """A row as it is on disk: ids with the target bit, uint32 [length]."""
        shard = bisect.bisect_right(self._first_rows, index) - 1
        row = index - self._first_rows[shard]
        ends = self._ends[shard]
        tokens: np.ndarray = self._tokens[shard][ends[row - 1] if row else 0 : ends[row]]
        return tokens


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids, int64, and which of them are targets."""
    return (packed & ~_TARGET_BIT).astype(np.int64), (packed & _TARGET_BIT) != 0


def num_targets_in(packed: np.ndarray) -> int:
    """How many ids of a row are to be predicted; its first never is."""
    return int(np.count_nonzero(packed[1:] & _TARGET_BIT))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None where preparation did not end."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / MANIFEST} cannot be read ({error}). Remove {folder}.") from error
    return manifest


def _mapped(path: Path, dtype: str, count: int) -> np.ndarray:
    expected = count * np.dtype(dtype).itemsize
    num_bytes = path.stat().st_size if path.is_file() else None
    if num_bytes != expected:
        state = "is missing" if num_bytes is None else f"has {num_bytes} bytes instead of {expected}: it is truncated"
        raise UsageError(f"{path} {state}. Remove {path.parent}; the same command prepares the data again.")
    # A plain array over the mapped file: slices of a memmap are slow to make.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if count else np.empty(0, dtype)
