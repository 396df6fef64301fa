"""`lfm info`: the published numbers, and what fits, without loading weights."""

import json
from pathlib import Path

import pytest

from lfm.engine import machine as machine_module
from lfm.engine.machine import Gpu, Machine
from lfm.model.hf_config import to_hf_config
from lfm.model.presets import PRESETS
from tests.cli.conftest import Lfm

GB = 10**9
H200 = Gpu(name="NVIDIA H200", total_bytes=150 * GB, free_bytes=149 * GB, capability=(9, 0))


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H200 and 24 GB of host memory, and a terminal of 160 columns."""
    machine = Machine(
        cuda_devices=(H200,), cpu_total_bytes=25 * GB, cpu_available_bytes=24 * GB, cpu_count=2, cuda_note=""
    )
    monkeypatch.setattr(machine_module, "probe_machine", lambda: machine)
    monkeypatch.setenv("COLUMNS", "160")


def row_of(out: str, *starts: str) -> list[str]:
    """The cells of the first table row whose first cells are `starts`."""
    for line in out.splitlines():
        cells = line.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", "  ").split("  ")
        filled = [cell.strip() for cell in cells if cell.strip()]
        if tuple(filled[: len(starts)]) == starts:
            return filled[len(starts) :]
    raise AssertionError(f"no row {starts} in:\n{out}")


@pytest.mark.usefixtures("on_machine")
def test_the_numbers_of_the_24b_are_the_published_ones(lfm: Lfm) -> None:
    done = lfm("info", "random:lfm2-24b-a2b")
    assert done.code == 0
    assert row_of(done.out, "architecture") == ["Lfm2MoeForCausalLM (lfm2_moe)"]
    assert row_of(done.out, "layers") == ["40: 30 short conv, 10 attention"]
    assert row_of(done.out, "parameters") == ["23,843,661,440"]
    assert row_of(done.out, "active per token") == ["2,326,879,488"]
    assert row_of(done.out, "weights") == ["47,687,327,744 bytes (47.7 GB) in bfloat16"]
    assert row_of(done.out, "K/V per token") == ["20,480 bytes in bfloat16"]
    assert row_of(done.out, "conv state per sequence") == ["245,760 bytes in bfloat16"]


@pytest.mark.usefixtures("on_machine")
def test_what_fits_is_a_table_by_device_precision_and_context(lfm: Lfm) -> None:
    out = lfm("info", "random:lfm2-24b-a2b").out
    assert row_of(out, "device", "dtype") == ["weights", "cache", "2,048", "8,192", "32,768", "128,000"]
    weights, cache, *counts = row_of(out, "cuda:0", "bfloat16")
    assert weights == "47.7 GB"
    assert 80 < float(cache.removesuffix(" GB")) < 90
    assert [int(count.replace(",", "")) for count in counts] == sorted(
        (int(count.replace(",", "")) for count in counts), reverse=True
    )
    assert 100 < int(counts[2]) < 140
    assert row_of(out, "cpu", "bfloat16") == ["47.7 GB", "-", "-", "-", "-", "-"]
    assert "cuda:0: NVIDIA H200, may use 134.0 GB" in out
    assert "device cuda:0, NVIDIA H200" in out


@pytest.mark.usefixtures("on_machine")
def test_what_does_not_fit_is_said_with_a_command_that_would(lfm: Lfm) -> None:
    done = lfm("info", "random:lfm2-24b-a2b", "--device", "cpu")
    assert done.code == 0
    text = " ".join(done.out.split())
    assert "lfm serve random:lfm2-24b-a2b would fail here" in text
    assert "Run: lfm serve random:lfm2-8b-a1b --device cpu" in text


@pytest.mark.usefixtures("on_machine")
def test_a_folder_needs_no_weights(lfm: Lfm, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(PRESETS["lfm2-8b-a1b"])))
    done = lfm("info", str(tmp_path))
    assert done.code == 0
    assert row_of(done.out, "parameters") == ["8,339,930,560"]
    assert "repetition_penalty 1.05" in done.out
    assert "(LFM2-8B-A1B's model card)" in done.out


def test_a_broken_config_is_wrong_input(lfm: Lfm, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = lfm("info", str(tmp_path))
    assert done.code == 2
    assert "llama" in done.error


def test_a_hub_id_without_a_network_is_the_machine_s_fault(
    lfm: Lfm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    done = lfm("info", "LiquidAI/LFM2-24B-A2B")
    assert done.code == 3
    assert "LiquidAI/LFM2-24B-A2B" in done.error
    assert "Check the network" in done.error
