"""The promise of progress in shared memory."""

from pathlib import Path

from lfm.engine.lifeline import Heartbeat


def test_a_promise_is_seen_through_the_file_and_broken_when_it_passes(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    with Heartbeat.create(path, first_within_s=60.0) as reader, Heartbeat(path) as writer:
        assert not reader.is_broken
        first = reader.promised_at
        writer.promise(120.0)
        assert reader.promised_at > first + 30
        assert not reader.is_broken
        writer.promise(-0.001)
        assert reader.is_broken
