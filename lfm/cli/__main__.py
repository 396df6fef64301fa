"""`python -m lfm.cli`: the `lfm` command of this very interpreter."""

from lfm.cli import main

main()
