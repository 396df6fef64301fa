"""Schemas of functions, and calls that are bound to them."""

import dataclasses
import datetime
import enum
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional

import jsonschema
import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from lfm.agent.signature import ArgumentError, read_signature
from lfm.errors import UsageError


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


@dataclasses.dataclass
class Place:
    name: str
    height_m: float = 0.0


class Stop(TypedDict):
    place: Place
    nights: int


class Node(BaseModel):
    label: str
    children: list["Node"] = []


def everything(
    city: str,
    days: list[int],
    unit: Unit,
    mode: Literal["now", 7],
    stops: dict[str, Stop],
    tree: Node,
    limit: Annotated[int, Field(ge=1, le=9), "How many."] = 3,
    since: datetime.date | None = None,
    note: Optional[str] = None,  # noqa: UP045 - people write it
    *,
    json: bool = False,
    _extra: Any = object(),  # noqa: B008 - a default that JSON cannot show
) -> tuple[Any, ...]:
    """Do it.

    Args:
        city: Where.
    """
    return (city, days, unit, mode, stops, tree, limit, since, note, json)


ARGUMENTS = {
    "city": "Bern",
    "days": [1, 2],
    "unit": "celsius",
    "mode": 7,
    "stops": {"a": {"place": {"name": "Thun", "height_m": 560}, "nights": 2}},
    "tree": {"label": "x", "children": [{"label": "y"}]},
    "since": "2026-01-31",
}


def test_every_kind_of_annotation_has_a_schema() -> None:
    signature = read_signature(everything)
    schema = signature.parameters
    assert signature.description == "Do it."
    assert schema["required"] == ["city", "days", "unit", "mode", "stops", "tree"]
    assert schema["additionalProperties"] is False
    properties: Any = schema["properties"]
    assert list(properties) == [*schema["required"], "limit", "since", "note", "json", "_extra"]
    assert properties["city"] == {"type": "string", "description": "Where."}
    assert properties["limit"] == {
        "type": "integer", "minimum": 1, "maximum": 9, "default": 3, "description": "How many."
    }  # fmt: skip
    assert properties["note"] == {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    assert properties["mode"] == {"enum": ["now", 7]}
    assert properties["_extra"] == {}
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(ARGUMENTS, schema)
    assert '"title"' not in json.dumps(schema)


def test_arguments_arrive_as_the_annotated_types() -> None:
    bound = read_signature(everything).bind(ARGUMENTS)
    assert "limit" not in bound
    assert everything(**bound)[:9] == (  # type: ignore[arg-type]
        "Bern",
        [1, 2],
        Unit.C,
        7,
        {"a": {"place": Place("Thun", 560.0), "nights": 2}},
        Node(label="x", children=[Node(label="y")]),
        3,
        datetime.date(2026, 1, 31),
        None,
    )


def test_an_argument_called_title_keeps_its_schema() -> None:
    def make(title: str, items: list[str], properties: dict[str, int]) -> None: ...

    properties: Any = read_signature(make).parameters["properties"]
    assert list(properties) == ["title", "items", "properties"]
    assert properties["title"] == {"type": "string"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"city": 5}, "city: "),
        ({"days": ["x"]}, "days.0: "),
        ({"unit": "kelvin"}, "unit: "),
        ({"limit": 10}, "limit: "),
        ({"tree": {"label": "x", "children": [{}]}}, "tree.children.0.label: Field required"),
        ({"secret": "hunter2"}, "secret: Extra inputs are not permitted"),
    ],
    ids=["type", "item", "enum", "bound", "nested", "unknown"],
)
def test_wrong_arguments_are_named_without_their_values(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        read_signature(everything).bind({**ARGUMENTS, **change})
    assert str(refused.value).startswith(told)
    assert "hunter2" not in str(refused.value)
    assert "http" not in str(refused.value)


def test_many_wrong_arguments_are_counted() -> None:
    def take(days: list[int]) -> None: ...

    with pytest.raises(ArgumentError, match="and 95 more"):
        read_signature(take).bind({"days": ["x"] * 100})


def takes_any_keywords(**options: int) -> None: ...
def takes_any_number(*numbers: int) -> None: ...
def takes_by_place(city: str, /) -> None: ...
def takes_a_function(city: Callable[[], int]) -> None: ...
def takes_an_object(city: json.JSONEncoder) -> None: ...


@pytest.mark.parametrize(
    "function",
    [takes_any_keywords, takes_any_number, takes_by_place, takes_a_function, takes_an_object],
)
def test_what_json_cannot_hold_is_refused_by_name(function: Callable[..., None]) -> None:
    with pytest.raises(UsageError, match=function.__name__):
        read_signature(function)


def test_an_annotation_that_names_nothing_is_refused() -> None:
    def take(city: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(UsageError, match="Nowhere"):
        read_signature(take)
