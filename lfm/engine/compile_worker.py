"""Worker of `lfm.engine.compile_ahead`: compiles its share of an engine's kernels into Triton's cache, without the GPU.

    python -m lfm.engine.compile_worker < job.json

Which kernels that is, a dry run of the engine's own steps tells: the same in every worker, in the same order. One tells
how many there are before it helps; the others compile what they meet on the way. Each takes the next that is in
nobody's hands: it locks one byte of a file that all have open, and the system gives the byte back when the worker ends,
however it ends. Everything it tells is a line of JSON on stdout.
"""

import fcntl
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TextIO

import msgspec
import torch

from lfm.config import EnginePlan, ModelConfig
from lfm.engine.lifeline import follow_parent
from lfm.engine.make_runner import DTYPES, make_runner
from lfm.engine.warm_up import run_every_step
from lfm.kernels.dry_run import Wanted, collect_only, compile_launch_tools, compile_launcher
from lfm.kernels.tuned import from_text
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import FAST
from lfm.model.pack import pack
from lfm.model.quantise import quantise

MAX_LINE = 2000  # below the system's PIPE_BUF, so that lines of several processes do not mix


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be compiled: for which model and plan, and for which GPU."""

    config: ModelConfig
    plan: EnginePlan
    capability: int  # 90: 9.0
    tables: str  # the tiles of that GPU, as `lfm.kernels.tuned` writes them
    lock_fd: int = -1
    parent_pid: int = -1


class Listed(msgspec.Struct, frozen=True, tag="listed"):
    """How many kernels there are."""

    num_kernels: int


class Kernel(msgspec.Struct, frozen=True, tag="kernel"):
    """One of them is in the cache, or cannot be compiled: `error` says why."""

    name: str
    key: str
    error: str = ""


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    """Something beside a kernel went wrong."""

    error: str


Line = Listed | Kernel | Broken


def kernels_of(job: Job, *, on_kernel: Callable[[Wanted], None] = lambda kernel: None) -> tuple[list[Wanted], str]:
    """The kernels that the job's steps take, in the order of their first use; and why there may be more, if so.

    `on_kernel` gets each as soon as a step asks for it.
    """
    config = one_layer_of_each_kind(job.config)
    plan = replace(job.plan, device="meta", num_blocks=None)
    with torch.device("meta"):
        model = Lfm2(config).to(DTYPES[plan.dtype]).requires_grad_(False)
    model = pack(quantise(model) if plan.quantize == "fp8" else model)
    problem = ""
    tables = from_text(job.tables)
    with collect_only(job.capability, tables, on_wanted=on_kernel) as wanted, torch.inference_mode():
        try:
            runner = make_runner(model, plan, num_ids=config.vocab_size, ops=FAST)
            runner.enable_graphs()
            run_every_step(runner, plan)
        except Exception as error:  # noqa: BLE001  (told, and what was found until then is compiled)
            problem = _in_words(error)
    return list(wanted.values()), problem


def one_layer_of_each_kind(config: ModelConfig) -> ModelConfig:
    """The same model with one layer per pair of an operator and a feed-forward: its kernels are those of the whole."""
    kinds = dict.fromkeys((config.is_moe_layer(i), config.layer_types[i]) for i in range(config.num_hidden_layers))
    return replace(
        config,
        num_hidden_layers=len(kinds),
        layer_types=tuple(operator for _, operator in sorted(kinds)),
        num_dense_layers=sum(not is_moe for is_moe, _ in kinds),
    )


def work(job: Job, output: TextIO) -> None:
    """Compile what no other worker does."""

    def tell(line: Line) -> None:
        output.write(msgspec.json.encode(line).decode() + "\n")
        output.flush()

    tried: set[str] = set()

    def help_with(kernel: Wanted) -> None:
        name, key = kernel.source.name, kernel.key
        if key in tried:
            return
        try:
            if not kernel.is_cached:
                if not _take(job.lock_fd, 1 + int(key[:12], 16)):
                    return  # another one is at it, or was when it ended
                tried.add(key)
                compile_launcher(kernel.compile())
            tried.add(key)
            tell(Kernel(name, key))
        except Exception as error:  # noqa: BLE001  (told; the engine will try again itself)
            tell(Kernel(name, key, _in_words(error)))

    if _take(job.lock_fd, 0):
        kernels, problem = kernels_of(job)
        tell(Listed(len(kernels)))
        if problem:
            tell(Broken(problem))
        try:
            compile_launch_tools()
        except Exception as error:  # noqa: BLE001  (told; the engine will try again itself)
            tell(Broken(_in_words(error)))
    else:
        kernels, _ = kernels_of(job, on_kernel=help_with)
    for kernel in kernels:
        help_with(kernel)


def _take(lock_fd: int, index: int) -> bool:
    """Whether byte `index` was free, and is this process's now."""
    try:
        fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[: MAX_LINE // 4]


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    follow_parent(job.parent_pid)
    os.nice(5)  # weights come first
    torch.set_num_threads(1)
    work(job, sys.stdout)


if __name__ == "__main__":
    main()
