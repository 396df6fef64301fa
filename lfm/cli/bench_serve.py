"""`lfm bench serve`: what clients of a server see, under open- or closed-loop load over HTTP."""

import os
from pathlib import Path
from typing import Annotated, TypeVar

from lfm.cli import options
from lfm.cli.options import ENGINE, SERVER, flag
from lfm.errors import UsageError

Number = TypeVar("Number", int, float)

# requests, clients at once, tokens in, tokens out
DEFAULTS = {
    "load": (64, 8, 128, 64),
    "poisson": (512, 256, 512, 128),
    "long-prompts": (256, 64, 128, 512),
    "agents": (512, 64, 256, 64),
}
FEW_CLIENTS, MOST_PROCESSES = 64, 8
_LOAD, _SCENARIO = "Load", "Scenarios"


def serve(
    model: options.ModelArgument = ENGINE.model,
    url: Annotated[str | None, flag("url", "Load this server. Unset: start one with MODEL on a free port.")] = None,
    api_key: Annotated[str | None, flag("api_key", "The server's key.")] = None,
    scenario: Annotated[
        str, flag("scenario", "load, poisson, long-prompts or agents; see below.", panel=_SCENARIO)
    ] = "load",
    requests: Annotated[int | None, flag("requests", "Requests in all (poisson: of each load).", panel=_LOAD)] = None,
    concurrency: Annotated[
        int | None, flag("concurrency", "Closed loop: so many clients at once (8 if --rate is unset).", panel=_LOAD)
    ] = None,
    rate: Annotated[
        float | None,
        flag("rate", "Open loop: requests per second on average, at random (Poisson) times.", panel=_LOAD),
    ] = None,
    input_tokens: Annotated[int | None, flag("input_tokens", "Tokens of each prompt, about.", panel=_LOAD)] = None,
    output_tokens: Annotated[int | None, flag("output_tokens", "Tokens of each answer.", panel=_LOAD)] = None,
    lengths: Annotated[str, flag("lengths", "fixed, or lognormal around these.", panel=_LOAD)] = "fixed",
    long_tokens: Annotated[int, flag("long_tokens", "long-prompts: their tokens.", panel=_SCENARIO)] = 30_000,
    long_every: Annotated[float, flag("long_every", "long-prompts: seconds between them.", panel=_SCENARIO)] = 2.0,
    long_prompts: Annotated[int, flag("long_prompts", "long-prompts: how many.", panel=_SCENARIO)] = 10,
    turns: Annotated[int, flag("turns", "agents: turns of each.", panel=_SCENARIO)] = 8,
    seed: Annotated[int, flag("seed", "For prompts, lengths and arrival times.")] = 0,
    client_processes: Annotated[
        int | None, flag("client_processes", "Processes that share the clients. Unset: 1, or more for many clients.")
    ] = None,
    output: Annotated[Path | None, flag("output", "File for the results, as JSON lines. It is overwritten.")] = None,
    commit: Annotated[
        str | None, options.flag("commit", "What to write as the commit where git cannot tell it.")
    ] = None,
    device: options.DeviceFlag = ENGINE.device,
    dtype: options.DtypeFlag = "auto",
    max_running: options.MaxRunningFlag = ENGINE.max_running,
    memory_fraction: options.MemoryFractionFlag = ENGINE.memory_fraction,
    api_workers: Annotated[int, flag("api_workers", "Processes that speak HTTP.")] = SERVER.api_workers,
    debug: options.DebugFlag = False,
) -> None:
    """Measure a server as its clients see it. Prints a table, then the result as JSON, for each load.

    Time to first token, inter-token latency (the time that each further token took) and throughput. load: one closed
    or open loop. poisson: log-normal lengths; a closed loop to find saturation, then random arrivals at 25, 50 and 75 %
    of it. long-prompts: streams, while a long prompt comes now and then. agents: conversations that grow by tool
    results, and what share of them the prefix cache held. Other flags of a server that this starts are taken from
    LFM_... in the environment.
    """
    from lfm.cli.facts import git_commit
    from lfm.cli.load import Report, Scenario, Target, drive, print_report, write_reports
    from lfm.cli.load_shapes import Load
    from lfm.cli.own_server import own_server
    from lfm.http_client import api_root

    _check_choices(scenario, lengths, rate, concurrency)
    most, at_once, tokens_in, tokens_out = DEFAULTS[scenario]
    at_once = at_once if concurrency is None else concurrency
    load = Load(
        num_requests=_in_range("requests", most if requests is None else requests, 1, 1_000_000),
        concurrency=None if rate is not None else _in_range("concurrency", at_once, 1, 100_000),
        rate=None if rate is None else _in_range("rate", rate, 0.001, 100_000),
        input_tokens=_in_range("input-tokens", tokens_in if input_tokens is None else input_tokens, 1, 1_000_000),
        output_tokens=_in_range("output-tokens", tokens_out if output_tokens is None else output_tokens, 1, 1_000_000),
        seed=seed,
        lengths="lognormal" if lengths == "lognormal" else "fixed",
    )
    _check_ranges(long_tokens, long_every, long_prompts, turns)
    played = Scenario(scenario, long_tokens, long_every, long_prompts, turns)
    processes = _num_processes(client_processes, has_many=rate is not None or at_once > FEW_CLIENTS)

    def play(root: str) -> list[Report]:
        target = Target(root=root, api_key=api_key, processes=processes, commit=git_commit() or commit)
        return drive(target, load, played)

    if url is not None:
        reports = play(api_root(url))
    else:
        flags: dict[str, object] = {"--device": device, "--dtype": dtype, "--api-workers": api_workers}
        with own_server(model, flags | {"--memory-fraction": memory_fraction, "--max-running": max_running}) as root:
            reports = play(root)
    write_reports(reports, output)
    for report in reports:
        print_report(report)


def _check_choices(scenario: str, lengths: str, rate: float | None, concurrency: int | None) -> None:
    if scenario not in DEFAULTS:
        raise UsageError(f"--scenario {scenario} is not known. Allowed: {', '.join(DEFAULTS)}.")
    if lengths not in ("fixed", "lognormal"):
        raise UsageError(f"--lengths {lengths} is not known. Allowed: fixed, lognormal.")
    if rate is not None and concurrency is not None:
        raise UsageError(
            "--rate and --concurrency exclude each other. Give --rate for an open loop, else --concurrency."
        )
    if rate is not None and scenario != "load":
        raise UsageError(f"--rate is not for --scenario {scenario}, which has arrivals of its own. Leave --rate out.")


def _check_ranges(long_tokens: int, long_every: float, long_prompts: int, turns: int) -> None:
    _in_range("long-tokens", long_tokens, 1, 1_000_000)
    _in_range("long-every", long_every, 0.001, 3600)
    _in_range("long-prompts", long_prompts, 0, 100_000)
    _in_range("turns", turns, 2, 1000)


def _num_processes(named: int | None, *, has_many: bool) -> int:
    if named is not None:
        return _in_range("client-processes", named, 1, 256)
    return min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 2)) if has_many else 1


def _in_range(name: str, value: Number, low: float, high: float) -> Number:
    if not low <= value <= high:
        raise UsageError(f"--{name} {value} is out of range. Allowed: {low:g} to {high:g}.")
    return value
