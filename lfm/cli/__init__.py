"""The command line: one file per verb, and no torch until a verb needs it."""

from lfm.cli.app import main

__all__ = ["main"]
