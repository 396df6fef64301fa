"""Progress on stderr, answers on stdout."""

import pytest

from lfm.cli.terminal import PhaseLine, speed_line, write_text

PHASES = (
    "making random weights",
    "loading [#.........] 1 GB of 9 GB, 0.5 s",
    "loading [####......] 4 GB of 9 GB, 1.0 s",
    "loading [##########] 9 GB of 9 GB, 2.0 s",
    "warming up",
)


def test_off_the_terminal_each_phase_is_its_first_and_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    phases = PhaseLine()
    for text in PHASES:
        phases(text)
    phases.finish("ready")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == [PHASES[0], PHASES[1], PHASES[3], PHASES[4]]
    assert lines[-1].startswith("ready (0.")


def test_on_a_terminal_each_phase_is_one_line_that_is_rewritten(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    phases = PhaseLine()
    for text in PHASES:
        phases(text)
    phases.close()
    phases.close()
    shown = capsys.readouterr().err
    assert shown.count("\n") == 3  # one for each phase
    assert all(len(line) < 30 for part in shown.split("\n") for line in part.split("\r\x1b[2K"))


def test_output_of_a_model_cannot_drive_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text("a\x1b[2Jb\n\tc\x9b1m")
    assert capsys.readouterr().out == "a\x1b[2Jb\n\tc\x9b1m"  # a file gets it as it is
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write_text("a\x1b[2Jb\n\tc\r\x9b1m")
    assert capsys.readouterr().out == "a\N{REPLACEMENT CHARACTER}[2Jb\n\tc" + 2 * "\N{REPLACEMENT CHARACTER}" + "1m"


def test_the_speed_leaves_the_first_token_out() -> None:
    line = speed_line(num_prompt_tokens=9, num_cached_tokens=0, num_output_tokens=11, first_s=0.5, total_s=1.5)
    assert line == "[9 tokens in, 11 out, first after 0.50 s, 10.0 tok/s]"
    cached = speed_line(num_prompt_tokens=9, num_cached_tokens=8, num_output_tokens=1, first_s=0.5, total_s=0.5)
    assert cached == "[9 tokens in (8 cached), 1 out, first after 0.50 s]"
