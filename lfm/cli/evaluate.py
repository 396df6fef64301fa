"""`lfm eval builtin`: held-out results on the synthetic conversations, by language, in this process."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lfm.cli import options
from lfm.cli.options import ENGINE
from lfm.config import EngineConfig
from lfm.errors import UsageError

if TYPE_CHECKING:
    from lfm.llm import LLM

_MAX_ANSWER_TOKENS = 320  # three calls with all their arguments need fewer

evaluate = typer.Typer(help="Measure how good a model is.", no_args_is_help=True)


@evaluate.command("builtin")
def builtin(
    model: options.ModelArgument = ENGINE.model,
    count: Annotated[int, options.flag("count", "Conversations of each kind and language.")] = 50,
    languages: Annotated[str, options.flag("languages", "Which ones, with commas: en,de,... Unset: all nine.")] = "",
    output: Annotated[Path | None, options.flag("output", "File for the results as JSON. It is overwritten.")] = None,
    seed: Annotated[int, options.flag("seed", "Which conversations; 0 is what the README reports.")] = 0,
    device: options.DeviceFlag = ENGINE.device,
    dtype: options.DtypeFlag = "auto",
    debug: options.DebugFlag = False,
) -> None:
    """Score tool calls, extraction and grounded answers on conversations that share nothing with training.

    Greedy, unconstrained. Prints a table of percentages by language.
    """
    from lfm.cli.loading import load_llm
    from lfm.cli.terminal import PhaseLine
    from lfm.train.evaluation import as_table
    from lfm.train.evaluation import evaluate as evaluate_model
    from lfm.train.synthetic.tables import LANGUAGES

    if not 1 <= count <= 10_000:
        raise UsageError(f"--count {count} is out of range. Allowed: 1 to 10,000.")
    chosen = tuple(languages.split(",")) if languages else LANGUAGES
    if unknown := [language for language in chosen if language not in LANGUAGES]:
        raise UsageError(f"--languages names {unknown[0]!r}. Allowed: {', '.join(LANGUAGES)}.")
    with load_llm(EngineConfig(model=model, device=device, dtype=dtype)) as llm:
        phases = PhaseLine()
        scores = list(
            evaluate_model(
                llm.tokenizer,
                lambda prompts: _answers(llm, prompts),
                languages=chosen,
                num_per_kind=count,
                seed=seed,
                on_progress=phases,
            )
        )
        phases.finish(f"{sum(score.num_conversations for score in scores)} conversations scored")
    if output is not None:
        results = {"model": llm.source.name, "count": count, "seed": seed, "scores": [asdict(s) for s in scores]}
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    typer.echo(as_table(scores))


def _answers(llm: "LLM", prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Continue the prompts greedily, all of them together; a prompt that does not fit gets an empty answer."""
    from lfm.protocol import SamplingParams

    sampling = SamplingParams(
        max_tokens=_MAX_ANSWER_TOKENS, temperature=0.0, stop_token_ids=llm.tokenizer.stop_token_ids
    )
    limit = llm.engine.info.max_model_len - _MAX_ANSWER_TOKENS
    fitting = [prompt for prompt in prompts if len(prompt) <= limit]
    outputs = iter(llm.generate(fitting, sampling=sampling))
    return [next(outputs).token_ids if len(prompt) <= limit else () for prompt in prompts]
