"""Where this user's lasting data lives: stored responses, indexes and the like."""

import os
from collections.abc import Mapping
from pathlib import Path


def data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`${XDG_DATA_HOME:-~/.local/share}/lfm`. Nothing is created. A relative XDG_DATA_HOME is ignored, as XDG says."""
    base = Path(environ.get("XDG_DATA_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local" / "share") / "lfm"
