"""Loading and saving weights: safetensors <-> an Lfm2 module, tensor by tensor, with no copy of the model on the host.

Loading reads each tensor from its offset in the file straight into its place: into the parameter itself on a CPU when
the dtype is the file's own, else through small staging buffers (pinned for a GPU), where the dtype is converted. Both
directions use the name table of `names`. Weights are never unpickled, and no code of a checkpoint is ever run.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from lfm.config import ModelConfig
from lfm.errors import MachineError, ModelError, UsageError
from lfm.kernels.fp8 import FP8
from lfm.model.checkpoint_files import INDEX_FILE, SINGLE_FILE, listed, weight_files
from lfm.model.hf_config import to_hf_config
from lfm.model.lfm2 import Lfm2
from lfm.model.names import TIED_HEAD, Slot, checkpoint_slots, expected_slots, is_fp32, is_quantised, parameter_shapes
from lfm.model.progress import Progress, ignore_progress
from lfm.model.quantise import make_room_for_scales, write_rows
from lfm.model.safetensors_file import FLOAT_BYTES, TensorEntry, names_of, write_header
from lfm.model.sizes import format_bytes

_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FILE_DTYPES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
_NUM_READERS = 4  # threads: one alone does not fill a fast disk or the page cache's bandwidth
_STAGING_BYTES = 16 * 1024 * 1024  # of each reader
_MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load read: bytes in the files, seconds, and tensors in the files."""

    bytes: int
    seconds: float
    num_tensors: int


@dataclass(frozen=True, slots=True)
class _ReadJob:
    """One tensor of a file and the memory that it belongs in; `scale`: that of the scales of a tensor in fp8."""

    entry: TensorEntry
    target: Tensor
    scale: Tensor | None = None


def load_weights(
    model: Lfm2,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantise: bool = False,
    on_progress: Callable[[str], None] = ignore_progress,
) -> LoadReport:
    """Give a model that was built on the meta device the weights in `folder`.

    They arrive on `device` in `dtype`, expert biases in fp32; with `quantise`, projections and experts in fp8, whose
    rows are quantised as they arrive. Beside the model itself this takes
    `_NUM_READERS * _STAGING_BYTES` of host memory.
    Raises ModelError, before anything is read, if a file is missing or broken, and one that lists all tensors that are
    missing, unexpected or of the wrong shape or dtype; MachineError if the device has too little memory.
    """
    entries = names_of(weight_files(folder))
    slots = _match(model.config, entries, folder)
    _check_tied_head(model.config, entries)
    shapes = parameter_shapes(model.config)
    assert shapes.keys() == model.state_dict().keys(), "the name table and the module disagree"
    tensors, scales = {}, {}
    for name, shape in shapes.items():
        is_fp8 = quantise and is_quantised(name)
        kept = FP8 if is_fp8 else torch.float32 if is_fp32(name) else dtype
        tensors[name] = allocate(model, name, shape, device=device, dtype=kept)
        if is_fp8:
            scales[name] = make_room_for_scales(model, name, device=device)
    jobs = [
        _ReadJob(
            entries[name],
            _part(tensors[slot.parameter], slot),
            _part(scales[slot.parameter], slot) if slot.parameter in scales else None,
        )
        for name, slot in slots.items()
    ]
    num_bytes = sum(job.entry.num_bytes for job in jobs)
    progress = Progress("loading weights", num_bytes, on_progress=on_progress)
    _read_all(jobs, device, progress)
    progress.finish()
    return LoadReport(bytes=num_bytes, seconds=progress.seconds, num_tensors=len(jobs))


def save_weights(model: Lfm2, folder: Path, *, max_shard_bytes: int = _MAX_SHARD_BYTES) -> None:
    """Write the weights and config.json so that transformers loads them: one file, or shards and an index.

    Experts are written one by one, as published. Raises UsageError if the folder already holds weights, MachineError if
    the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if existing := [path.name for path in folder.iterdir() if path.name.endswith((".safetensors", INDEX_FILE))]:
        raise UsageError(f"{folder} already holds weights ({listed(existing)}). Name another folder, or remove them.")
    state = model.state_dict()
    tensors = {name: _part(state[slot.parameter], slot) for name, slot in checkpoint_slots(model.config).items()}
    shards = _split(tensors, max_shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_file(folder / name, shard)
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            total = sum(tensor.nbytes for tensor in tensors.values())
            _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        dtype = str(state["model.embed_tokens.weight"].dtype).removeprefix("torch.")
        _write_json(folder / "config.json", to_hf_config(replace(model.config, dtype=dtype)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = format_bytes(sum(tensor.nbytes for tensor in tensors.values()))
        raise MachineError(
            f"The disk is full: {folder} needs {needed}. Free some space, or name another folder."
        ) from error


def allocate(
    model: nn.Module, name: str, shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Replace a parameter or buffer of `model` by an uninitialised one on `device`; return its memory.

    Raises MachineError if the device has too little memory.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, leaf)
    assert old.shape == shape, f"{name} is {tuple(old.shape)} in the module and {shape} in the name table"
    try:
        tensor = torch.empty(shape, device=device, dtype=dtype)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        size = format_bytes(math.prod(shape) * dtype.itemsize)
        raise MachineError(
            f"{device} has no memory left for {name} ({size}). Use a smaller --dtype, or a device with more memory."
        ) from error
    is_parameter = isinstance(old, nn.Parameter)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor)
    return tensor


def _part(tensor: Tensor, slot: Slot) -> Tensor:
    """The part of a parameter that a checkpoint's tensor is: a contiguous view."""
    if slot.expert is None:
        return tensor
    return tensor[slot.expert, slot.row : slot.row + slot.shape[0]]


