"""`lfm train tokenizer|pretrain|sft|builtin`: train from a recipe, in this process.

The same command resumes what was stopped. Ctrl-C ends after the step that runs, with a checkpoint; a second one ends
at once. `torchrun --nproc-per-node N -m lfm.cli train pretrain|sft RECIPE` does it with N processes, of which the first
one talks.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lfm.cli import options
from lfm.cli.terminal import PhaseLine, note
from lfm.errors import UsageError

if TYPE_CHECKING:
    from lfm.train.recipe import TrainRecipe

EXIT_INTERRUPTED = 130

train = typer.Typer(help="Train a tokenizer or a model from one TOML file.", no_args_is_help=True)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see docs/training.md.")]
DryRunFlag = Annotated[bool, options.flag("dry_run", "Check the recipe, print sizes, memory and time, and end.")]
MinutesFlag = Annotated[
    float | None, options.flag("minutes", "Save and end after so many minutes. Unset: the recipe's.")
]


@train.command()
def tokenizer(recipe: RecipeArgument, dry_run: DryRunFlag = False, debug: options.DebugFlag = False) -> None:
    """Train a byte-level BPE tokenizer with LFM2's control tokens."""
    from lfm.train.recipe import TokenizerRecipe, read_recipe
    from lfm.train.tokenizer import run_recipe

    _refuse_processes("tokenizer")
    settings = read_recipe(recipe, TokenizerRecipe)
    if dry_run:
        note(f"tokenizer: {settings.tokenizer.vocab_size:,} tokens, into {settings.tokenizer.output}")
        return
    with _phases() as phases:
        folder = run_recipe(settings, on_progress=phases)
        phases.finish(f"the tokenizer is in {folder}")


@train.command()
def pretrain(
    recipe: RecipeArgument,
    dry_run: DryRunFlag = False,
    minutes: MinutesFlag = None,
    debug: options.DebugFlag = False,
) -> None:
    """Train on whole texts and conversations: every token counts. Under torchrun, with several GPUs."""
    _train(recipe, "pretrain", dry_run=dry_run, minutes=minutes)


@train.command()
def sft(
    recipe: RecipeArgument,
    dry_run: DryRunFlag = False,
    minutes: MinutesFlag = None,
    debug: options.DebugFlag = False,
) -> None:
    """Fine-tune on conversations: only the assistant's turns count. Under torchrun, with several GPUs."""
    _train(recipe, "sft", dry_run=dry_run, minutes=minutes)


@train.command()
def builtin(minutes: MinutesFlag = None, debug: options.DebugFlag = False) -> None:
    """Make the built-in model from nothing: its tokenizer, pretraining, SFT. Writes into runs/builtin."""
    from lfm.train.export import RECIPES, export_model, recipe_path
    from lfm.train.prepare import prepared_meanwhile
    from lfm.train.recipe import TrainRecipe, read_recipe

    _refuse_processes("builtin")
    began_s = time.monotonic()
    paths = {stage: recipe_path(name) for stage, name in RECIPES.items()}
    tokenizer(paths["tokenizer"])

    def stage(kind: Literal["pretrain", "sft"]) -> Path | None:
        left = None if minutes is None else minutes - (time.monotonic() - began_s) / 60
        if left is not None and left <= 0:
            note("the time is up; the same command goes on")
            return None
        return _train(paths[kind], kind, dry_run=False, minutes=left)

    sft = read_recipe(paths["sft"], TrainRecipe)
    assert sft.data.tokenizer is not None, "the recipe names one"
    folder = Path(sft.run.output) / "data"
    with prepared_meanwhile(sft.data, "sft", tokenizer_folder=Path(sft.data.tokenizer), folder=folder) as wait:
        if stage("pretrain") is None:
            return
        wait()
    checkpoint = stage("sft")
    if checkpoint is not None:
        note(f"the model is in {export_model(checkpoint, Path('runs/builtin/model'))}")


def _train(path: Path, kind: Literal["pretrain", "sft"], *, dry_run: bool, minutes: float | None) -> Path | None:
    """Run a recipe; return the last checkpoint if all steps are done. Exits with 130 if the run was interrupted."""
    from lfm.train.recipe import TrainRecipe, read_recipe

    try:
        recipe = read_recipe(path, TrainRecipe)
    except UsageError as error:
        if _is_first_process():
            raise
        raise typer.Exit(error.exit_code) from error  # the first process has the same to say
    if minutes is not None and minutes <= 0:
        raise UsageError(f"--minutes {minutes:g} is out of range. Allowed: above 0.")
    if dry_run:
        _describe(recipe)
        return None
    from lfm.train.session import train as train_model
    from lfm.train.world import PeerError

    with _interrupts() as was_interrupted, _phases() as phases:
        try:
            outcome = train_model(
                recipe,
                kind,
                minutes=recipe.run.minutes if minutes is None else minutes,
                should_stop=was_interrupted,
                on_progress=phases,
            )
        except PeerError as error:
            raise typer.Exit(error.exit_code) from error  # the process that failed has said why
        state = "finished" if outcome.is_finished else "stopped; the same command goes on"
        loss = "" if outcome.loss is None else f", loss {outcome.loss:.4f}"
        if _is_first_process():
            phases.finish(f"{state} after {outcome.num_steps} steps{loss}: {outcome.checkpoint}")
    if was_interrupted() and not outcome.is_finished:
        raise typer.Exit(EXIT_INTERRUPTED)
    return outcome.checkpoint if outcome.is_finished else None


def _is_first_process() -> bool:
    return (os.environ.get("RANK") or "0") == "0"


def _refuse_processes(command: str) -> None:
    if (size := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise UsageError(f"lfm train {command} is one process, and this is one of {size}. Start it without torchrun.")


@contextmanager
def _phases() -> Iterator[PhaseLine]:
    """A display of progress that leaves the terminal tidy after a failure."""
    phases = PhaseLine()
    try:
        yield phases
    except BaseException:
        phases.close()
        raise


def _describe(recipe: "TrainRecipe") -> None:
    from lfm.train.dataset import MANIFEST, Dataset
    from lfm.train.estimate import describe, describe_data, describe_teacher
    from lfm.train.session import choose_device, find_origin

    device, dtype = choose_device(recipe)
    for line in describe(find_origin(recipe).config, recipe, device, dtype):
        note(line)
    if recipe.distill is not None:
        note(describe_teacher(recipe.distill, dtype))
    folder = Path(recipe.run.output) / "data"
    if (folder / MANIFEST).exists():
        note(describe_data(Dataset(folder), recipe))
    else:
        note("data: not prepared yet; the run does that first")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Let the first SIGINT or SIGTERM only ask for the end; the second one ends the process as usual."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])
        os.write(2, b"\nstopping after this step, with a checkpoint; once more to stop at once\n")  # print may not nest

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
