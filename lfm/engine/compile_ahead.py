"""Compiles an engine's kernels in processes of their own, while its weights are loaded: for starts without a cache.

Triton compiles a kernel when it is first launched, one after the other. Here as many processes as there are cores fill
its cache before; which kernels, see `lfm.engine.compile_worker`. What they cannot do, the engine does when it comes to
it: nothing that goes wrong here costs more than time. When all kernels are in the cache, a file there says so, and the
next start with the same model, plan, GPU and code starts no process.
"""

import contextlib
import hashlib
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import torch

import lfm
from lfm.config import EnginePlan, ModelConfig
from lfm.engine.compile_worker import Broken, Job, Kernel, Line, Listed
from lfm.kernels.triton_guard import HAS_TRITON
from lfm.kernels.tuned import to_text, tuned_for

logger = logging.getLogger(__name__)

MAX_WORKERS = 16  # each takes a second of a core and half a GB of memory to begin
STALL_S = 90.0  # no kernel takes so long; what is silent for longer is given up
PROGRESS_S = 1.0
CODE = ("engine", "kernels", "model")  # parts of the package that decide what is compiled

COMMAND = (sys.executable, "-m", "lfm.engine.compile_worker")
_line_decoder = msgspec.json.Decoder(Line)


def job_for(config: ModelConfig, plan: EnginePlan) -> Job | None:
    """What to compile for a plan on this machine's GPU; None where the engine takes no kernels of ours."""
    if not (HAS_TRITON and plan.device.startswith("cuda") and plan.dtype == "bfloat16") or plan.plain_loop:
        return None
    device = torch.device(plan.device)
    major, minor = torch.cuda.get_device_capability(device)
    tables = to_text(tuned_for(device), gpu="")
    # What no kernel depends on is left out, so that a start that differs in it finds the same file.
    plan = replace(plan, num_blocks=None, memory_fraction=0.9, max_queue=0, seed=0, num_threads=None, reasons=())
    return Job(config=config, plan=plan, capability=10 * major + minor, tables=tables)


