"""`lfm bench startup`: a cold and a warm start, timed from the command to the first token."""

import json
import os
from pathlib import Path

import pytest

from tests.cli.conftest import Lfm


@pytest.mark.slow
def test_both_starts_are_timed_and_told(lfm: Lfm, tmp_path: Path) -> None:
    path = tmp_path / "starts.jsonl"
    before = os.environ.get("TRITON_CACHE_DIR")
    done = lfm("bench", "startup", "random:tiny", "--device", "cpu", "--output", str(path))
    assert done.code == 0
    starts = [json.loads(line) for line in path.read_text().splitlines()]
    assert starts == [json.loads(line) for line in done.out.splitlines()[-2:]]
    assert [start["kernels"] for start in starts] == ["cold", "warm"]
    for start in starts:
        assert 0 < start["weights_s"] < start["ready_s"] < start["first_token_s"]
        assert start["kernels_s"] is None, "nothing is compiled for a CPU"
        assert start["graphs_s"] is None
        times = [at_s for at_s, _ in start["phases"]]
        assert times == sorted(times)
        assert any("random weights" in line for _, line in start["phases"])
    assert os.environ.get("TRITON_CACHE_DIR") == before


@pytest.mark.slow
def test_a_server_that_cannot_start_is_the_error(lfm: Lfm) -> None:
    done = lfm("bench", "startup", "random:nothing")
    assert done.code == 2
    assert "random:nothing is not known" in done.error
