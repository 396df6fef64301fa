"""The safetensors format, read and written tensor by tensor: 8 bytes of header length, a JSON header, then raw bytes.

The safetensors package maps whole files, and every page it has touched counts as memory of this process until the file
is closed: for a checkpoint of one 48 GB file that is the whole model. Here only the header is read; `weights` then
reads each tensor from its offset into its place. Nothing here imports torch.
Source of the format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lfm.errors import ModelError

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package itself
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a file. `offset` counts from the start of the file; bytes are little-endian, rows first."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read which tensors a file holds. Raises ModelError if the file is not whole or not safetensors."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if _LFS_POINTER.startswith(start) and start:
                raise ModelError(f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder.")
            header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise _unreadable(path, f"{file_bytes} bytes cannot hold a header of {header_bytes}")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}. Check the file and its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise _unreadable(path, "its header is not a JSON object")
    entries = {
        name: _entry(path, name, info, 8 + header_bytes) for name, info in header.items() if name != "__metadata__"
    }
    _check_extent(path, entries, 8 + header_bytes, file_bytes)
    return entries


def write_header(file: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write the header for `tensors` (name -> dtype, shape); their bytes must follow in the same order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * FLOAT_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned for readers that map the file
    file.write(struct.pack("<Q", len(text)) + text)


def _unreadable(path: Path, cause: str) -> ModelError:
    return ModelError(f"{path} is not a whole safetensors file: {cause}. Download the model again.")


def _entry(path: Path, name: str, info: object, data_start: int) -> TensorEntry:
    match info:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            all(type(size) is int and size >= 0 for size in shape) and 0 <= begin <= end
        ):
            num_bytes = end - begin
        case _:
            raise _unreadable(path, f"its header is wrong for {name!r}")
    if dtype in FLOAT_BYTES and math.prod(shape) * FLOAT_BYTES[dtype] != num_bytes:
        raise _unreadable(path, f"{name!r} has {num_bytes} bytes, which is not {dtype} of shape {tuple(shape)}")
    return TensorEntry(path, dtype, tuple(shape), data_start + begin, num_bytes)


def _check_extent(path: Path, entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    """The format has neither holes nor overlaps, and ends with the file."""
    position = data_start
    for name, entry in sorted(entries.items(), key=_extent):
        if entry.offset != position:
            raise _unreadable(path, f"{name!r} does not start where the tensor before it ends")
        position += entry.num_bytes
    if position != file_bytes:
        raise _unreadable(path, f"its tensors need {position} bytes and it has {file_bytes}")


def _extent(item: tuple[str, TensorEntry]) -> tuple[int, int]:
    return item[1].offset, item[1].num_bytes


def names_of(paths: Iterable[Path]) -> dict[str, TensorEntry]:
    """The tensors of several files together. Raises ModelError if a name is in two of them."""
    merged: dict[str, TensorEntry] = {}
    for path in paths:
        entries = read_header(path)
        if twice := sorted(merged.keys() & entries.keys()):
            raise ModelError(
                f"{path} repeats {twice[0]!r} of {merged[twice[0]].path.name}. Remove the file that is too many."
            )
        merged |= entries
    return merged
