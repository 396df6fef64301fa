"""What is said when the disk is full: the one error of a file system that every long run meets."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from lfm.errors import MachineError


@contextmanager
def full_disk_is_told(what: str) -> Iterator[None]:
    """Turn the body's "no space left" into a MachineError that says `what` could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MachineError(
            f"The disk is full: {what}. Free some space; the same command goes on from the newest checkpoint."
        ) from error
