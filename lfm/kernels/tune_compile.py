"""Worker of `lfm.kernels.tune`: compiles its share of the candidates into Triton's cache, without the GPU.

    python -m lfm.kernels.tune_compile CAPABILITY < jobs.json

A job is a case and the text of its tables; what does not compile is named on stdout.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

import torch

from lfm.kernels.dry_run import compile_only
from lfm.kernels.tune_calls import Case, calls_of
from lfm.kernels.tuned import Tuned, from_text, replaced, to_text

Job = tuple[Case, Tuned]


def compile_all(jobs: Sequence[Job], capability: int, *, workers: int) -> list[str]:
    """Fill Triton's cache with the kernels of all jobs, in processes of their own. Returns what failed."""
    command = [sys.executable, "-m", "lfm.kernels.tune_compile", str(capability)]
    processes = []
    for i in range(workers):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        json.dump([(case, to_text(tables, gpu="")) for case, tables in jobs[i::workers]], process.stdin)
        process.stdin.close()
        processes.append(process)
    lines: list[str] = []
    for process in processes:
        assert process.stdout is not None
        with process.stdout as output:
            lines += output.read().splitlines()
        if code := process.wait():
            lines.append(f"a compiling process ended with code {code}; its share is compiled when it is measured")
    return lines


def compile_share(jobs: Sequence[Job], capability: int) -> list[str]:
    """Compile these here. Returns what failed."""
    failed = []
    with compile_only(capability):
        for case, tables in jobs:
            try:
                with replaced(tables):
                    for calls in calls_of(case, torch.device("meta")):
                        calls[0]()
            except Exception as error:  # noqa: BLE001  (a candidate may not compile; it is named, and left out later)
                cause = " ".join(str(error).split())[:100]
                failed.append(f"{case}: does not compile: {type(error).__name__}: {cause}")
    return failed


def main() -> None:
    torch.set_num_threads(1)
    jobs = [(Case(*case), from_text(text)) for case, text in json.load(sys.stdin)]
    for line in compile_share(jobs, int(sys.argv[1])):
        print(line)


if __name__ == "__main__":
    main()
