"""Held-out results of a model on the synthetic conversations, by language.

Every assistant turn is generated from the true history before it. The model sees exactly the ids that serving builds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lfm.chat.messages import Message
from lfm.chat.tokenizer import Tokenizer
from lfm.train.examples import sft_row
from lfm.train.scoring import is_right, read_answer
from lfm.train.synthetic.generate import Example, Kind, examples
from lfm.train.synthetic.scenarios import Expected, ExpectedKind

Generate = Callable[[list[list[int]]], Sequence[Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Metric:
    """What is reported of some kinds of conversations: those whose turns are all right, or all turns of one kind."""

    kinds: tuple[Kind, ...]
    turns: ExpectedKind | None = None


METRICS: dict[str, Metric] = {
    "tool call": Metric(("single", "arithmetic"), "calls"),
    "parallel calls": Metric(("parallel",), "calls"),
    "no fitting tool": Metric(("no_tool",)),
    "missing argument": Metric(("missing",)),
    "loop": Metric(("loop",)),
    "JSON extraction": Metric(("extraction",)),
    "grounded answer": Metric(("grounded",)),
    "search, then answer": Metric(("search",)),
    "about itself": Metric(("small_talk",)),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn to be generated."""

    prompt_ids: list[int]
    expected: Expected
    gold: Message


@dataclass(frozen=True, slots=True)
class Score:
    """How many conversations of a metric and language were right in all the turns that it looks at."""

    metric: str
    language: str
    num_right: int
    num_conversations: int

    @property
    def share(self) -> float:
        return self.num_right / self.num_conversations


def turns_of(tokenizer: Tokenizer, example: Example) -> list[Turn]:
    """The assistant's turns of a conversation, each with the ids before it."""
    row = sft_row(tokenizer, example.conversation)
    begins = [i for i in range(1, len(row.ids)) if row.is_target[i] and not row.is_target[i - 1]]
    gold = [message for message in example.conversation.messages if message.role == "assistant"]
    return [
        Turn(row.ids[:begin].tolist(), expected, message)
        for begin, expected, message in zip(begins, example.expected, gold, strict=True)
    ]


def evaluate(
    tokenizer: Tokenizer,
    generate: Generate,
    *,
    languages: Sequence[str],
    num_per_kind: int,
    seed: int = 0,
    on_progress: Callable[[str], None],
) -> Iterator[Score]:
    """Score every metric in every language on conversations that share nothing with training.

    `generate` continues prompts greedily and returns the ids of each, the end token included or not.
    """
    for language in languages:
        for name, metric in METRICS.items():
            on_progress(f"evaluating {language}: {name}")
            made = [
                example
                for kind in metric.kinds
                for example in examples(kind, language, split="test", count=num_per_kind, seed=seed)
            ]
            yield _score(tokenizer, generate, made, name, language=language)


def _score(tokenizer: Tokenizer, generate: Generate, made: Sequence[Example], name: str, *, language: str) -> Score:
    wanted = METRICS[name].turns
    turns = [
        [turn for turn in turns_of(tokenizer, example) if wanted in (None, turn.expected.kind)] for example in made
    ]
    answers = iter(generate([turn.prompt_ids for group in turns for turn in group]))
    num_right = 0
    for group in turns:
        right = [
            is_right(turn.expected, turn.gold, read_answer(tokenizer, next(answers)), language=language)
            for turn in group
        ]
        num_right += all(right)
    return Score(name, language, num_right, len(made))


def as_table(scores: Sequence[Score]) -> str:
    """Percentages by metric (rows) and language (columns), as a Markdown table."""
    languages = list(dict.fromkeys(score.language for score in scores))
    metrics = list(dict.fromkeys(score.metric for score in scores))
    cells = {(score.metric, score.language): f"{100 * score.share:.0f}" for score in scores}
    lines = [["%", *languages], ["---"] + ["--:"] * len(languages)]
    lines += [[metric, *(cells.get((metric, language), "") for language in languages)] for metric in metrics]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
