"""What MODEL on the command line means: a folder, `random:PRESET`, a hub id, or `builtin`. No torch."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lfm.config
from lfm.config import ModelConfig
from lfm.errors import ModelError, UsageError
from lfm.model.presets import PRESETS
from lfm.model.progress import ignore_progress

_RANDOM = "random:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_ALLOWED = (
    "builtin, a folder in Hugging Face layout, a hub id such as LiquidAI/LFM2-24B-A2B, or random:PRESET with one of "
    f"{', '.join(PRESETS)}"
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's weights and tokenizer come from: exactly one of `folder` and `preset` is set.

    `name` is what it is served as: the hub id, the folder's name or random:PRESET.
    """

    name: str
    folder: Path | None
    preset: str | None
    config: ModelConfig


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    on_progress: Callable[[str], None] = ignore_progress,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> ModelSource:
    """Find out what `model` names, and download it first if it is a hub id (see `lfm.model.hub` for its errors).

    `endpoint` and `cache_dir` are those of the hub's client (None: its own). An existing folder wins over a hub id of
    the same spelling. Raises UsageError if `model` names nothing, ModelError if the model cannot be used.
    """
    local = _find_local(model, revision)
    if local is not None:
        return local
    # Imported here: the hub's client takes 0.2 s to load, and most starts need no download.
    from lfm.model.hub import download_model

    folder = download_model(model, revision=revision, endpoint=endpoint, cache_dir=cache_dir, on_progress=on_progress)
    return ModelSource(model, folder, None, _read_config(folder))


def describe_model(
    model: str, *, revision: str | None = None, endpoint: str | None = None, cache_dir: Path | None = None
) -> ModelSource:
    """`resolve_model` without the weights: of a hub id, only the small files are downloaded."""
    local = _find_local(model, revision)
    if local is not None:
        return local
    from lfm.model.hub import download_description

    folder = download_description(model, revision=revision, endpoint=endpoint, cache_dir=cache_dir)
    return ModelSource(model, folder, None, _read_config(folder))


def _find_local(model: str, revision: str | None) -> ModelSource | None:
    """What needs no hub; None for a hub id."""
    if model == "builtin":
        _refuse_revision(revision, model)
        return _resolve_builtin()
    if model.startswith(_RANDOM):
        _refuse_revision(revision, model)
        return _resolve_preset(model)
    path = os.path.expanduser(model)  # like isdir and exists, and unlike Path's own, without an error for any text
    if os.path.isdir(path):
        _refuse_revision(revision, model)
        folder = Path(path)
        return ModelSource(folder.resolve().name, folder, None, _read_config(folder))
    if os.path.exists(path):
        raise UsageError(f"{model} is a file. Give the folder that holds config.json and the weights.")
    if not _HUB_ID.fullmatch(model):
        shown = model if len(model) <= 200 else f"{model[:200]}..."
        raise UsageError(f"There is no folder {shown!r}, and it is no hub id. Allowed: {_ALLOWED}.")
    return None


def _resolve_builtin() -> ModelSource:
    folder = lfm.config.BUILTIN_FOLDER
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"The model 'builtin' is not in this copy of lfm: {folder} is missing. `lfm train builtin` makes one. "
            f"Allowed: {_ALLOWED}."
        )
    return ModelSource("builtin", folder, None, _read_config(folder))


def _resolve_preset(model: str) -> ModelSource:
    preset = model.removeprefix(_RANDOM)
    if preset not in PRESETS:
        raise UsageError(f"{model} is not known. Allowed: {', '.join(_RANDOM + name for name in PRESETS)}.")
    return ModelSource(model, None, preset, PRESETS[preset])


def _read_config(folder: Path) -> ModelConfig:
    """The folder's config. An error about its keys says which file it means."""
    try:
        return ModelConfig.from_folder(folder)
    except ModelError as error:
        text = str(error)
        raise ModelError(text if str(folder) in text else f"{folder}: {text}") from error


def _refuse_revision(revision: str | None, model: str) -> None:
    if revision is not None:
        raise UsageError(f"--revision {revision} is of no use with {model}: only hub ids have revisions. Leave it out.")
