"""A training run from its recipe to its last step: start or resume, train, save, stop.

Everything that decides the next step is in a checkpoint or in the recipe: weights, optimizer state, the number of the
step and the position in the data. Nothing else is random, so a run that was stopped goes on as if it had not been.
"""

import fcntl
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lfm.config import ModelConfig
from lfm.errors import MachineError, UsageError
from lfm.model.lfm2 import Lfm2
from lfm.model.source import resolve_model
from lfm.train.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_folders,
    load_checkpoint,
    read_state,
    remove_old_checkpoints,
    save_checkpoint,
)
from lfm.train.dataset import Dataset
from lfm.train.examples import load_tokenizer
from lfm.train.learner import Learner, NonFiniteError, StepResult, own_part, weights_in
from lfm.train.metrics import MetricsLog, ProgressLine, StepMetrics, read_metrics
from lfm.train.models import build_model, config_of, random_weights, read_weights
from lfm.train.plot import write_plot
from lfm.train.prepare import Kind, prepare
from lfm.train.recipe import TrainRecipe, differences, fingerprint
from lfm.train.sharding import build_sharded_model, whole_model
from lfm.train.steps import Position, StepData, StepReader, fixed_size
from lfm.train.teacher import Teacher
from lfm.train.world import World, joined


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
    device, dtype = choose_device(recipe)
    with joined(device) as world, ExitStack() as stack:
        with world.agreed():
            if world.is_first:
                stack.enter_context(_only_run(output))
        run = _Run(recipe, kind, world, device, dtype, on_progress=on_progress if world.is_first else lambda line: None)
        stack.callback(run.close)
        return run.go(lambda: should_stop() or 0 < 60 * minutes <= time.monotonic() - began_s)