def _match(config: ModelConfig, entries: Mapping[str, TensorEntry], folder: Path) -> dict[str, Slot]:
    """Where each tensor of the files belongs. Raises one ModelError that lists all that does not fit."""
    slots = expected_slots(config, entries.keys())
    known = slots.keys() | ({TIED_HEAD} if config.tie_word_embeddings else set())
    both = [name for name in slots if name in entries]
    problems = {
        "missing": [name for name in slots if name not in entries],
        "unexpected": [name for name in entries if name not in known],
        "of the wrong shape": [
            f"{name} {entries[name].shape} instead of {slots[name].shape}"
            for name in both
            if entries[name].shape != slots[name].shape
        ],
        "of a dtype that cannot be read": [
            f"{name} {entries[name].dtype}" for name in both if entries[name].dtype not in FLOAT_BYTES
        ],
    }
    texts = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    if texts:
        raise ModelError(
            f"{folder} does not hold the weights that its config.json describes. Tensors {'; '.join(texts)}. "
            f"Allowed dtypes: {', '.join(FLOAT_BYTES)}. Download the model again, or correct config.json."
        )
    return slots


def _check_tied_head(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> None:
    """A head that is stored although it is tied to the embedding must be the embedding, or all output is wrong."""
    head, embedding = entries.get(TIED_HEAD), entries["model.embed_tokens.weight"]
    if head is None or not config.tie_word_embeddings:
        return
    is_equal = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if is_equal:
        with head.path.open("rb") as one, embedding.path.open("rb") as other:
            one.seek(head.offset)
            other.seek(embedding.offset)
            sizes = [_STAGING_BYTES] * (head.num_bytes // _STAGING_BYTES) + [head.num_bytes % _STAGING_BYTES]
            is_equal = all(one.read(size) == other.read(size) for size in sizes)
    if not is_equal:
        raise ModelError(
            f"{head.path} has a {TIED_HEAD} that differs from model.embed_tokens.weight, and config.json ties the two. "
            "Set tie_word_embeddings to false in config.json, or remove the tensor."
        )


def _read_all(jobs: list[_ReadJob], device: torch.device, progress: Progress) -> None:
    """Run all jobs in a few threads, in the order of the files. The first failure stops the rest."""
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(_NUM_READERS):
        buffers.put(torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda"))

    def read(job: _ReadJob, fd: int) -> int:
        staging = buffers.get()
        try:
            _read_tensor(job, fd, staging)
        finally:
            buffers.put(staging)
        return job.entry.num_bytes

    jobs = sorted(jobs, key=lambda job: (job.entry.path, job.entry.offset))
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {job.entry.path for job in jobs}}
        pool = stack.enter_context(ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="weights"))
        futures = [pool.submit(read, job, files[job.entry.path].fileno()) for job in jobs]
        try:
            for future in as_completed(futures):
                progress.advance(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read_tensor(job: _ReadJob, fd: int, staging: Tensor) -> None:
    source = _TORCH_DTYPES[job.entry.dtype]
    if job.scale is not None:
        _read_rows(job, job.scale, fd, staging)
        return
    flat = job.target.view(-1)
    if flat.device.type == "cpu" and flat.dtype == source:
        _read_exactly(fd, _memory(flat), job.entry, 0)
        return
    step = staging.numel() // source.itemsize
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        raw = staging[: part.numel() * source.itemsize]
        _read_exactly(fd, _memory(raw), job.entry, start * source.itemsize)
        # `to` returns when the staging buffer may be written again; the device then converts far faster than the host.
        part.copy_(raw.view(source).to(part.device))


def _read_rows(job: _ReadJob, scale: Tensor, fd: int, staging: Tensor) -> None:
    """Read a tensor whole rows at a time and store them in fp8: a row's scale needs all of it."""
    source = _TORCH_DTYPES[job.entry.dtype]
    width = job.target.shape[-1]
    target, scale = job.target.view(-1, width), scale.view(-1)
    row_bytes = width * source.itemsize
    if row_bytes > staging.numel():
        staging = torch.empty(row_bytes, dtype=torch.uint8)
    step = staging.numel() // row_bytes
    for start in range(0, len(target), step):
        rows = slice(start, min(start + step, len(target)))
        raw = staging[: (rows.stop - start) * row_bytes]
        _read_exactly(fd, _memory(raw), job.entry, start * row_bytes)
        write_rows(raw.view(source).view(-1, width).to(target.device), target[rows], scale[rows])


def _read_exactly(fd: int, memory: memoryview, entry: TensorEntry, start: int) -> None:
    """Fill `memory` with the tensor's bytes from `start` on."""
    offset = entry.offset + start
    while memory:
        try:
            num_read = os.preadv(fd, [memory], offset)
        except OSError as error:
            raise ModelError(f"{entry.path} cannot be read: {error.strerror}. Check the disk.") from error
        if num_read == 0:
            raise ModelError(f"{entry.path} became shorter while it was read. Download the model again.")
        memory, offset = memory[num_read:], offset + num_read


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _split(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """Shards of at most `max_shard_bytes` (or one tensor); wide dtypes first, so that every tensor is aligned."""
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        if shards[-1] and shard_bytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; under its name it is always whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write_header(file, {name: (_FILE_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()})
            for memory in _host_copies(tensors):
                file.write(memory)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _host_copies(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of each tensor in turn; one of them at a time is on the host."""
    for tensor in tensors.values():
        if tensor.numel():
            yield _memory(tensor.cpu().contiguous())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
