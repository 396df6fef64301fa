"""`lfm bench offline`: how fast the engine is, in this process, on workloads of exact shape."""

from pathlib import Path
from typing import Annotated

from lfm.cli import options
from lfm.cli.options import ENGINE
from lfm.cli.workloads import WORKLOADS, find_workloads
from lfm.config import EngineConfig
from lfm.errors import UsageError


def offline(
    model: options.ModelArgument = ENGINE.model,
    workload: Annotated[
        str, options.flag("workload", "Which ones, with commas, or all: " + ",".join(WORKLOADS) + ".")
    ] = "b1,b8",
    output: Annotated[
        Path | None, options.flag("output", "File for the results, one JSON line per workload. It is overwritten.")
    ] = None,
    runs: Annotated[int, options.flag("runs", "Timed runs of each workload, after one that is not timed.")] = 3,
    commit: Annotated[
        str | None, options.flag("commit", "What to write as the commit where git cannot tell it.")
    ] = None,
    device: options.DeviceFlag = ENGINE.device,
    dtype: options.DtypeFlag = "auto",
    quantize: options.QuantizeFlag = ENGINE.quantize,
    kv_dtype: options.KvDtypeFlag = ENGINE.kv_dtype,
    max_running: options.MaxRunningFlag = ENGINE.max_running,
    memory_fraction: options.MemoryFractionFlag = ENGINE.memory_fraction,
    revision: options.RevisionFlag = ENGINE.revision,
    step_tokens: options.StepTokensFlag = ENGINE.step_tokens,
    block_size: options.BlockSizeFlag = ENGINE.block_size,
    plain_loop: options.PlainLoopFlag = ENGINE.plain_loop,
    debug: options.DebugFlag = False,
) -> None:
    """Measure the engine in this process. Prints a table, then one JSON line per workload.

    All requests of a workload are submitted together and timed until the last token is on the host: greedy, no
    penalties, exact output lengths, new prompt ids in every run, no prefix caching but for `agents`.
    """
    from lfm.cli.offline import Facts, measure, print_results, results_file

    if not 1 <= runs <= 100:
        raise UsageError(f"--runs {runs} is out of range. Allowed: 1 to 100.")
    workloads = find_workloads(workload)
    config = EngineConfig(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        quantize=quantize,
        kv_dtype=kv_dtype,
        max_running=max_running,
        step_tokens=step_tokens,
        block_size=block_size,
        memory_fraction=memory_fraction,
        plain_loop=plain_loop,
    )
    facts = Facts.of_this_machine(commit)
    results = []
    with results_file(output) as write:
        for result in measure(config, workloads, num_runs=runs, facts=facts):
            results.append(result)
            write(result)
    print_results(results)
