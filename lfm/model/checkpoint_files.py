"""Which files of a folder, or of a hub repository, hold the weights. No torch.

One `model.safetensors`, or shards that `model.safetensors.index.json` names. The index is somebody else's file: it may
name nothing outside its own folder.
"""

import json
from collections.abc import Collection
from pathlib import Path

from lfm.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def weight_file_names(folder: Path) -> list[str]:
    """The names of the weight files: those in the folder's index, else the single file.

    The files themselves need not be there yet. Raises ModelError for an index that cannot be used.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        return [SINGLE_FILE]
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}. Check the file and its permissions.") from error
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not an index with a weight_map. Download the model again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{path} names {name!r}. Allowed: .safetensors files in the same folder. Correct the index."
            )
    if not names:
        raise ModelError(f"{path} names no files. Download the model again.")
    return names


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, all of them present. Raises ModelError naming the ones that are missing."""
    names = weight_file_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    if len(names) > 1 or (folder / INDEX_FILE).exists():
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that {INDEX_FILE} names: "
            f"{listed(missing)}. Download the model again."
        )
    raise ModelError(f"{folder} {no_weights_cause([path.name for path in folder.iterdir()])}")


def no_weights_cause(names: Collection[str]) -> str:
    """What to say of a folder or repository with files `names` and no weights that can be read: cause and fix."""
    fix = f"Give a folder or hub id with {SINGLE_FILE}, or with shards and {INDEX_FILE}."
    others = sorted(name for name in names if name.endswith(".safetensors"))
    unsafe = sorted(name for name in names if name.endswith(_UNSAFE_SUFFIXES))
    if others:
        return f"has {listed(others)} but neither {SINGLE_FILE} nor {INDEX_FILE}. {fix}"
    if unsafe:
        return f"has its weights only as pickles ({listed(unsafe)}), which can run code and are never loaded. {fix}"
    return f"has no {SINGLE_FILE}. {fix}"


def listed(items: Collection[str], limit: int = 20) -> str:
    """Up to `limit` items on one line, and how many more there are."""
    shown = ", ".join(list(items)[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown
