"""Fields that clients know and this server does not honour: refused by name, or accepted with a warning.

Silence would be a lie: a client that asks for JSON and gets prose cannot tell why. Each rule says which values ask for
nothing; those pass, because clients send them by default. Fields in neither table are tolerated.
"""

from collections.abc import Callable, Mapping

from lfm.errors import RequestError

AsksForNothing = Callable[[object], bool]


def _none_of(*values: object) -> AsksForNothing:
    return lambda given: given is None or any(type(given) is type(value) and given == value for value in values)


def _is_plain_text_format(given: object) -> bool:
    return given is None or (isinstance(given, dict) and given.get("type") == "text")


REFUSED: Mapping[str, AsksForNothing] = {
    "tools": _none_of([]),
    "tool_choice": _none_of("none", "auto"),
    "functions": _none_of([]),
    "function_call": _none_of("none", "auto"),
    "response_format": _is_plain_text_format,
    "web_search_options": _none_of(),
    "documents": _none_of([]),
    "modalities": _none_of(["text"], []),
    "audio": _none_of(),
    "prediction": _none_of(),
    "moderation": _none_of(),
    "safety_model": _none_of(""),
    "compliance": _none_of(),
    "suffix": _none_of(""),
    "best_of": _none_of(1),
    "use_beam_search": _none_of(False),
    "continue_final_message": _none_of(False),
    "add_generation_prompt": _none_of(True),
    "structured_outputs": _none_of({}),
    "guided_json": _none_of(),
    "guided_regex": _none_of(),
    "guided_choice": _none_of(),
    "guided_grammar": _none_of(),
}

WITHOUT_EFFECT: Mapping[str, tuple[AsksForNothing, str]] = {
    "reasoning_effort": (_none_of("none"), "this model has no reasoning mode"),
    "reasoning": (_none_of({}, {"enabled": False}), "this model has no reasoning mode"),
    "chat_template_kwargs": (_none_of({}), "prompts are not built from a template"),
    "verbosity": (_none_of("medium"), "this model has no such setting"),
    "service_tier": (_none_of("auto", "default"), "every request is served alike"),
    "store": (_none_of(False), "this server stores no responses"),
}


def refuse_unsupported(body: Mapping[str, object]) -> None:
    """Raises RequestError for the first field that asks for something which this server cannot do."""
    for field, asks_for_nothing in REFUSED.items():
        if field not in body or asks_for_nothing(body[field]):
            continue
        if field == "best_of" and body["best_of"] == body.get("n"):
            continue  # the best n of n are all of them
        raise RequestError(
            f"{field} is not supported by this server. Leave it out.", param=field, code="unsupported_parameter"
        )


def warnings_for(body: Mapping[str, object]) -> list[dict[str, str]]:
    """Together's `warnings` entries for the accepted fields that change nothing."""
    return [
        {"message": f"{field} has no effect: {reason}."}
        for field, (asks_for_nothing, reason) in WITHOUT_EFFECT.items()
        if field in body and not asks_for_nothing(body[field])
    ]
