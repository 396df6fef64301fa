"""A model that cannot fit is refused before its weights are downloaded."""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from lfm.model.checkpoint_files import SINGLE_FILE
from lfm.model.hf_config import to_hf_config
from lfm.model.presets import PRESETS
from tests.model.fake_hub import REPO, FakeHub, serve

HUGE = replace(PRESETS["lfm2-24b-a2b"], moe_intermediate_size=65_536)  # 2 TB of weights: no machine has room


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    config = json.dumps(to_hf_config(HUGE)).encode()
    hub.commit({"config.json": config, "tokenizer.json": b"{}", SINGLE_FILE: b"x" * 1000}, "main")
    with serve(hub):
        yield hub
    huggingface_hub.close_session()


@pytest.mark.slow
@pytest.mark.parametrize("command", [["serve", REPO, "--port", "0"], ["generate", REPO, "Hello"]])
def test_what_cannot_fit_is_not_downloaded(
    hub: FakeHub, start_lfm: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, command: list[str]
) -> None:
    process = start_lfm(*command, "--device", "cpu", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "hf"))
    assert process.wait(60) == 3
    error = (tmp_path / "stderr.txt").read_text().splitlines()[-1]
    assert error.startswith(f"error: {REPO} needs ")
    assert "the CPU can give" in error
    assert "Run: lfm serve" in error or "Use a machine" in error
    assert not hub.storage_requests()


@pytest.mark.slow
def test_info_needs_no_weights_of_a_hub_id(
    hub: FakeHub, start_lfm: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = start_lfm("info", REPO, "--device", "cpu", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "hf"))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "would fail here" in out
    assert "4 per token" in out
    assert not hub.storage_requests()
