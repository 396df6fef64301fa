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
from lfm.train.synthetic.documents import extraction
from lfm.train.synthetic.draw import Draw, render, slots_of
from lfm.train.synthetic.passages import fact_question, grounded, searched
from lfm.train.synthetic.scenarios import Episode, Expected
from lfm.train.synthetic.tables import LANGUAGES, Split
from lfm.train.synthetic.tools import Tool, other_tool, wrapped

Kind = Literal[
    "single", "parallel", "no_tool", "missing", "loop", "arithmetic", "extraction", "grounded", "search", "small_talk"
]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation with what each of its assistant turns is judged by."""

    kind: Kind
    language: str
    conversation: Conversation
    expected: tuple[Expected, ...]


# Tools that could be meant by a question about the world, such as "who is ...?".
_FORBIDDEN_TO_TALK = frozenset({"search", "contact", "translate"})


def small_talk(draw: Draw) -> Episode:
    """Something about the model itself or the world, in words; no tool has to do with it."""
    name = draw.one(list(draw.table["self"]))
    topic = draw.table["self"][name]
    text = fact_question(draw) if name == "unknown" and draw.chance(0.4) else _filled(draw, topic["asks"])
    answer = scenarios.says(draw.phrase(topic["answers"]))
    expected = Expected("one_of", tuple(topic["answers"]))
    return Episode((scenarios.user(_typed(draw, text)), answer), (expected,), (), _FORBIDDEN_TO_TALK)


def _filled(draw: Draw, phrases: Sequence[str]) -> str:
    template = draw.phrase(phrases)
    return render(template, {slot: draw.value(slot).text for slot in slots_of(template)})


def _typed(draw: Draw, text: str) -> str:
    """As people type in a hurry: without a capital or the last sign."""
    if draw.chance(0.25):
        text = text[:1].lower() + text[1:]
    return text.rstrip(_LAST_SIGNS) if draw.chance(0.25) else text


_EPISODES: Mapping[Kind, Callable[[Draw], Episode]] = {
    "single": scenarios.single,
    "parallel": scenarios.parallel,
    "no_tool": scenarios.no_tool,
    "missing": scenarios.missing,
    "loop": scenarios.loop,
    "arithmetic": scenarios.arithmetic,
    "extraction": extraction,
    "grounded": grounded,
    "search": searched,
    "small_talk": small_talk,
}
_BEFORE = (
    scenarios.single,
    scenarios.parallel,
    scenarios.arithmetic,
    scenarios.missing,
    scenarios.loop,
    searched,
    small_talk,
)
_WITHOUT_ANY_TOOL = (small_talk, small_talk, scenarios.toolless)
KINDS: tuple[Kind, ...] = tuple(_EPISODES)
_SHARES: Mapping[Kind, float] = {
    "single": 0.12, "parallel": 0.13, "no_tool": 0.09, "missing": 0.08, "loop": 0.11, "arithmetic": 0.04,
    "extraction": 0.13, "grounded": 0.12, "search": 0.08, "small_talk": 0.10,
}  # fmt: skip
_WITHOUT_TOOLS = ("extraction", "grounded")
_LANGUAGE_WEIGHTS = {"en": 1.4}  # most is asked of it
_LAST_SIGNS = "!?. \u3002\uff01\uff1f\u061f"
_MAX_OTHER_TOOLS = 6
_BARE = 0.6  # of small talk: no tools at all, as in a plain chat
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
    weights = [_LANGUAGE_WEIGHTS.get(language, 1.0) for language in languages]
    for _ in range(count):
        (language,) = generator.choices(languages, weights=weights)
        (kind,) = generator.choices(KINDS, weights=[_SHARES[kind] for kind in KINDS])
        yield make_example(Draw(generator, language, "train"), kind).conversation


def examples(kind: Kind, language: str, *, split: Split, count: int, seed: int = 0) -> list[Example]:
    """Examples of one kind and language; those of split "test" share no tool name, entity or phrase with training."""
    generator = random.Random(f"{seed}/{split}/{kind}/{language}")
    draw = Draw(generator, language, split)
    return [make_example(draw, kind) for _ in range(count)]


def make_example(draw: Draw, kind: Kind) -> Example:
    """One conversation. The last episode is of the kind that is asked for; shorter ones may come before it."""
    is_bare = kind == "small_talk" and draw.chance(_BARE)
    episodes = [draw.one(_WITHOUT_ANY_TOOL)(draw) if is_bare else _EPISODES[kind](draw)]
    chance, most = _MORE[draw.split]
    if kind == "extraction" and draw.split == "train":
        while draw.chance(chance) and len(episodes) < most:
            episodes.append(extraction(draw))
    if kind not in _WITHOUT_TOOLS:
        while draw.chance(chance) and len(episodes) < most:
            episodes.insert(0, draw.one(_WITHOUT_ANY_TOOL if is_bare else _BEFORE)(draw))
        if not _fit_together(episodes):
            return make_example(draw, kind)
    tools = [] if is_bare or kind in _WITHOUT_TOOLS else _tools_for(draw, episodes)
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
        tool = other_tool(draw)
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
    return draw.one((" ", "\n")).join(parts)