class _Run:
    def __init__(
        self,
        recipe: TrainRecipe,
        kind: Kind,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        *,
        on_progress: Callable[[str], None],
    ) -> None:
        self._recipe, self._kind, self._world, self._on_progress = recipe, kind, world, on_progress
        self._device, self._dtype, self._output = device, dtype, Path(recipe.run.output)
        self._progress = _Progress()
        self._loss: float | None = None
        with world.agreed():
            self._origin = find_origin(recipe)
            if world.is_first:
                self._prepare()
        with world.agreed():
            self._reader = self._open_data()
            self._model = self._build_model()
            self._teacher = self._find_teacher()
        self._learner = self._start()
        with world.agreed():
            first_step = self._progress.step
            self._log = MetricsLog(self._output / "metrics.jsonl", first_step=first_step) if world.is_first else None

    def _prepare(self) -> None:
        prepare(
            self._recipe.data,
            self._kind,
            tokenizer_folder=self._origin.tokenizer_folder,
            folder=self._output / "data",
            on_progress=self._on_progress,
        )

    def _open_data(self) -> StepReader:
        recipe = self._recipe
        return StepReader(
            Dataset(self._output / "data"),
            batch_tokens=recipe.batch.tokens,
            accumulation=recipe.batch.accumulation,
            seed=recipe.run.seed,
            size=fixed_size(recipe) if self._device.type == "cuda" else None,
            rank=self._world.rank,
            num_ranks=self._world.size,
            num_held_back=recipe.data.validation_rows,
        )

    def _build_model(self) -> Lfm2:
        config, device, dtype = self._origin.config, self._device, self._dtype
        if self._world.size > 1:
            return build_sharded_model(config, device=device, dtype=dtype, world=self._world)
        model = build_model(config, device=device, dtype=dtype)
        model.rope(self._recipe.data.max_length)  # the tables of all positions, once
        return model

    def _find_teacher(self) -> Teacher | None:
        if self._recipe.distill is None:
            return None
        return Teacher(
            self._recipe.distill,
            student=self._origin.config,
            tokenizer_folder=self._origin.tokenizer_folder,
            device=self._device,
            dtype=self._dtype,
        )

    def _start(self) -> Learner:
        """The learner of the newest checkpoint, or a new one."""
        tensors: dict[str, Tensor] | None = None
        with self._world.agreed():
            tensors = self._resumed()
            weights = self._new_weights() if tensors is None else weights_in(tensors)
        learner = Learner(self._model, weights, self._recipe, world=self._world, teacher=self._teacher)
        if tensors is not None:
            learner.load_optimizer_state(tensors)
        return learner

    def close(self) -> None:
        if self._log is not None:
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
                with self._world.agreed():
                    if self._log is not None:
                        self._log.write(metrics)
                    line.show(metrics, seconds_per_step=(time.monotonic() - first_s) / (progress.step - first))
                is_due = progress.step % recipe.run.save_every_steps == 0
                if self._world.any(should_stop()):
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
            epoch=position.epoch + position.row / self._reader.num_rows,
            distill_loss=result.distill_loss if self._teacher is not None else None,
            balance=sum(balance) / len(balance) if balance else None,
            lowest_balance=min(balance, default=None),
            seconds=progress.seconds + seconds,
            validation_loss=self._validation_loss(progress.step + 1),
        )

    def _validation_loss(self, step: int) -> float | None:
        """The loss of what is held back, after a step that ends with a checkpoint; None after others."""
        is_due = step % self._recipe.run.save_every_steps == 0 or step == self._recipe.schedule.steps
        if not (is_due and self._recipe.data.validation_rows):
            return None
        return self._learner.validation_loss(self._reader.validation_batches())

    def _advice(self) -> str:
        folders = checkpoint_folders(self._output)
        where = f"The last good checkpoint is {folders[-1]}" if folders else "There is no checkpoint yet"
        return f"{where}. Lower optimizer.learning_rate; the same command then goes on from there."

    def _save(self) -> Path:
        """Write a checkpoint of where the run is, and the plot. Old checkpoints go only after that."""
        tensors = self._learner.state()
        folder = checkpoint_folder(self._output, self._progress.step)
        with self._world.agreed():
            if self._world.is_first:
                self._write(folder, tensors)
        return folder

    def _write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        recipe, model = self._recipe, self._model
        if self._world.size > 1:
            model = whole_model(self._origin.config, tensors, self._dtype)
        state = {**asdict(self._progress), "num_steps": recipe.schedule.steps, "fingerprint": self._fingerprint()}
        save_checkpoint(folder, model, Checkpoint(state, tensors), tokenizer_folder=self._origin.tokenizer_folder)
        remove_old_checkpoints(self._output, keep=recipe.run.keep_checkpoints)
        write_plot(self._output / "metrics.svg", read_metrics(self._output / "metrics.jsonl"))

    def _fingerprint(self) -> dict[str, Any]:
        """What the recipe and the number of processes fix, as JSON has it."""
        whole = fingerprint(self._recipe, self._kind) | {"processes": self._world.size}
        return cast(dict[str, Any], json.loads(json.dumps(whole)))

    def _new_weights(self) -> dict[str, Tensor]:
        origin, shape = self._origin, self._recipe.model.shape
        if origin.weights_folder is not None:
            weights = read_weights(origin.config, origin.weights_folder)
        else:
            assert shape is not None, "the recipe was checked"
            weights = random_weights(origin.config, std=shape.init_std, seed=self._recipe.run.seed)
        return {name: own_part(self._world, name, tensor) for name, tensor in weights.items()}

    def _resumed(self) -> dict[str, Tensor] | None:
        """This process's part of the newest checkpoint, and `_progress` from it; None if there is no checkpoint."""
        folders = checkpoint_folders(self._output)
        if not folders:
            return None
        folder = folders[-1]
        _check_shape(folder, self._origin.config)
        checkpoint = load_checkpoint(folder, device=self._device, keep=functools.partial(own_part, self._world))
        state = checkpoint.state
        if changed := differences({"processes": 1} | state["fingerprint"], self._fingerprint()):
            raise UsageError(
                f"{folder} was made by another recipe: {'; '.join(changed)}. Undo that, or name another run.output."
            )
        position = Position(**state["position"])
        self._progress = _Progress(**{f.name: state[f.name] for f in fields(_Progress)} | {"position": position})
        self._on_progress(f"resuming at step {self._progress.step} from {folder}")
        return dict(checkpoint.tensors)


def _check_shape(folder: Path, config: ModelConfig) -> None:
    found = replace(ModelConfig.from_folder(folder), dtype=config.dtype)
    if changed := differences(asdict(found), asdict(config)):
        raise UsageError(
            f"{folder} holds a model of another shape: {'; '.join(changed)}. Undo that, or name another run.output."
        )


@contextmanager
def _only_run(output: Path) -> Iterator[None]:
    """Make the folder and keep a second process out of it; the lock ends with this process, however it ends."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        fd = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"run.output={output} cannot be written to: {error.strerror}. Name another folder.") from error
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
