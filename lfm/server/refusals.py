"""Fields that clients know and this server does not honour: refused by name, or accepted with a warning.

Silence would be a lie: a client that asks for JSON and gets prose cannot tell why. Each rule says which values ask for
nothing; those pass, because clients send them by default. Fields in neither table are tolerated.

A rule's path may lead into an object (`text.format`) or into every entry of an array (`messages[].audio`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lfm.errors import RequestError

AsksForNothing = Callable[[object], bool]
Refused = Mapping[str, AsksForNothing]
WithoutEffect = Mapping[str, tuple[AsksForNothing, str]]


@dataclass(frozen=True, slots=True)
class FieldRules:
    """The rules of one API family: which values of a field ask for nothing, and why the others change nothing."""

    refused: Refused
    without_effect: WithoutEffect

    def refuse(self, body: Mapping[str, object]) -> None:
        """Raises RequestError for the first field that asks for something which this server cannot do."""
        for path, asks_for_nothing in self.refused.items():
            for where, value in _values_at(body, path):
                if asks_for_nothing(value) or (path == "best_of" and value == body.get("n")):
                    continue  # the best n of n are all of them
                raise RequestError(
                    f"{where} is not supported by this server. Leave it out.",
                    param=where,
                    code="unsupported_parameter",
                )

    def warnings(self, body: Mapping[str, object]) -> list[str]:
        """One sentence for each accepted field that changes nothing."""
        return [
            f"{path} has no effect: {reason}."
            for path, (asks_for_nothing, reason) in self.without_effect.items()
            if any(not asks_for_nothing(value) for _, value in _values_at(body, path))
        ]


def as_warnings(sentences: list[str]) -> list[dict[str, str]]:
    """Together's `warnings` entries."""
    return [{"message": sentence} for sentence in sentences]


def none_of(*values: object) -> AsksForNothing:
    """A field asks for nothing if it is null or one of `values`."""
    return lambda given: given is None or any(type(given) is type(value) and given == value for value in values)


def _values_at(body: Mapping[str, object], path: str, where: str = "") -> Iterator[tuple[str, object]]:
    """Every value that a rule's path leads to, with its own path. Other shapes are the schema's to refuse."""
    name, _, rest = path.partition(".")
    key = name.removesuffix("[]")
    if key not in body:
        return
    value = body[key]
    if not rest:
        yield where + key, value
    elif name != key and isinstance(value, list):
        for index, entry in enumerate(value):
            if isinstance(entry, dict):
                yield from _values_at(entry, rest, f"{where}{key}[{index}].")
    elif isinstance(value, dict):
        yield from _values_at(value, rest, f"{where}{key}.")


NO_REASONING = "this model has no reasoning mode"
NO_LEVEL = "this model has no such setting"
ONE_TIER = "every request is served alike"
CACHE_IS_AUTOMATIC = "every prefix is cached, for as long as there is room"

CHAT_RULES = FieldRules(
    refused={
        "functions": none_of([]),
        "function_call": none_of("none", "auto"),
        "modalities": none_of(["text"], []),
        "audio": none_of(),
        "moderation": none_of(),
        "safety_model": none_of(""),
        "compliance": none_of(),
        "suffix": none_of(""),
        "best_of": none_of(1),
        "use_beam_search": none_of(False),
        "continue_final_message": none_of(False),
        "add_generation_prompt": none_of(True),
        "structured_outputs": none_of({}),
        "guided_json": none_of(),
        "guided_regex": none_of(),
        "guided_choice": none_of(),
        "guided_grammar": none_of(),
        "chat_template": none_of(),
        "prompt_logprobs": none_of(0),
        "stop_token_ids": none_of([]),
        "bad_words": none_of([]),
        "allowed_token_ids": none_of(),
        "include_stop_str_in_output": none_of(False),
        "truncate_prompt_tokens": none_of(),
        "messages[].function_call": none_of(),
        "messages[].audio": none_of(),
        "plugins": none_of([]),  # OpenRouter's way to ask for a search, among others
        "search_domain_filter": none_of([]),  # Perplexity's
        "search_recency_filter": none_of(),
    },
    without_effect={
        "reasoning_effort": (none_of("none"), NO_REASONING),
        "reasoning": (none_of({}, {"enabled": False}), NO_REASONING),
        "messages[].reasoning": (none_of("", []), NO_REASONING),
        "messages[].reasoning_content": (none_of("", []), NO_REASONING),
        "messages[].name": (none_of(""), "the model's chat layout has no place for names"),
        "chat_template_kwargs": (none_of({}), "prompts are not built from a template"),
        "verbosity": (none_of("medium"), NO_LEVEL),
        "prediction": (none_of(), "answers are not predicted"),
        "service_tier": (none_of("auto", "default"), ONE_TIER),
        "store": (none_of(False), "this server stores responses of /v1/responses only"),
        "prompt_cache_retention": (none_of("in_memory"), CACHE_IS_AUTOMATIC),
        "prompt_cache_options": (none_of({}, {"mode": "implicit"}), CACHE_IS_AUTOMATIC),
    },
)

# What needs messages. Answer formats are honoured here, too.
COMPLETION_RULES = FieldRules(
    refused={
        "tools": none_of([]),
        "tool_choice": none_of("none", "auto"),
        "tool_format": none_of(),
        "documents": none_of([]),
        "web_search_options": none_of(),
        **CHAT_RULES.refused,
    },
    without_effect=CHAT_RULES.without_effect,
)

RESPONSES_RULES = FieldRules(
    refused={
        "background": none_of(False),
        "conversation": none_of(),
        "prompt": none_of(),
        "moderation": none_of(),
    },
    without_effect={
        "reasoning.effort": (none_of("none"), NO_REASONING),
        "reasoning.summary": (none_of(), NO_REASONING),
        "text.verbosity": (none_of("medium"), NO_LEVEL),
        "truncation": (none_of("disabled"), "an input that does not fit is refused, never cut"),
        "context_management": (none_of([]), "nothing is ever cut from a conversation"),
        "service_tier": (none_of("auto", "default"), ONE_TIER),
        "prompt_cache_retention": (none_of("in_memory"), CACHE_IS_AUTOMATIC),
        "prompt_cache_options": (none_of({}, {"mode": "implicit"}), CACHE_IS_AUTOMATIC),
    },
)

MESSAGES_RULES = FieldRules(
    refused={
        "mcp_servers": none_of([]),
        "container": none_of(),
    },
    without_effect={
        "thinking": (none_of({"type": "disabled"}), NO_REASONING),
        "output_config.effort": (none_of(), NO_LEVEL),
        "context_management": (none_of({}, {"edits": []}), "nothing is ever cut from a conversation"),
        "diagnostics": (none_of({}), "this server compares no requests"),
        "inference_geo": (none_of(), "everything runs on this machine"),
        "service_tier": (none_of("auto", "standard_only"), ONE_TIER),
        "speed": (none_of("standard"), ONE_TIER),
    },
)

# Perplexity's filters that no provider here is asked to apply.
SEARCH_RULES = FieldRules(
    refused={
        "search_recency_filter": none_of(),
        "search_after_date_filter": none_of(),
        "search_before_date_filter": none_of(),
        "last_updated_after_filter": none_of(),
        "last_updated_before_filter": none_of(),
        "search_language_filter": none_of([]),
        "search_mode": none_of("web"),
    },
    without_effect={},
)
