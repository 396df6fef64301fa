"""`lfm bench startup`: how long a server takes from its command to its first token, with cold and warm kernels."""

from pathlib import Path
from typing import Annotated

from lfm.cli import options
from lfm.cli.options import ENGINE, SERVER, flag


def startup(
    model: options.ModelArgument = ENGINE.model,
    device: options.DeviceFlag = ENGINE.device,
    dtype: options.DtypeFlag = "auto",
    memory_fraction: options.MemoryFractionFlag = ENGINE.memory_fraction,
    api_workers: Annotated[int, flag("api_workers", "Processes that speak HTTP.")] = SERVER.api_workers,
    output: Annotated[Path | None, flag("output", "File for the results, as JSON lines. It is overwritten.")] = None,
    commit: Annotated[str | None, flag("commit", "What to write as the commit where git cannot tell it.")] = None,
    debug: options.DebugFlag = False,
) -> None:
    """Measure how long `lfm serve` takes until it is ready, has sent a first token, and has captured its graphs.

    It is started twice, with an empty folder for compiled kernels and then with what the first start left there.
    Prints what the server told of its start, and when, then the results as JSON. Other flags of the server are taken
    from LFM_... in the environment.
    """
    from lfm.cli.starts import measure_starts, print_starts, write_starts

    flags: dict[str, object] = {"--device": device, "--dtype": dtype, "--memory-fraction": memory_fraction}
    starts = measure_starts(model, flags | {"--api-workers": api_workers}, commit=commit)
    write_starts(starts, output)
    print_starts(starts)
