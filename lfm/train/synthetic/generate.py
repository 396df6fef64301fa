"""Conversations by the thousand, from a seed. The same seed, shard and split always give the same ones."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lfm.chat.messages import Message
from lfm.errors import UsageError
from lfm.train.examples import JSON_CALLS, CallForm, Conversation
from lfm.train.recipe import SyntheticSettings
from lfm.train.synthetic import scenarios
from lfm.train.synthetic.documents import extraction, grounded
from lfm.train.synthetic.draw import Draw
from lfm.train.synthetic.scenarios import Episode, Expected
from lfm.train.synthetic.tables import LANGUAGES, Split
from lfm.train.synthetic.tools import Tool, any_intent, make_tool, wrapped

Kind = Literal["single", "parallel", "no_tool", "missing", "loop", "arithmetic", "extraction", "grounded", "small_talk"]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation with what each of its assistant turns is judged by."""

    kind: Kind
    language: str
    conversation: Conversation
    expected: tuple[Expected, ...]


def small_talk(draw: Draw) -> Episode:
    """Something about the model itself, in words; no tool has to do with it."""
    topic = draw.table["self"][draw.one(list(draw.table["self"]))]
    return Episode(
        (scenarios.user(draw.phrase(topic["asks"])), scenarios.says(draw.phrase(topic["answers"]))),
        (Expected("text"),),
    )


_EPISODES: Mapping[Kind, Callable[[Draw], Episode]] = {
    "single": scenarios.single,
    "parallel": scenarios.parallel,
    "no_tool": scenarios.no_tool,
    "missing": scenarios.missing,
    "loop": scenarios.loop,
    "arithmetic": scenarios.arithmetic,
    "extraction": extraction,
    "grounded": grounded,
    "small_talk": small_talk,
}
_BEFORE = (scenarios.single, scenarios.parallel, scenarios.arithmetic, scenarios.missing, scenarios.loop, small_talk)
KINDS: tuple[Kind, ...] = tuple(_EPISODES)
_SHARES: Mapping[Kind, float] = {
    "single": 0.20, "parallel": 0.14, "no_tool": 0.08, "missing": 0.11, "loop": 0.11, "arithmetic": 0.06,
    "extraction": 0.13, "grounded": 0.13, "small_talk": 0.04,
}  # fmt: skip
_WITHOUT_TOOLS = ("extraction", "grounded")
_MAX_OTHER_TOOLS = 6
# How likely one more episode is, and how many there are at most. Most tokens of a conversation are its list of tools,
# so training gets more out of long ones.
_MORE: Mapping[Split, tuple[float, int]] = {"train": (0.55, 5), "test": (0.25, 3)}


def conversations(settings: SyntheticSettings, *, shard: int) -> Iterator[Conversation]:
    """The training conversations of one shard. Raises UsageError for a language that does not exist."""
    languages = settings.languages or LANGUAGES
    if unknown := [language for language in languages if language not in LANGUAGES]:
        raise UsageError(f"data.synthetic.languages names {unknown[0]!r}. Allowed: {', '.join(LANGUAGES)}.")
    count = settings.conversations // settings.shards + (shard < settings.conversations % settings.shards)
    generator = random.Random(f"{settings.seed}/train/{shard}")
    for _ in range(count):
        language = languages[int(generator.random() * len(languages))]
        (kind,) = generator.choices(KINDS, weights=[_SHARES[kind] for kind in KINDS])
        yield make_example(Draw(generator, language, "train"), kind).conversation


def examples(kind: Kind, language: str, *, split: Split, count: int, seed: int = 0) -> list[Example]:
    """Examples of one kind and language; those of split "test" share no tool name, entity or phrase with training."""
    generator = random.Random(f"{seed}/{split}/{kind}/{language}")
    draw = Draw(generator, language, split)
    return [make_example(draw, kind) for _ in range(count)]


def make_example(draw: Draw, kind: Kind) -> Example:
    """One conversation. The last episode is of the kind that is asked for; shorter ones may come before it."""
    episodes = [_EPISODES[kind](draw)]
    chance, most = _MORE[draw.split]
    if kind == "extraction" and draw.split == "train":
        while draw.chance(chance) and len(episodes) < most:
            episodes.append(extraction(draw))
    if kind not in _WITHOUT_TOOLS:
        while draw.chance(chance) and len(episodes) < most:
            episodes.insert(0, draw.one(_BEFORE)(draw))
        if not _fit_together(episodes):
            return make_example(draw, kind)
    tools = [] if kind in _WITHOUT_TOOLS else _tools_for(draw, episodes)
    form: CallForm = "json" if tools and draw.chance(0.15) else "python"
    system = _system(draw, kind, form)
    messages = tuple(message for episode in episodes for message in episode.messages)
    conversation = Conversation(
        messages=(*([Message(role="system", content=system)] if system else []), *messages),
        tools=wrapped(draw, tools),
        call_form=form,
    )
    return Example(kind, draw.language, conversation, tuple(e for episode in episodes for e in episode.expected))


def _fit_together(episodes: Sequence[Episode]) -> bool:
    """Whether the episodes can share a list of tools: one for each intent, no name twice, none that is forbidden."""
    tools = [tool for episode in episodes for tool in episode.tools]
    keys = [tool.intent.key for tool in tools]
    forbidden = frozenset().union(*(episode.forbidden for episode in episodes))
    is_distinct = len({tool.name for tool in tools}) == len(tools) == len(set(keys))
    return is_distinct and not forbidden & set(keys)


def _tools_for(draw: Draw, episodes: Sequence[Episode]) -> list[Tool]:
    """The tools that the episodes need, among others that they do not."""
    tools = [tool for episode in episodes for tool in episode.tools]
    taken = {tool.intent.key for tool in tools}.union(*(episode.forbidden for episode in episodes))
    names = {tool.name for tool in tools}
    wanted = draw.integer(len(tools), len(tools) + _MAX_OTHER_TOOLS) or 1
    while len(tools) < wanted:
        tool = make_tool(draw, any_intent(draw))
        if tool.intent.key not in taken and tool.name not in names:
            tools.append(tool)
            taken.add(tool.intent.key)
            names.add(tool.name)
    return tools


def _system(draw: Draw, kind: Kind, form: CallForm) -> str:
    if kind == "grounded":
        return ""  # it has one of its own
    parts = [draw.phrase(draw.table["systems"])] if draw.chance(0.4) else []
    if form == "json":
        parts.append(JSON_CALLS)
    return " ".join(parts)
