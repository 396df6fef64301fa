"""The benchmark of training, at a size that a CPU does in seconds: both sides learn the same from the same."""

import json
from pathlib import Path

import pytest
import torch

from bench import train as bench
from tests.train.models import write_documents, write_tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    tokenizer = write_tiny_tokenizer(tmp_path / "tokenizer", write_documents(tmp_path / "documents.jsonl"))
    return [
        "--shapes=tiny", "--device=cpu", "--steps=4", "--tokens=1600", "--their-tokens=1600", "--conversations=12",
        f"--tokenizer={tokenizer}", f"--folder={tmp_path / 'work'}", f"--output={tmp_path / 'result.jsonl'}",
        "--commit=none",
    ]  # fmt: skip


def test_lfm_and_transformers_have_one_loss_curve(tmp_path: Path, arguments: list[str]) -> None:
    bench.main([*arguments, "--rivals=eager"])
    ours, theirs = map(json.loads, (tmp_path / "result.jsonl").read_text().splitlines())
    assert (ours["side"], theirs["side"]) == ("lfm", "transformers, eager")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert ours["losses"][-1] < ours["losses"][0]
    for result in (ours, theirs):
        assert result["tokens_per_s"] > 0
        assert len(result["parts_tokens_per_s"]) == 2  # of two timed steps; of three or more steps, three
        assert {"commit", "gpu", "torch", "transformers", "peak_bytes", "mfu", "steps"} <= result.keys()
    assert (tmp_path / "result_tiny.svg").read_text().count("<polyline") == 2


def test_a_rival_that_fails_and_a_side_out_of_time_are_results(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*positional: object, **named: object) -> None:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(bench.torch, "compile", failing)
    bench.main([*arguments, "--rivals=compiled", "--seconds=0"])
    ours, theirs = map(json.loads, (tmp_path / "result.jsonl").read_text().splitlines())
    assert ours["steps"] == 1
    assert theirs["error"] == "RuntimeError: no such compiler"
    assert "no such compiler" in capsys.readouterr().out
