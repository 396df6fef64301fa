"""A training run from its recipe to its last step: start or resume, train, save, stop.

Everything that decides the next step is in a checkpoint or in the recipe: weights, optimizer state, the number of the
step and the position in the data. Nothing else is random, so a run that was stopped goes on as if it had not been.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from lfm.config import ModelConfig
from lfm.errors import MachineError, UsageError
from lfm.model.lfm2 import Lfm2
from lfm.model.source import resolve_model
from lfm.train.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    load_checkpoint,
    read_state,
    remove_old_checkpoints,
    save_checkpoint,
)
from lfm.train.dataset import Dataset
from lfm.train.examples import load_tokenizer
from lfm.train.learner import Learner, NonFiniteError, StepResult, weights_in
from lfm.train.metrics import MetricsLog, ProgressLine, StepMetrics, read_metrics
from lfm.train.models import build_model, config_of, random_weights, read_weights
from lfm.train.plot import write_plot
from lfm.train.prepare import Kind, prepare
from lfm.train.recipe import TrainRecipe, differences, fingerprint
from lfm.train.steps import Position, StepData, StepReader, fixed_size


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run starts from: the shape, the tokenizer's folder, and the folder of given weights (None: random)."""

    config: ModelConfig
    tokenizer_folder: Path
    weights_folder: Path | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: steps done in all, whether that was all of them, the newest checkpoint, the last loss."""

    num_steps: int
    is_finished: bool
    checkpoint: Path
    loss: float | None


@dataclass(slots=True)
class _Progress:
    """Where a run is: what a checkpoint says beside its tensors."""

    step: int = 0
    position: Position = field(default_factory=Position)
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0


def find_origin(recipe: TrainRecipe) -> Origin:
    """Resolve [model] and the tokenizer. Raises LfmError if a folder lacks what is needed."""
    model, tokenizer = recipe.model, recipe.data.tokenizer
    if model.shape is not None:
        assert tokenizer is not None, "the recipe was checked"
        return Origin(config_of(model.shape, load_tokenizer(Path(tokenizer))), Path(tokenizer), None)
    assert model.start is not None, "the recipe was checked"
    source = resolve_model(str(_finished_checkpoint(Path(model.start)) or model.start))
    if source.folder is None:
        raise UsageError(f"model.start={model.start} has no weights to start from. Give a folder or a hub id.")
    return Origin(source.config, Path(tokenizer) if tokenizer else source.folder, source.folder)


def _finished_checkpoint(output: Path) -> Path | None:
    """The last checkpoint of another run's output folder; None if the folder is none. UsageError if it is not done."""
    folders = checkpoint_folders(output)
    if not folders:
        return None
    state = read_state(folders[-1])
    if state["step"] < state["num_steps"]:
        raise UsageError(
            f"model.start: the run in {output} stopped at step {state['step']} of {state['num_steps']}. Let it finish, "
            f"or name the folder of a checkpoint, such as {folders[-1]}."
        )
    return folders[-1]


def choose_device(recipe: TrainRecipe) -> tuple[torch.device, torch.dtype]:
    """Where and in what to compute. Raises MachineError if a GPU is asked for and there is none."""
    wanted, dtype = recipe.run.device, recipe.run.dtype
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MachineError('run.device="cuda", but no CUDA device can be used. Use "cpu" or "auto".')
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" else "float32"
    return torch.device(kind), torch.bfloat16 if dtype == "bfloat16" else torch.float32


def train(
    recipe: TrainRecipe,
    kind: Kind,
    *,
    minutes: float = 0.0,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str], None],
) -> Outcome:
    """Run a recipe, from its newest checkpoint if there is one, until its last step or `minutes` have passed.

    `should_stop` is asked after every step; when it says so, the run saves and ends. `minutes` 0: no limit.
    Raises UsageError for a recipe, data or checkpoint that do not go together, and for a loss that is not finite (the
    newest checkpoint is then the last good one); MachineError if memory or disk run out.
    """
    began_s = time.monotonic()
    output = Path(recipe.run.output)
    output.mkdir(parents=True, exist_ok=True)
    with _only_run(output):
        run = _Run(recipe, kind, output, on_progress=on_progress)
        try:
            return run.go(lambda: should_stop() or 0 < 60 * minutes <= time.monotonic() - began_s)
        finally:
            run.close()