class CompileAhead:
    """Compiling processes. Start them, load weights, `wait`; `close` ends them, or use `with`."""

    def __init__(self, job: Job, *, command: Sequence[str] = COMMAND, num_workers: int | None = None) -> None:
        self._started_s = time.monotonic()
        self._seal = seal_of(job)
        self._lines: queue.SimpleQueue[tuple[float, bytes | None]] = queue.SimpleQueue()  # and when they came
        self._num_kernels: int | None = None
        self._cached: dict[str, Kernel] = {}
        self._failures: list[str] = []
        self._is_over = is_sealed(self._seal)
        self._processes: list[subprocess.Popen[bytes]] = []
        if not self._is_over:
            num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self._start(job, command, num_workers or min(num_cores, MAX_WORKERS))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def _start(self, job: Job, command: Sequence[str], num_workers: int) -> None:
        """Start the processes; those that cannot be started are done without."""
        try:
            read_fd, write_fd = os.pipe()
        except OSError as error:
            logger.warning("nothing is compiled ahead: %s", error)
            self._is_over = True
            return
        threading.Thread(target=self._read, args=(read_fd,), name="lfm-compile", daemon=True).start()
        # They see no GPU, import what this process imports, and nothing from the working directory besides.
        paths = os.pathsep.join(map(os.path.abspath, sys.path))
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
        try:
            with tempfile.TemporaryFile() as locks:
                told = msgspec.structs.replace(job, lock_fd=locks.fileno(), parent_pid=os.getpid())
                for _ in range(num_workers):
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=write_fd,
                        stderr=subprocess.DEVNULL,
                        pass_fds=(locks.fileno(),),
                        env=os.environ | quiet,
                    )
                    self._processes.append(process)
                    assert process.stdin is not None
                    with contextlib.suppress(BrokenPipeError), process.stdin as task:
                        task.write(msgspec.json.encode(told))  # some 10 KB, which the pipe takes at once
        except OSError as error:
            logger.warning("compiling in %d of %d processes: %s", len(self._processes), num_workers, error)
        finally:
            os.close(write_fd)

    def _read(self, fd: int) -> None:
        """Queue what the processes tell, then None when all have ended. Runs in a thread."""
        with open(fd, "rb") as lines:
            for line in lines:
                self._lines.put((time.monotonic(), line))
        self._lines.put((time.monotonic(), None))

    def wait(self, on_phase: Callable[[str], None] = lambda line: None, *, stall_s: float = STALL_S) -> None:
        """Until all kernels are in the cache, no process is left, or none has told anything for `stall_s` seconds."""
        ended_s = self._follow(on_phase, stall_s)
        if self._num_kernels is None:
            return
        if len(self._cached) == self._num_kernels and not self._failures:
            set_seal(self._seal, list(self._cached.values()))
        elapsed_s = ended_s - self._started_s
        on_phase(f"kernels are compiled, {len(self._cached)} of {self._num_kernels}, after {elapsed_s:.1f} s")

    def _follow(self, on_phase: Callable[[str], None], stall_s: float) -> float:
        """Take in what is told until it is over; when that was."""
        came_s, told_s = self._started_s, -PROGRESS_S
        while not self._is_over:
            try:
                came_s, line = self._lines.get(timeout=stall_s)
            except queue.Empty:
                logger.warning("compiling in %d processes: given up after %g silent seconds", len(self.pids), stall_s)
                break
            self._take_in(line)
            if self._num_kernels is not None and came_s - told_s >= PROGRESS_S:
                told_s = came_s
                on_phase(f"compiling kernels: {len(self._cached)} of {self._num_kernels}")
        self.close()
        return came_s

    def _take_in(self, line: bytes | None) -> None:
        if line is None:
            self._is_over = True
            return
        try:
            told = _line_decoder.decode(line)
        except msgspec.MsgspecError:
            logger.debug("a compiling process told %r", line[:200])
            return
        if isinstance(told, Listed):
            self._num_kernels = told.num_kernels
        elif told.error:
            self._fail(told.error if isinstance(told, Broken) else f"{told.name}: {told.error}")
        elif isinstance(told, Kernel):
            self._cached[told.key] = told
            self._is_over = len(self._cached) == self._num_kernels

    def _fail(self, what: str) -> None:
        """Say what failed first; the rest often fails alike."""
        level = logging.DEBUG if self._failures else logging.WARNING
        logger.log(level, "not compiled ahead, so that the engine has to: %s", what)
        self._failures.append(what)

    def close(self) -> None:
        """End the processes. Idempotent."""
        self._is_over = True
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._processes:
            process.wait()


def seal_of(job: Job) -> Path:
    """The file in Triton's cache that says that all kernels of a job are there. Its name is a hash of what they are."""
    import triton
    from triton import knobs

    digest = hashlib.sha256(msgspec.json.encode(job))
    digest.update(f"torch {torch.__version__}, triton {triton.__version__}".encode())
    for name, value in sorted(os.environ.items()):
        if name.startswith("TRITON_") and name != "TRITON_CACHE_DIR":
            digest.update(f"{name}={value}\0".encode())
    root = Path(lfm.__file__).parent
    for path in sorted(path for part in CODE for path in (root / part).glob("*.py")):
        digest.update(path.read_bytes())
    return Path(knobs.cache.dir) / f"lfm-{digest.hexdigest()[:32]}.json"


def is_sealed(path: Path) -> bool:
    """Whether the file is there and all kernels that it names still are."""
    from lfm.kernels.dry_run import is_cached

    try:
        kernels = msgspec.json.decode(path.read_bytes(), type=list[Kernel])
        return all(is_cached(kernel.name, kernel.key) for kernel in kernels)
    except (OSError, ValueError):  # no such file, or no kernel's key; Triton makes folders for those it looks for
        return False


def set_seal(path: Path, kernels: list[Kernel]) -> None:
    """Write the file. A cache that cannot be written to is left alone."""
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        draft.write_bytes(msgspec.json.encode(kernels))
        draft.replace(path)
    except OSError as error:
        logger.info("%s cannot be written: %s", path, error)
