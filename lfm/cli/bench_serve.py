"""`lfm bench serve`: what clients of a server see, under open- or closed-loop load over HTTP."""

from pathlib import Path
from typing import Annotated

from lfm.cli import options
from lfm.cli.options import ENGINE, SERVER, flag
from lfm.errors import UsageError


def serve(
    model: options.ModelArgument = ENGINE.model,
    url: Annotated[str | None, flag("url", "Load this server. Unset: start one with MODEL on a free port.")] = None,
    api_key: Annotated[str | None, flag("api_key", "The server's key.")] = None,
    requests: Annotated[int, flag("requests", "Requests in all.")] = 64,
    concurrency: Annotated[
        int | None, flag("concurrency", "Closed loop: so many requests at once (8 if --rate is unset).")
    ] = None,
    rate: Annotated[
        float | None, flag("rate", "Open loop: requests per second on average, at random (Poisson) times.")
    ] = None,
    input_tokens: Annotated[int, flag("input_tokens", "Tokens of each prompt, about.")] = 128,
    output_tokens: Annotated[int, flag("output_tokens", "Tokens of each answer.")] = 64,
    seed: Annotated[int, flag("seed", "For prompts and arrival times.")] = 0,
    output: Annotated[Path | None, flag("output", "File for the result, as JSON. It is overwritten.")] = None,
    device: options.DeviceFlag = ENGINE.device,
    dtype: options.DtypeFlag = "auto",
    max_running: options.MaxRunningFlag = ENGINE.max_running,
    memory_fraction: options.MemoryFractionFlag = ENGINE.memory_fraction,
    api_workers: Annotated[int, flag("api_workers", "Processes that speak HTTP.")] = SERVER.api_workers,
    debug: options.DebugFlag = False,
) -> None:
    """Measure a server as its clients see it. Prints a table, then the result as JSON.

    Time to first token, inter-token latency (the gaps between the chunks of a stream) and throughput. Other flags of a
    server that this starts are taken from LFM_... in the environment.
    """
    from lfm.cli.load import Load, drive, print_report, write_report
    from lfm.cli.own_server import own_server
    from lfm.http_client import api_root

    for name, value, low, high in (
        ("requests", requests, 1, 1_000_000),
        ("concurrency", concurrency, 1, 100_000),
        ("rate", rate, 0.001, 100_000),
        ("input-tokens", input_tokens, 1, 1_000_000),
        ("output-tokens", output_tokens, 1, 1_000_000),
    ):
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{name} {value} is out of range. Allowed: {low} to {high}.")
    if rate is not None and concurrency is not None:
        raise UsageError(
            "--rate and --concurrency exclude each other. Give --rate for an open loop, else --concurrency."
        )
    load = Load(
        num_requests=requests,
        concurrency=None if rate is not None else concurrency or 8,
        rate=rate,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        seed=seed,
    )
    if url is not None:
        report = drive(api_root(url), load, api_key=api_key)
    else:
        flags: dict[str, object] = {"--device": device, "--dtype": dtype, "--api-workers": api_workers}
        flags |= {"--memory-fraction": memory_fraction}
        if max_running is not None:
            flags["--max-running"] = max_running
        with own_server(model, flags) as root:
            report = drive(root, load, api_key=api_key)
    write_report(report, output)
    print_report(report)
