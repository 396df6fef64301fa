"""From a function's signature and docstring to a JSON Schema of its arguments, and back from JSON to a call.

Any annotation that pydantic can describe works: numbers, texts, Literal, enums, lists, dicts, unions, dates,
dataclasses, TypedDicts, models, `Annotated[int, Field(ge=1)]`. A text in Annotated is a description.
"""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from lfm.agent.docstring import parse_docstring
from lfm.errors import UsageError

_MAX_SHOWN_ERRORS = 5
_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


class ArgumentError(Exception):
    """Arguments of a call that the function cannot take. The message is for the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a model must know of a function, and how to read the arguments that it sends."""

    name: str
    description: str
    parameters: dict[str, object]
    _model: type[BaseModel]
    _names: tuple[str, ...]

    def bind(self, arguments: Mapping[str, object]) -> dict[str, object]:
        """The keyword arguments of one call, as the annotated types. Raises ArgumentError."""
        try:
            bound = self._model.model_validate(dict(arguments))
        except ValidationError as error:
            raise ArgumentError(_describe(error)) from error
        given = bound.model_fields_set  # the others get the function's own defaults
        return {name: getattr(bound, f"a{index}") for index, name in enumerate(self._names) if f"a{index}" in given}


def read_signature(function: Callable[..., object]) -> Signature:
    """Describe a function. Raises UsageError, naming the argument, for what no JSON can hold."""
    name = str(getattr(function, "__name__", type(function).__name__))
    docstring = parse_docstring(inspect.getdoc(function))
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise UsageError(f"The tool {name} has an annotation that cannot be read ({error}). Mend it.") from error
    fields: dict[str, typing.Any] = {}
    for index, parameter in enumerate(parameters.values()):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(
                f"The tool {name} takes {parameter}, but a model gives arguments by name. Name every argument."
            )
        # The fields have names of ours: arguments may be called `json` or `_x`, which pydantic keeps for itself.
        described = docstring.arguments.get(parameter.name)
        fields[f"a{index}"] = (hints.get(parameter.name, typing.Any), _field(parameter, hints, described))
    try:
        model: type[BaseModel] = create_model(name, __config__=_CONFIG, **fields)
        schema = model.model_json_schema()
    except (PydanticUserError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"An argument of the tool {name} has a type that JSON cannot hold: {reason}") from error
    plain = _without_titles(schema)
    plain.pop("description", None)
    return Signature(name=name, description=docstring.summary, parameters=plain, _model=model, _names=tuple(parameters))


def _field(parameter: inspect.Parameter, hints: Mapping[str, object], described: str | None) -> FieldInfo:
    notes = [note for note in getattr(hints.get(parameter.name), "__metadata__", ()) if isinstance(note, str)]
    description = described or " ".join(notes) or None
    options: dict[str, typing.Any] = {"alias": parameter.name}
    if description:
        options["description"] = description
    if parameter.default is not parameter.empty and _is_json(parameter.default):
        options["default"] = parameter.default
    elif parameter.default is not parameter.empty:  # not required, and nothing that a schema could show
        options["default_factory"] = lambda: None
    field: FieldInfo = Field(**options)
    return field


def _is_json(value: object) -> bool:
    try:
        TypeAdapter(object).dump_json(value)
    except (ValueError, RecursionError):  # pydantic's error of serialisation is a ValueError
        return False
    return True


def _without_titles(schema: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """The schema without the titles that pydantic makes of names: they cost tokens and say nothing."""
    plain: dict[str, typing.Any] = {}
    for key, value in schema.items():
        if key == "title":
            continue
        if key in ("properties", "$defs"):
            plain[key] = {name: _without_titles(child) for name, child in value.items()}
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            plain[key] = [_without_titles(child) for child in value]
        elif key in ("items", "additionalProperties", "propertyNames") and isinstance(value, dict):
            plain[key] = _without_titles(value)
        else:
            plain[key] = value
    return plain


def _describe(error: ValidationError) -> str:
    """What is wrong with which argument, without the values: they may be long or secret."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in found[:_MAX_SHOWN_ERRORS]]
    more = [f"and {len(found) - _MAX_SHOWN_ERRORS} more"] if len(found) > _MAX_SHOWN_ERRORS else []
    return "; ".join([*shown, *more])
