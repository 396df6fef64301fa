"""Data of a recipe -> shards of token rows on disk, by several processes, once.

Every file, and every synthetic shard, is one job; jobs run in processes of their own, as many at a time as there are
cores. What a job writes depends on nothing but its description, so the number of processes changes no token.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from lfm.chat.tokenizer import Tokenizer
from lfm.errors import InternalError, LfmError, MachineError, RequestError, UsageError
from lfm.train.dataset import Row, ShardInfo, read_manifest, shard_as_dict, write_manifest, write_shard
from lfm.train.disk import full_disk_is_told
from lfm.train.examples import document_rows, every_token, load_tokenizer, read_examples, sft_row
from lfm.train.recipe import DataSettings, SyntheticSettings

Kind = Literal["pretrain", "sft"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One shard to write: from a file, or number `shard` of the synthetic ones."""

    kind: Kind
    name: str
    folder: str
    tokenizer: str
    max_length: int
    file: str | None = None
    synthetic: SyntheticSettings | None = None
    shard: int = 0


def prepare(
    data: DataSettings,
    kind: Kind,
    *,
    tokenizer_folder: Path,
    folder: Path,
    num_processes: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str], None],
) -> None:
    """Fill `folder` with the shards of `data`, unless it already holds exactly them.

    When `should_stop` says so, the folder is left without its manifest, to be filled anew.
    Raises UsageError if a file of the recipe is missing, has changed since `folder` was filled, or is malformed.
    """
    key = _key(data, kind, tokenizer_folder)
    manifest = read_manifest(folder) if folder.exists() else None
    if manifest is not None:
        if manifest["key"] != json.loads(json.dumps(key)):
            raise UsageError(
                f"{folder} was prepared from other files, another tokenizer or other [data] settings. "
                "Remove it, or name another run.output."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    jobs = list(_jobs(data, kind, tokenizer_folder, folder))
    num_processes = min(len(jobs), num_processes or os.cpu_count() or 1)
    shards = _run_all(jobs, num_processes, should_stop, on_progress)
    if shards is not None:
        write_manifest(folder, shards, key=key)


@contextmanager
def prepared_meanwhile(
    data: DataSettings, kind: Kind, *, tokenizer_folder: Path, folder: Path
) -> Iterator[Callable[[], None]]:
    """Prepare in the background, on all but three of the cores; the body calls what it is given to wait for the end.

    Leaving the body stops what is not done. Errors are those of `prepare`, raised where the body waits.
    """
    is_over = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as executor:
        work = executor.submit(
            prepare,
            data,
            kind,
            tokenizer_folder=tokenizer_folder,
            folder=folder,
            num_processes=max(2, (os.cpu_count() or 1) - 3),
            should_stop=is_over.is_set,
            on_progress=lambda line: None,
        )
        try:
            yield work.result
        finally:
            is_over.set()


def run_job(job: Job) -> ShardInfo:
    """Write one shard, in this process."""
    tokenizer = load_tokenizer(Path(job.tokenizer))
    rows = _file_rows(job, tokenizer) if job.file is not None else _synthetic_rows(job, tokenizer)
    with full_disk_is_told(f"{job.folder} cannot take the shard {job.name} of the prepared data"):
        return write_shard(Path(job.folder), job.name, rows, max_length=job.max_length)


def _file_rows(job: Job, tokenizer: Tokenizer) -> Iterator[Row]:
    assert job.file is not None
    to_row = every_token if job.kind == "pretrain" else sft_row
    for number, example in enumerate(read_examples(Path(job.file)), start=1):
        if isinstance(example, str):
            if job.kind == "sft":
                raise UsageError(f"{job.file}: example {number} is a text; SFT needs conversations.")
            yield from document_rows(tokenizer, example, max_length=job.max_length)
            continue
        try:
            yield to_row(tokenizer, example)
        except RequestError as error:
            raise UsageError(f"{job.file}: example {number}: {error}") from error


def _synthetic_rows(job: Job, tokenizer: Tokenizer) -> Iterator[Row]:
    from lfm.train.synthetic.generate import conversations  # its tables take a moment to load

    assert job.synthetic is not None
    to_row = every_token if job.kind == "pretrain" else sft_row
    for conversation in conversations(job.synthetic, shard=job.shard):
        yield to_row(tokenizer, conversation)


def _jobs(data: DataSettings, kind: Kind, tokenizer_folder: Path, folder: Path) -> Iterator[Job]:
    for number, file in enumerate(data.files):
        yield Job(
            kind=kind,
            name=f"file-{number:05d}",
            folder=str(folder),
            tokenizer=str(tokenizer_folder),
            max_length=data.max_length,
            file=file,
        )
    for shard in range(data.synthetic.shards if data.synthetic else 0):
        yield Job(
            kind=kind,
            name=f"synthetic-{shard:05d}",
            folder=str(folder),
            tokenizer=str(tokenizer_folder),
            max_length=data.max_length,
            synthetic=data.synthetic,
            shard=shard,
        )


def _key(data: DataSettings, kind: Kind, tokenizer_folder: Path) -> dict[str, Any]:
    """What the shards depend on: settings, the tokenizer's content, the size and time of every file."""
    tokenizer = hashlib.sha256((tokenizer_folder / "tokenizer.json").read_bytes()).hexdigest()
    files = []
    for file in data.files:
        try:
            stat = Path(file).stat()
        except OSError as error:
            raise UsageError(f"The data file {file} cannot be read: {error.strerror}. Check data.files.") from error
        files.append([file, stat.st_size, stat.st_mtime_ns])
    synthetic = msgspec.to_builtins(data.synthetic)
    return {"kind": kind, "tokenizer": tokenizer, "max_length": data.max_length, "files": files, "synthetic": synthetic}


def _run_all(
    jobs: list[Job], num_processes: int, should_stop: Callable[[], bool], on_progress: Callable[[str], None]
) -> list[ShardInfo] | None:
    """Run the jobs, here if one process is enough. The first failure stops the rest. None: `should_stop` said so."""
    if num_processes <= 1:
        done = []
        for job in jobs:
            done.append(run_job(job))
            on_progress(_progress(len(done), len(jobs)))
        return done
    waiting = list(reversed(jobs))
    running: dict[str, subprocess.Popen[bytes]] = {}
    infos: dict[str, ShardInfo] = {}
    try:
        while waiting or running:
            if should_stop():
                return None
            while waiting and len(running) < num_processes:
                job = waiting.pop()
                running[job.name] = _start(job)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    infos[name] = _result(name, process)
                    on_progress(_progress(len(infos), len(jobs)))
            time.sleep(0.02)
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    return [infos[job.name] for job in jobs]


def _progress(num_done: int, num_jobs: int) -> str:
    return f"preparing data: {num_done} of {num_jobs} shards"


def _start(job: Job) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}  # the processes are the parallelism
    command = [sys.executable, "-m", "lfm.train.prepare", msgspec.json.encode(job).decode()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def _result(name: str, process: "subprocess.Popen[bytes]") -> ShardInfo:
    output, errors = process.communicate()
    for kind in (UsageError, MachineError):
        if process.returncode == kind.exit_code:
            raise kind(errors.decode(errors="replace").strip())
    if process.returncode:
        raise InternalError(f"Preparing {name} failed: {errors.decode(errors='replace').strip()[-2000:]}")
    return ShardInfo(**json.loads(output))


def main() -> int:
    """The entry of a worker process: its one argument is a job as JSON, its output a ShardInfo as JSON."""
    try:
        info = run_job(msgspec.json.decode(sys.argv[1], type=Job))
    except LfmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(shard_as_dict(info)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
