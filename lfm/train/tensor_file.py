"""Named tensors in one safetensors file, read and written with lfm's own reader: state of the optimizer, no pickles."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lfm.errors import ModelError
from lfm.model.safetensors_file import read_header, write_header

_FILE_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}
_TORCH_DTYPES = {name: dtype for dtype, name in _FILE_DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the file and wait until it is on the disk. One tensor at a time is on the host."""
    with path.open("wb") as file:
        write_header(file, {name: (_FILE_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()})
        for tensor in tensors.values():
            host = tensor.detach().cpu().contiguous()
            file.write(host.view(-1).view(torch.uint8).numpy().data if host.numel() else b"")
        file.flush()
        os.fsync(file.fileno())


def read_tensors(
    path: Path, *, device: torch.device, keep: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> dict[str, Tensor]:
    """Read all tensors of a file, and put what `keep` makes of each onto `device`.

    Raises ModelError if the file is missing, broken or of a dtype not ours.
    """
    tensors = {}
    for name, entry in read_header(path).items():
        if entry.dtype not in _TORCH_DTYPES:
            raise ModelError(f"{path} holds {name!r} as {entry.dtype}. Allowed: {', '.join(_TORCH_DTYPES)}.")
        tensor = torch.empty(entry.shape, dtype=_TORCH_DTYPES[entry.dtype])
        if tensor.numel():
            with path.open("rb") as file:
                file.seek(entry.offset)
                num_read = file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
            if num_read != entry.num_bytes:
                raise ModelError(f"{path} became shorter while it was read.")
        tensors[name] = keep(name, tensor).to(device)
    return tensors
