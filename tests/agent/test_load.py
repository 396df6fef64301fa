"""Files of tools, good and bad."""

from pathlib import Path

import pytest

from lfm.agent import load_tools
from lfm.errors import UsageError

FILE = '''
from __future__ import annotations
import dataclasses, json
from json import dumps
from beside_it import helper

@dataclasses.dataclass
class Place:
    name: str

def weather(place: Place) -> str:
    """Say how warm it is."""
    return helper(place.name)

async def wait(seconds: float) -> None: ...

def _hidden() -> None: ...

constant = 7
'''


def write(folder: Path, text: str) -> Path:
    path = folder / "my_tools.py"
    path.write_text(text)
    return path


def test_public_functions_of_the_file_are_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", __import__("sys").path.copy())
    (tmp_path / "beside_it.py").write_text("def helper(name): return name.upper()\n")
    tools = load_tools(write(tmp_path, FILE))
    assert [tool.name for tool in tools] == ["weather", "wait"]
    assert tools[0].description == "Say how warm it is."


def test_all_names_the_tools_where_it_is_there(tmp_path: Path) -> None:
    text = (
        "from lfm.agent import tool\n__all__ = ['_b', 'renamed']\ndef a(): ...\ndef _b(): ...\n"
        "renamed = tool(a, name='other', description='Does nothing.')\n"
    )
    assert [tool.name for tool in load_tools(write(tmp_path, text))] == ["_b", "other"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def a(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("x = 1", "has no functions"),
        ("__all__ = ['nothing']", "nothing"),
        ("def a(*numbers): ...", "by name"),
        ("def a(x: 'Nowhere'): ...", "Nowhere"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        load_tools(write(tmp_path, text))


def test_what_is_no_python_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file"):
        load_tools(tmp_path / "missing.py")
    other = tmp_path / "tools.txt"
    other.write_text("")
    with pytest.raises(UsageError, match=r"end in \.py"):
        load_tools(other)