class _Run:
    def __init__(self, recipe: TrainRecipe, kind: Kind, output: Path, *, on_progress: Callable[[str], None]) -> None:
        self._recipe, self._kind, self._output, self._on_progress = recipe, kind, output, on_progress
        device, dtype = choose_device(recipe)
        self._origin = find_origin(recipe)
        prepare(
            recipe.data,
            kind,
            tokenizer_folder=self._origin.tokenizer_folder,
            folder=output / "data",
            on_progress=on_progress,
        )
        self._dataset = Dataset(output / "data")
        self._reader = StepReader(
            self._dataset,
            batch_tokens=recipe.batch.tokens,
            accumulation=recipe.batch.accumulation,
            seed=recipe.run.seed,
            size=fixed_size(recipe) if device.type == "cuda" else None,
        )
        model = build_model(self._origin.config, device=device, dtype=dtype)
        self._progress = _Progress()
        self._learner = self._resumed(model, device) or self._new(model)
        self._model = model
        model.rope(recipe.data.max_length)  # the tables of all positions, once
        self._log = MetricsLog(output / "metrics.jsonl", first_step=self._progress.step)
        self._loss: float | None = None
        self._checkpoint: Path | None = None

    def close(self) -> None:
        self._log.close()

    def go(self, should_stop: Callable[[], bool]) -> Outcome:
        recipe, progress = self._recipe, self._progress
        num_steps = recipe.schedule.steps
        line = ProgressLine(num_steps, on_progress=self._on_progress)
        first, first_s = progress.step, time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
            # The next step's batches are packed while this one is computed.
            ahead = reader.submit(self._reader.read, progress.position)
            while progress.step < num_steps:
                data = ahead.result()
                ahead = reader.submit(self._reader.read, data.next_position)
                metrics = self._step(data)
                line.show(metrics, seconds_per_step=(time.monotonic() - first_s) / (progress.step - first))
                is_due = progress.step % recipe.run.save_every_steps == 0
                if should_stop():
                    break
                if is_due and progress.step < num_steps:
                    self._save()
        folder = self._save()
        return Outcome(progress.step, progress.step == num_steps, folder, self._loss)

    def _step(self, data: StepData) -> StepMetrics:
        progress = self._progress
        began_s = time.monotonic()
        try:
            result = self._learner.step(data, progress.step)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. {self._advice()}") from error
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"The GPU has too little memory for batch.tokens={self._recipe.batch.tokens}. Use fewer tokens and "
                "more batch.accumulation, or run.checkpoint_activations = true."
            ) from error
        seconds = time.monotonic() - began_s
        metrics = self._metrics(data, result, seconds)
        progress.step += 1
        progress.position = data.next_position
        progress.tokens, progress.targets = metrics.tokens, metrics.targets
        progress.seconds += seconds
        self._loss = result.loss
        self._log.write(metrics)
        return metrics

    def _metrics(self, data: StepData, result: StepResult, seconds: float) -> StepMetrics:
        progress, position = self._progress, data.next_position
        balance = result.balance
        return StepMetrics(
            step=progress.step,
            loss=result.loss,
            router_z_loss=result.router_z_loss,
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            tokens=progress.tokens + data.num_tokens,
            targets=progress.targets + data.num_targets,
            tokens_per_s=data.num_tokens / max(seconds, 1e-9),
            epoch=position.epoch + position.row / self._dataset.num_rows,
            balance=sum(balance) / len(balance) if balance else None,
            lowest_balance=min(balance, default=None),
            seconds=progress.seconds + seconds,
        )

    def _advice(self) -> str:
        folders = checkpoint_folders(self._output)
        where = f"The last good checkpoint is {folders[-1]}" if folders else "There is no checkpoint yet"
        return f"{where}. Lower optimizer.learning_rate; the same command then goes on from there."

    def _save(self) -> Path:
        """Write a checkpoint of where the run is, and the plot. Old checkpoints go only after that."""
        num_steps = self._recipe.schedule.steps
        state = {**asdict(self._progress), "num_steps": num_steps, "fingerprint": fingerprint(self._recipe, self._kind)}
        checkpoint = Checkpoint(state, self._learner.state())
        folder = save_checkpoint(
            self._output,
            self._progress.step,
            self._model,
            checkpoint,
            tokenizer_folder=self._origin.tokenizer_folder,
        )
        remove_old_checkpoints(self._output, keep=self._recipe.run.keep_checkpoints)
        write_plot(self._output / "metrics.svg", read_metrics(self._output / "metrics.jsonl"))
        return folder

    def _new(self, model: Lfm2) -> Learner:
        origin, shape = self._origin, self._recipe.model.shape
        if origin.weights_folder is not None:
            weights = read_weights(origin.config, origin.weights_folder)
        else:
            assert shape is not None, "the recipe was checked"
            weights = random_weights(origin.config, std=shape.init_std, seed=self._recipe.run.seed)
        return Learner(model, weights, self._recipe)

    def _resumed(self, model: Lfm2, device: torch.device) -> Learner | None:
        """The learner of the newest checkpoint, and `_progress` from it; None if there is no checkpoint."""
        folders = checkpoint_folders(self._output)
        if not folders:
            return None
        folder = folders[-1]
        _check_shape(folder, self._origin.config)
        checkpoint = load_checkpoint(folder, device=device)
        state = checkpoint.state
        now = json.loads(json.dumps(fingerprint(self._recipe, self._kind)))
        if changed := differences(state["fingerprint"], now):
            raise UsageError(
                f"{folder} was made by another recipe: {'; '.join(changed)}. Undo that, or name another run.output."
            )
        position = Position(**state["position"])
        self._progress = _Progress(**{f.name: state[f.name] for f in fields(_Progress)} | {"position": position})
        learner = Learner(model, weights_in(checkpoint.tensors), self._recipe)
        learner.load_optimizer_state(checkpoint.tensors)
        self._on_progress(f"resuming at step {self._progress.step} from {folder}")
        return learner


def _check_shape(folder: Path, config: ModelConfig) -> None:
    found = replace(ModelConfig.from_folder(folder), dtype=config.dtype)
    if changed := differences(asdict(found), asdict(config)):
        raise UsageError(
            f"{folder} holds a model of another shape: {'; '.join(changed)}. Undo that, or name another run.output."
        )


@contextmanager
def _only_run(output: Path) -> Iterator[None]:
    """Keep a second process out of the same folder; the lock ends with this process, however it ends."""
    fd = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another process is training in {output}. Wait for it, or name another folder."
            ) from error
        yield
    finally:
        os.close(fd)
