"""What MODEL may be: folders, presets, hub ids; and what anything else is told."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

import lfm.config
from lfm.config import EngineConfig
from lfm.errors import LfmError, ModelError, UsageError
from lfm.model.checkpoint_files import SINGLE_FILE
from lfm.model.hf_config import to_hf_config
from lfm.model.lfm2 import Lfm2
from lfm.model.presets import PRESETS, fill_random
from lfm.model.source import ModelSource, describe_model, resolve_model
from lfm.model.weights import load_weights, save_weights
from tests.model.fake_hub import REPO, FakeHub, serve

TINY = PRESETS["tiny"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(TINY)))
    return folder


def error_of(model: str, kind: type[LfmError] = UsageError, revision: str | None = None) -> str:
    with pytest.raises(LfmError) as caught:
        resolve_model(model, revision=revision, endpoint="http://127.0.0.1:9")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_served_under_its_name(preset: str) -> None:
    assert resolve_model(f"random:{preset}") == ModelSource(f"random:{preset}", None, preset, PRESETS[preset])


def test_a_folder_is_served_under_its_own_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(folder)) == ModelSource("my-model", folder, None, TINY)
    assert resolve_model(f"{folder}/").name == "my-model"
    monkeypatch.chdir(folder)
    assert resolve_model(".").name == "my-model"
    monkeypatch.chdir(folder.parent)
    assert resolve_model("my-model").name == "my-model"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/my-model").name == "my-model"


def test_a_folder_wins_over_a_hub_id_of_the_same_spelling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert resolve_model(f"{folder.parent.name}/my-model").folder == Path(folder.parent.name) / "my-model"


def test_builtin_is_the_folder_in_the_package_and_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfm.config, "BUILTIN_FOLDER", folder)
    source = resolve_model("builtin")
    assert (source.name, source.folder, source.preset) == ("builtin", folder, None)
    assert EngineConfig().model == "builtin"
    assert "--revision main is of no use with builtin" in error_of("builtin", revision="main")


def test_a_copy_without_builtin_says_so_and_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfm.config, "BUILTIN_FOLDER", tmp_path / "builtin")
    assert f"not in this copy of lfm: {tmp_path / 'builtin'} is missing" in error_of("builtin")
    assert EngineConfig().model == "random:tiny"


@pytest.mark.parametrize("model", ["random:", "random:huge", "random:TINY", "random:tiny "])
def test_an_unknown_preset_lists_the_known_ones(model: str) -> None:
    assert "random:lfm2-24b-a2b, random:lfm2-8b-a1b, random:tiny" in error_of(model)


@pytest.mark.parametrize(
    "model",
    [
        "",
        "lfm2",
        "tiny",
        "/nowhere/model",
        "./model",
        "../model",
        "~/no-such-model",
        "a/b/c",
        "org/",
        "~nobody-here/x",
        "org/na me",
        "org/n\N{LATIN SMALL LETTER A WITH DIAERESIS}me",
        "org/../x",
        "-x/y",
        "org/name\n",
        "x" * 5000,
        "a\0b",
        "https://huggingface.co/org/name",
    ],
)
def test_what_names_nothing_is_told_what_is_allowed(model: str) -> None:
    text = error_of(model)
    assert "a hub id such as LiquidAI/LFM2-24B-A2B" in text
    assert len(text) < 700


def test_a_file_is_told_that_its_folder_is_meant(folder: Path) -> None:
    assert "Give the folder" in error_of(str(folder / "config.json"))


@pytest.mark.parametrize("model", ["random:tiny", "."])
def test_a_revision_of_what_has_none_is_refused(model: str) -> None:
    assert "--revision v2" in error_of(model, revision="v2")


def test_a_folder_without_a_config_is_a_model_error(tmp_path: Path) -> None:
    assert "has no config.json" in error_of(str(tmp_path), ModelError)


def test_a_wrong_config_is_named_with_its_folder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert str(folder) in error_of(str(folder), ModelError)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve(FakeHub()) as hub:
        yield hub
    huggingface_hub.close_session()


def test_a_hub_id_is_described_without_its_weights(hub: FakeHub, tmp_path: Path) -> None:
    files = {"config.json": json.dumps(to_hf_config(TINY)).encode(), "tokenizer.json": b"{}", SINGLE_FILE: b"x" * 1000}
    hub.commit(files, "main")
    for _ in range(2):  # the second time from the cache
        source = describe_model(REPO, endpoint=hub.endpoint, cache_dir=tmp_path)
        assert (source.name, source.preset, source.config) == (REPO, None, TINY)
        assert source.folder is not None
        assert {path.name for path in source.folder.iterdir()} == {"config.json", "tokenizer.json"}
    assert not hub.storage_requests()


def test_a_preset_and_a_folder_are_described_as_they_are_resolved(folder: Path) -> None:
    for model in ("random:tiny", str(folder)):
        assert describe_model(model) == resolve_model(model)


def test_a_hub_id_is_downloaded_and_loads(hub: FakeHub, tmp_path: Path) -> None:
    """From one model to the other: saved, served by a hub, cut off on the way, downloaded and loaded."""
    with torch.device("meta"):
        original, copy = Lfm2(TINY), Lfm2(TINY)
    fill_random(original, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    save_weights(original, tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    hub.commit({path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}, "v1")
    hub.cuts = [1_000_000]
    source = resolve_model(REPO, revision="v1", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert source.name == REPO
    assert source.preset is None
    assert source.config.num_experts == TINY.num_experts
    assert source.folder is not None
    assert [request.range for request in hub.storage_requests()] == [None, "bytes=1000000-"]
    assert (source.folder / SINGLE_FILE).is_file()
    load_weights(copy, source.folder, device=torch.device("cpu"), dtype=torch.float32)
    state = original.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in copy.state_dict().items())
