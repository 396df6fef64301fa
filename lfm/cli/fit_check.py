"""Whether a model fits, found out before its weights are downloaded and in a process of its own.

Looking at a GPU takes memory on it for as long as the process lives: `lfm serve` leaves that to the engine's process.
"""

import subprocess
import sys

import msgspec

from lfm.config import EngineConfig
from lfm.engine.plan import plan_engine
from lfm.errors import InternalError, LfmError, MachineError, ModelError, UsageError
from lfm.model.checkpoint_files import weight_files
from lfm.model.source import describe_model

_ERRORS: dict[int, type[LfmError]] = {2: UsageError, 3: MachineError}


def check_before_download(config: EngineConfig) -> None:
    """Raise what planning raises, if `config` names a hub id whose weights are not here yet; else do nothing."""
    source = describe_model(config.model, revision=config.revision)
    if source.folder is None or source.name != config.model:
        return  # a preset or a folder: nothing is downloaded
    try:
        weight_files(source.folder)
    except ModelError:  # not here yet, or not all of them
        _plan_elsewhere(config)


def _plan_elsewhere(config: EngineConfig) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lfm.cli.fit_check"], input=msgspec.json.encode(config), capture_output=True, check=False
    )
    if done.returncode:
        message = done.stdout.decode(errors="replace").strip() or done.stderr.decode(errors="replace")[-500:]
        raise _ERRORS.get(done.returncode, InternalError)(message)


def main() -> int:
    """Plan the EngineConfig on stdin; say on stdout why it cannot be run, and return that error's exit code."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    try:
        plan_engine(config, describe_model(config.model, revision=config.revision).config)
    except LfmError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
