"""What a run reports: one JSON line per step in `metrics.jsonl`, and a line of progress for people."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from lfm.train.disk import full_disk_is_told


class StepMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step. Losses are means over its target tokens; `tokens` counts all inputs since the run began.

    `distill_loss` is there with a teacher, `validation_loss` where it was measured. `balance` is the entropy of the
    expert load over a uniform one's, mean and lowest over the layers.
    """

    step: int
    loss: float
    router_z_loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    targets: int
    tokens_per_s: float
    epoch: float
    balance: float | None
    lowest_balance: float | None
    seconds: float
    validation_loss: float | None = None
    distill_loss: float | None = None


class MetricsLog:
    """The JSONL file of a run. Lines of steps that a resumed run does again are dropped first."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if _step_of(line) < first_step]
        partial = path.with_name(f"{path.name}.partial")
        with full_disk_is_told(f"{partial} cannot be written"):
            partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        with full_disk_is_told(f"{self._path} cannot take the metrics of step {metrics.step + 1}"):
            self._file.write(msgspec.json.encode(metrics).decode() + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[StepMetrics]:
    """All steps of a log, in order."""
    return [msgspec.json.decode(line, type=StepMetrics) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Whole lines: a run that was killed may have left half a one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _step_of(line: str) -> int:
    return int(json.loads(line)["step"])


class ProgressLine:
    """Hands a line about the run to `on_progress` now and then: where it is, how fast, and when it will be done."""

    def __init__(
        self, num_steps: int, *, on_progress: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_steps, self._on_progress, self._clock = num_steps, on_progress, clock
        self._shown_s = -1e9

    def show(self, metrics: StepMetrics, *, seconds_per_step: float) -> None:
        now = self._clock()
        is_last = metrics.step + 1 == self._num_steps
        if now - self._shown_s < 0.25 and not is_last:
            return
        self._shown_s = now
        left_s = (self._num_steps - metrics.step - 1) * seconds_per_step
        balance = "" if metrics.balance is None else f", balance {metrics.balance:.3f}"
        self._on_progress(
            f"training: step {metrics.step + 1} of {self._num_steps}, loss {metrics.loss:.4f}, "
            f"lr {metrics.learning_rate:.2e}{balance}, {metrics.tokens_per_s:,.0f} tokens/s, "
            f"{format_seconds(left_s)} left"
        )


def format_seconds(seconds: float) -> str:
    """A time as people read it: 45 s, 12:30, 3:04:05."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
