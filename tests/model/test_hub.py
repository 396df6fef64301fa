"""Download from a hub: what is fetched, resuming, revisions, and what every failure says."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest

from lfm.config import ModelConfig
from lfm.errors import LfmError, MachineError, ModelError, UsageError
from lfm.model import hub as hub_module
from lfm.model.checkpoint_files import INDEX_FILE, SINGLE_FILE
from lfm.model.hf_config import to_hf_config
from lfm.model.hub import download_model
from lfm.model.presets import PRESETS
from lfm.model.progress import Progress
from tests.model.fake_hub import REPO, FakeHub, serve, sha256

WEIGHTS = bytes(range(256)) * 1200  # 307,200 bytes: several reads of a socket
CONFIG = json.dumps(to_hf_config(PRESETS["tiny"])).encode()
FILES = {
    "config.json": CONFIG,
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    SINGLE_FILE: WEIGHTS,
}
OTHERS = {
    "README.md": b"# model",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x04.",
    "onnx/model.safetensors": b"x",
    "consolidated.safetensors": b"y",
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.commit(FILES | OTHERS, "main")
    with serve(hub):
        yield hub
    huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def download(hub: FakeHub, cache: Path, **options: object) -> Path:
    """Download without waiting between attempts."""
    return download_model(REPO, endpoint=hub.endpoint, cache_dir=cache, **({"pause": lambda s: None} | options))  # type: ignore[arg-type]


def error_of(hub: FakeHub, cache: Path, kind: type[LfmError], **options: object) -> str:
    with pytest.raises(kind) as caught:
        download(hub, cache, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def partial_of(cache: Path, content: bytes = WEIGHTS) -> Path:
    return cache / f"models--{REPO.replace('/', '--')}" / "blobs" / f"{sha256(content)}.incomplete"


def stop(seconds: float) -> None:
    """What Ctrl-C does to a download that waits."""
    raise KeyboardInterrupt


def test_the_listed_files_arrive_and_no_others(hub: FakeHub, tmp_path: Path) -> None:
    folder = download(hub, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert not list(tmp_path.rglob("*.incomplete"))


def test_weights_come_over_plain_http_and_without_the_token(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(hub, tmp_path)
    own = [request.authorization for request in hub.requests if request not in hub.storage_requests()]
    assert set(own) == {"Bearer hf_secret"}
    assert [request.authorization for request in hub.storage_requests()] == [None]
    assert not [request for request in hub.requests if "xet" in request.path]


def test_progress_counts_the_bytes_of_the_weights(hub: FakeHub, tmp_path: Path) -> None:
    lines: list[str] = []
    download(hub, tmp_path, on_progress=lines.append)
    assert lines[-1].startswith(f"downloading {REPO} [####################] 307.2 kB of 307.2 kB, ")


def test_a_complete_model_is_found_again_with_one_request_and_without_any(hub: FakeHub, tmp_path: Path) -> None:
    folder = download(hub, tmp_path)
    hub.requests.clear()
    assert download(hub, tmp_path) == folder
    assert len(hub.requests) == 1
    hub.endpoint = "http://127.0.0.1:9"  # the discard port: nothing listens
    assert download(hub, tmp_path) == folder
    assert download(hub, tmp_path, revision=folder.name) == folder


def test_a_cut_connection_is_continued_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    hub.cuts = [100_000, 50_000]
    pauses: list[float] = []
    folder = download(hub, tmp_path, pause=pauses.append)
    assert [request.range for request in hub.storage_requests()] == [None, "bytes=100000-", "bytes=150000-"]
    assert (folder / SINGLE_FILE).read_bytes() == WEIGHTS
    assert pauses == [1.0, 1.0]


def test_a_download_stopped_by_the_user_is_continued_by_the_next_run(hub: FakeHub, tmp_path: Path) -> None:
    hub.cuts = [200_000]
    with pytest.raises(KeyboardInterrupt):
        download(hub, tmp_path, pause=stop)
    assert partial_of(tmp_path).read_bytes() == WEIGHTS[:200_000]
    hub.requests.clear()
    lines: list[str] = []
    folder = download(hub, tmp_path, on_progress=lines.append)
    assert [request.range for request in hub.storage_requests()] == ["bytes=200000-"]
    assert (folder / SINGLE_FILE).read_bytes() == WEIGHTS
    assert lines[-1].startswith(f"downloading {REPO} [####################] 307.2 kB of 307.2 kB, ")


def test_a_connection_that_brings_nothing_is_given_up_with_what_arrived_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.cuts = [1000, *[0] * 20]
    pauses: list[float] = []
    text = error_of(hub, tmp_path, MachineError, pause=pauses.append)
    assert "Run the same command again" in text
    assert pauses == [1.0, 2.0, 4.0, 8.0]
    assert partial_of(tmp_path).read_bytes() == WEIGHTS[:1000]


def test_a_server_that_ignores_the_range_starts_the_file_over(hub: FakeHub, tmp_path: Path) -> None:
    hub.cuts, hub.ignores_range = [100_000], True
    lines: list[str] = []
    folder = download(hub, tmp_path, on_progress=lines.append)
    assert (folder / SINGLE_FILE).read_bytes() == WEIGHTS
    assert "307.2 kB of 307.2 kB" in lines[-1]


def test_a_storage_that_is_busy_is_asked_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.statuses["/storage/"] = (503, "")
    folder = download(hub, tmp_path, pause=lambda seconds: hub.statuses.clear())
    assert (folder / SINGLE_FILE).read_bytes() == WEIGHTS


@pytest.mark.parametrize("junk", [b"\0" * 1000, b"\0" * len(WEIGHTS), b"\0" * (len(WEIGHTS) + 1)])
def test_a_damaged_partial_file_never_becomes_the_model(junk: bytes, hub: FakeHub, tmp_path: Path) -> None:
    partial = partial_of(tmp_path)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(junk)
    if len(junk) <= len(WEIGHTS):
        assert "arrived damaged" in error_of(hub, tmp_path, MachineError)
        assert not partial.exists()
    assert (download(hub, tmp_path) / SINGLE_FILE).read_bytes() == WEIGHTS


def test_a_file_longer_than_announced_is_given_up(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.revisions["main"]
    lfs = {"sha256": sha256(WEIGHTS), "size": 10, "pointerSize": 134}
    siblings = [{"rfilename": name, "size": len(content), "blobId": "0" * 40} for name, content in FILES.items()]
    siblings[-1] |= {"size": 10, "lfs": lfs}
    hub.listing = json.dumps({"id": REPO, "sha": commit, "siblings": siblings}).encode()
    assert "cannot be had from" in error_of(hub, tmp_path, MachineError)


def test_sharded_weights_arrive_and_only_the_missing_shard_is_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    shards = {f"model-0000{i}-of-00003.safetensors": bytes([i]) * 50_000 for i in (1, 2, 3)}
    index = {"metadata": {}, "weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}}
    files = FILES | shards | {INDEX_FILE: json.dumps(index).encode()}
    del files[SINGLE_FILE]
    hub.commit(files, "sharded")
    hub.cuts = [None, 20_000]
    with pytest.raises(KeyboardInterrupt):
        download(hub, tmp_path, revision="sharded", pause=stop)
    hub.requests.clear()
    folder = download(hub, tmp_path, revision="sharded")
    assert [request.range for request in hub.storage_requests()] == ["bytes=20000-", None]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub, tmp_path: Path) -> None:
    other = bytes(reversed(WEIGHTS))
    commit = hub.commit(FILES | {SINGLE_FILE: other}, "v2", "refs/pr/1")
    for revision in ("v2", "refs/pr/1", commit):
        folder = download(hub, tmp_path / revision.replace("/", "-"), revision=revision)
        assert folder.name == commit
        assert (folder / SINGLE_FILE).read_bytes() == other
    assert (download(hub, tmp_path / "main") / SINGLE_FILE).read_bytes() == WEIGHTS


def test_a_revision_that_moves_during_the_download_changes_nothing(hub: FakeHub, tmp_path: Path) -> None:
    """All files come from the commit that the branch named at the start."""
    first = hub.revisions["main"]
    hub.cuts = [1000]
    other = FILES | {SINGLE_FILE: b"new", "tokenizer.json": b"new"}
    folder = download(hub, tmp_path, pause=lambda seconds: hub.commit(other, "main") and None)
    assert folder.name == first
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_two_downloads_at_once_fetch_the_weights_once(hub: FakeHub, tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(download(hub, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert len(hub.storage_requests()) == 1


def test_an_unknown_model_is_a_usage_error(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither a folder nobody/nothing nor a model of that name"):
        download_model("nobody/nothing", endpoint=hub.endpoint, cache_dir=tmp_path)


@pytest.mark.parametrize("repo_id", ["org/a--b", "org/a..b", "org/name.git", "org/name-"])
def test_an_id_that_the_hub_could_not_have_is_a_usage_error(repo_id: str, hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no hub id"):
        download_model(repo_id, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert not hub.requests


def test_an_unknown_revision_is_a_usage_error(hub: FakeHub, tmp_path: Path) -> None:
    assert f"{REPO} has no revision 'v9'" in error_of(hub, tmp_path, UsageError, revision="v9")
    assert "has no revision" in error_of(hub, tmp_path, UsageError, revision="f" * 40)


@pytest.mark.parametrize(
    ("status", "code", "kind", "part"),
    [
        (403, "GatedRepo", UsageError, "is gated. Accept its terms at"),
        (401, "RepoNotFound", UsageError, "Check the spelling"),
        (401, "", UsageError, "refuses access"),
        (403, "", UsageError, "refuses access"),
        (500, "", MachineError, "status 500"),
        (429, "", MachineError, "status 429"),
    ],
)
def test_refusals_of_the_hub_say_whose_fault_it_is(
    status: int, code: str, kind: type[LfmError], part: str, hub: FakeHub, tmp_path: Path
) -> None:
    hub.statuses["/api/"] = (status, code)
    assert part in error_of(hub, tmp_path, kind)


def test_a_gated_file_is_a_usage_error(hub: FakeHub, tmp_path: Path) -> None:
    """Of gated repositories anyone may list the files."""
    hub.statuses["/resolve/"] = (403, "GatedRepo")
    assert "is gated" in error_of(hub, tmp_path, UsageError)


@pytest.mark.parametrize(
    "listing", [b"<html>Log in to the wireless network</html>", b"[]", b"{}", b'{"sha": "../../x"}']
)
def test_an_answer_that_is_not_a_hubs_is_a_machine_error(listing: bytes, hub: FakeHub, tmp_path: Path) -> None:
    hub.listing = listing
    assert "HF_ENDPOINT" in error_of(hub, tmp_path, MachineError)


def test_no_network_is_a_machine_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="ConnectError") as caught:
        download_model(REPO, endpoint="http://127.0.0.1:9", cache_dir=tmp_path, pause=pytest.fail)
    assert caught.value.exit_code == 3


def test_a_disk_without_room_is_found_before_the_weights_are_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    text = error_of(hub, tmp_path, MachineError, free_bytes=lambda path: 300_000)
    assert "needs 307.2 kB more" in text
    assert "has 300.0 kB free" in text
    assert "HF_HOME" in text
    assert not hub.storage_requests()


def test_what_has_arrived_already_needs_no_room(hub: FakeHub, tmp_path: Path) -> None:
    hub.cuts = [200_000]
    with pytest.raises(KeyboardInterrupt):
        download(hub, tmp_path, pause=stop)
    assert "needs 107.2 kB more" in error_of(hub, tmp_path, MachineError, free_bytes=lambda path: 107_199)
    download(hub, tmp_path, free_bytes=lambda path: 107_200)


def test_a_disk_that_fills_up_meanwhile_is_a_machine_error(hub: FakeHub, tmp_path: Path) -> None:
    """/dev/full answers every write with the error of a full disk."""
    partial = partial_of(tmp_path)
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    text = error_of(hub, tmp_path, MachineError)
    assert "is full" in text
    assert " free)" in text


def test_another_architecture_is_refused_before_the_weights_are_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    config = {"model_type": "lfm3", "architectures": ["Lfm3ForCausalLM"]}
    hub.commit(FILES | {"config.json": json.dumps(config).encode()}, "main")
    assert "lfm3" in error_of(hub, tmp_path, ModelError)
    assert not hub.storage_requests()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"config.json": None}, "has no config.json"),
        ({SINGLE_FILE: None}, "neither model.safetensors nor"),
        ({SINGLE_FILE: None, "consolidated.safetensors": None}, "only as pickles (pytorch_model.bin)"),
        ({SINGLE_FILE: None, "consolidated.safetensors": None, "pytorch_model.bin": None}, "has no model.safetensors"),
        ({INDEX_FILE: b'{"weight_map": {"x": "gone.safetensors"}}'}, "lacks gone.safetensors"),
        ({INDEX_FILE: b'{"weight_map": {"x": "../x.safetensors"}}'}, "'../x.safetensors'"),
        ({"config.json": b"{"}, "cannot be read as JSON"),
    ],
)
def test_a_repository_that_cannot_be_served_is_a_model_error(
    change: dict[str, bytes | None], part: str, hub: FakeHub, tmp_path: Path
) -> None:
    files = {name: content for name, content in (FILES | OTHERS | change).items() if content is not None}
    hub.commit(files, "main")
    assert part in error_of(hub, tmp_path, ModelError)
    assert not hub.storage_requests()


def test_a_blob_name_that_leaves_the_cache_is_not_used(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.revisions["main"]
    siblings = [{"rfilename": name, "size": len(content), "blobId": "0" * 40} for name, content in FILES.items()]
    siblings[-1]["lfs"] = {"sha256": "../../../evil", "size": 3, "pointerSize": 134}
    hub.listing = json.dumps({"id": REPO, "sha": commit, "siblings": siblings}).encode()
    error_of(hub, tmp_path / "cache", ModelError)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_cache_that_cannot_be_written_is_a_machine_error(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "HF_HOME" in error_of(hub, tmp_path / "file" / "cache", MachineError)


def test_the_config_of_a_download_reads_back(hub: FakeHub, tmp_path: Path) -> None:
    assert ModelConfig.from_folder(download(hub, tmp_path)) == PRESETS["tiny"]


def make_clock(*times: float) -> Callable[[], float]:
    ticks = iter(times)
    return lambda: next(ticks)


def test_a_progress_line_has_bytes_seconds_and_speed() -> None:
    lines: list[str] = []
    progress = Progress("loading", 4_000_000_000, on_progress=lines.append, clock=make_clock(0.0, 0.1, 1.0, 1.0))
    progress.advance(1_000_000_000)  # too soon for a line
    progress.advance(1_000_000_000)
    assert lines == ["loading [##########..........] 2.0 GB of 4.0 GB, 1.0 s, 2.0 GB/s"]


def test_a_resumed_transfers_speed_counts_only_what_is_new() -> None:
    lines: list[str] = []
    progress = Progress("x", 100_000, on_progress=lines.append, done_bytes=90_000, clock=make_clock(0.0, 0.1, 2.0))
    progress.advance(10_000)
    progress.finish()
    assert lines == ["x [####################] 100.0 kB of 100.0 kB, 2.0 s, 5.0 kB/s"]


def test_every_file_that_is_needed_is_on_the_list() -> None:
    assert set(hub_module._NEEDED_FILES) <= set(hub_module.SMALL_FILES)
