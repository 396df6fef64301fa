"""Checkpoints: a model folder in Hugging Face layout, with the trainer's state in `training/` inside it.

A checkpoint is written under another name, flushed to the disk and then renamed, so what is called `step-N` is whole.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm.errors import ModelError
from lfm.model.lfm2 import Lfm2
from lfm.model.sizes import format_bytes
from lfm.model.weights import save_weights
from lfm.train.disk import full_disk_is_told
from lfm.train.tensor_file import read_tensors, write_tensors

_STATE, _TENSORS = "state.json", "state.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trainer's state: what JSON can hold, and tensors by name."""

    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def checkpoint_folders(output: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = [path for path in (output / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(folder: Path, model: Lfm2, checkpoint: Checkpoint, *, tokenizer_folder: Path) -> None:
    """Write a checkpoint as `folder`, all or nothing, unless it is there. Raises MachineError if the disk is full."""
    partial = folder.with_name(f"{folder.name}.partial")
    if folder.is_dir():
        return
    needed = format_bytes(sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
    with full_disk_is_told(
        f"the checkpoint {folder} needs some {needed} more than the weights, and earlier ones are untouched"
    ):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            _write_all(partial, model, checkpoint, tokenizer_folder)
            partial.rename(folder)
            _flush(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_old_checkpoints(output: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in checkpoint_folders(output)[:-keep]:
        shutil.rmtree(folder)


def load_checkpoint(
    folder: Path, *, device: torch.device, keep: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> Checkpoint:
    """Read a trainer's state; of each tensor, what `keep` makes of it. Raises ModelError if it is damaged."""
    state = read_state(folder)
    try:
        return Checkpoint(state, read_tensors(folder / "training" / _TENSORS, device=device, keep=keep))
    except (OSError, ModelError) as error:
        raise _damaged(folder, error) from error


def read_state(folder: Path) -> dict[str, Any]:
    """The part of a trainer's state that is JSON. Raises ModelError if it is damaged."""
    try:
        state: dict[str, Any] = json.loads((folder / "training" / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    return state


def _damaged(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"The checkpoint {folder} is damaged ({error}). Remove it; the same command resumes from the one before."
    )


def _write_all(folder: Path, model: Lfm2, checkpoint: Checkpoint, tokenizer_folder: Path) -> None:
    save_weights(model, folder)
    for name in _TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    config = model.config
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    (folder / "training").mkdir()
    write_tensors(folder / "training" / _TENSORS, checkpoint.tensors)
    state = json.dumps(checkpoint.state, indent=1) + "\n"
    (folder / "training" / _STATE).write_text(state, encoding="utf-8")
    for path in (*folder.iterdir(), *(folder / "training").iterdir(), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
