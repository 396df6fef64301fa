"""Where lasting data lives."""

from pathlib import Path

import pytest

from lfm.service.data_folder import data_folder


def test_xdg_data_home_wins() -> None:
    assert data_folder({"XDG_DATA_HOME": "/srv/data"}) == Path("/srv/data/lfm")


@pytest.mark.parametrize("environ", [{}, {"XDG_DATA_HOME": ""}, {"XDG_DATA_HOME": "relative/folder"}], ids=str)
def test_otherwise_it_is_below_the_home(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert data_folder(environ) == Path("/home/ann/.local/share/lfm")
