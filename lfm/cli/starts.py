"""Starts a server and times what it does until a first request has its first token."""

import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2

from lfm import http_client as http
from lfm.cli.facts import git_commit, run
from lfm.cli.own_server import own_server
from lfm.errors import MachineError

GRAPHS_S = 30.0  # so long is waited, after the first token, for the graphs
WEIGHTS, KERNELS, GRAPHS = "weights are there", "kernels are compiled", "graphs are captured"
KERNEL_FOLDER = "TRITON_CACHE_DIR"  # Triton's name for where it keeps what it compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start. Times are seconds since the command; `phases` are the server's own lines and when they came.

    None where a server had nothing of the kind to do or, of graphs, has not told within GRAPHS_S.
    """

    model: str
    kernels: str  # "cold": nothing was compiled before; "warm": all that the cold start compiled is there
    weights_s: float | None  # all weights are there
    kernels_s: float | None  # compiled, beside the weights and for what was left behind them
    ready_s: float
    first_token_s: float
    graphs_s: float | None  # captured for all sizes of steps, which the engine does while it idles
    phases: list[tuple[float, str]]
    commit: str | None
    gpu: str | None


def measure_starts(model: str, flags: Mapping[str, object], *, commit: str | None) -> list[Start]:
    """A cold start and a warm one. Raises the LfmError of a server that cannot start or does not answer."""
    gpu = run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    before = os.environ.get(KERNEL_FOLDER)
    try:
        with tempfile.TemporaryDirectory(prefix="lfm-kernels-") as folder:
            os.environ[KERNEL_FOLDER] = folder  # the server's processes inherit it
            return [
                _start(model, flags, kernels=kernels, commit=git_commit() or commit, gpu=gpu)
                for kernels in ("cold", "warm")
            ]
    finally:
        if before is None:
            del os.environ[KERNEL_FOLDER]
        else:
            os.environ[KERNEL_FOLDER] = before


def _start(model: str, flags: Mapping[str, object], *, kernels: str, commit: str | None, gpu: str | None) -> Start:
    started_s = time.monotonic()
    phases: list[tuple[float, str]] = []

    def elapsed_s() -> float:
        return round(time.monotonic() - started_s, 3)

    has_graphs = threading.Event()

    def note_phase(line: str) -> None:
        phases.append((elapsed_s(), line))

    def note_graphs(line: str) -> None:
        if GRAPHS in line:
            note_phase(line[line.index(GRAPHS) :])
            has_graphs.set()

    with own_server(model, flags, on_line=note_phase, on_later_line=note_graphs) as root:
        ready_s = elapsed_s()
        _ask(root)
        first_token_s = elapsed_s()
        if gpu is not None and flags.get("--device") != "cpu":
            has_graphs.wait(GRAPHS_S)
    return Start(
        model=model,
        kernels=kernels,
        weights_s=_when(phases, WEIGHTS),
        kernels_s=_when(phases, KERNELS),
        ready_s=ready_s,
        first_token_s=first_token_s,
        graphs_s=_when(phases, GRAPHS),
        phases=phases,
        commit=commit,
        gpu=gpu,
    )


def _when(phases: Sequence[tuple[float, str]], what: str) -> float | None:
    """When the server told of it."""
    return next((at_s for at_s, line in phases if line.startswith(what)), None)


def _ask(root: str) -> None:
    """A request of one token: its answer is its first token."""
    with httpx2.Client(timeout=http.TIMEOUT) as client:
        body = {
            "model": http.served_model(client, root),
            "messages": [{"role": "user", "content": "Good morning"}],
            "max_tokens": 1,
        }
        try:
            response = client.post(f"{root}/v1/chat/completions", json=body)
        except httpx2.HTTPError as error:
            raise http.unreachable(root, error) from error
        if response.status_code != 200:
            raise http.refused(response)


def write_starts(starts: Sequence[Start], path: Path | None) -> None:
    """Write each as a JSON line. Raises MachineError."""
    if path is None:
        return
    try:
        path.write_text("".join(json.dumps(asdict(start)) + "\n" for start in starts), encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error.strerror}). Choose another --output.") from error


def print_starts(starts: Sequence[Start]) -> None:
    """The phases for people, then one JSON line per start for programs."""
    for start in starts:
        times = {
            "weights": start.weights_s,
            "kernels": start.kernels_s,
            "ready": start.ready_s,
            "first token": start.first_token_s,
            "graphs": start.graphs_s,
        }
        told = ", ".join(f"{what} {at_s:.1f} s" for what, at_s in times.items() if at_s is not None)
        print(f"{start.model}, kernels {start.kernels}: {told}")
        for at_s, line in start.phases:
            print(f"  {at_s:7.2f} s  {line}")
    for start in starts:
        print(json.dumps(asdict(start)), flush=True)
