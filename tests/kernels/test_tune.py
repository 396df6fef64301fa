"""The tables of tiles, and the command that measures them: what is kept, what is replaced, and where it cannot run."""

import sys
from pathlib import Path

import pytest
import torch

from lfm.kernels import tune, tune_compile
from lfm.kernels.tune_calls import Case
from lfm.kernels.tuned import (
    FOLDER,
    FOREVER,
    PairTile,
    StreamTile,
    Tuned,
    from_text,
    grouped_tiles,
    read_tables,
    replaced,
    to_text,
    tuned_for,
    write_tables,
)
from tests.kernels.interpreted import IS_INTERPRETED

FILES = sorted(FOLDER.glob("*.json"))
H200 = read_tables(FOLDER / "nvidia_h200.json")
CPU = torch.device("cpu")


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_file_is_read_and_written_without_a_change(path: Path, tmp_path: Path) -> None:
    tables = read_tables(path)
    assert from_text(to_text(tables, gpu="any")) == tables
    write_tables(tables, tmp_path / "again.json", gpu="any")
    assert read_tables(tmp_path / "again.json") == tables


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_file_has_tiles_for_every_number_of_tokens(path: Path, kind: str) -> None:
    tables = read_tables(path)
    classes = tables.grouped[kind]  # type: ignore[index]
    bounds = [tiles.tokens for tiles in classes]
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == FOREVER
    assert all(isinstance(tile, PairTile) for tile in tables.pairs[kind])  # type: ignore[index]
    with replaced(tables):
        assert grouped_tiles(CPU, kind, bounds[0]) == classes[0]  # type: ignore[arg-type]
        assert grouped_tiles(CPU, kind, bounds[0] + 1) == classes[min(1, len(classes) - 1)]  # type: ignore[arg-type]


def test_tables_are_replaced_for_a_while_only() -> None:
    before = tuned_for(CPU)
    with replaced(H200):
        assert tuned_for(CPU) is H200
    assert tuned_for(CPU) is before


def tuned_with(monkeypatch: pytest.MonkeyPatch, times: object, parts: list[str]) -> Tuned:
    """The outcome of tuning on a GPU whose measurements are `times(case, tables)`."""
    monkeypatch.setattr(tune, "compile_all", lambda *_, **__: [])
    monkeypatch.setattr(tune, "tuned_for", lambda device: H200)
    monkeypatch.setattr(tune, "measure", lambda case, choices: [times(case, tables) for tables in choices])  # type: ignore[operator]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return tune.tune(["fp8"], parts, workers=1)


def test_nothing_changes_where_nothing_is_two_percent_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(case: Case, tables: Tuned) -> float:
        is_wide = case.part == "stream" and tables.stream["fp8"].get((case.what, case.tokens), (0,))[0] == 16
        return 0.99 if is_wide else 1.0

    assert tuned_with(monkeypatch, times, ["stream", "pairs"]) == H200


def test_the_fastest_tile_is_kept_and_the_library_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = StreamTile(8, 4, 8, 1, 168)

    def times(case: Case, tables: Tuned) -> float:
        tile = tables.stream["fp8"].get((case.what, case.tokens))
        if case.what == "down":
            return 0.5 if tile is None else 1.0
        return 0.5 if tile == fastest else 1.0

    stream = tuned_with(monkeypatch, times, ["stream"]).stream["fp8"]
    assert stream["project_add", 8] == fastest
    assert not any(what == "down" for what, _ in stream)
    assert stream["project_add", 32] == H200.stream["fp8"]["project_add", 32]


def test_products_of_experts_are_tuned_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """`down` is measured beside the best `up`; large products begin where they win."""

    def times(case: Case, tables: Tuned) -> float:
        if case.part == "prefill":
            return 1.0 if (tables.fp8_prefill_tokens == 1) == (case.tokens >= 192) else 2.0
        tiles = tables.grouped["fp8"][0]
        if case.what == "down":
            assert tiles.up.stages == 3
        return (tiles.up.stages != 3) + (tiles.down.stages != 3) + 1.0 + (not tiles.is_all_fp8)

    tables = tuned_with(monkeypatch, times, ["grouped", "prefill"])
    assert all(tiles.up.stages == tiles.down.stages == 3 and tiles.is_all_fp8 for tiles in tables.grouped["fp8"])
    assert tables.grouped["fp8"][-1].tokens == FOREVER
    assert tables.fp8_prefill_tokens == 129  # one more than the largest number of tokens where they lose
    assert tables.grouped["bf16"] == H200.grouped["bf16"]


def test_without_a_gpu_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        tune.main()
    assert caught.value.code == 3
    assert "There is no GPU to measure" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")
def test_candidates_are_compiled_by_processes_of_their_own() -> None:
    """One that compiles, and one that cannot: 7 rows are no power of two."""
    pytest.importorskip("triton")
    good = H200._replace(pairs={**H200.pairs, "fp8": H200.pairs["fp8"]._replace(up=PairTile(8, 2, 4))})
    bad = H200._replace(pairs={**H200.pairs, "fp8": H200.pairs["fp8"]._replace(up=PairTile(7, 2, 4))})
    case = Case("pairs", "fp8", "up", 1)
    lines = tune_compile.compile_all([(case, good), (case, bad)], 89, workers=2)
    assert len(lines) == 1
    assert "does not compile" in lines[0]
