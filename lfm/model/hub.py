"""Download of a model from the Hugging Face hub into the hub's own cache, resumable across runs.

The hub's client resolves the revision, lists the files, knows the credentials and keeps the cache's layout. Only the
bytes of the weights are fetched here: version 2 of the client deletes its partial file when a download stops, so that
48 GB would start over. Ours keeps `blobs/<etag>.incomplete`, continues it with a Range request over plain HTTP, and
checks the SHA-256 by which the hub names it. Only files on a list are fetched, and nothing that is fetched is ever run.
"""

import errno
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_download, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, exported without __all__
    WeakFileLock,
    build_hf_headers,
    silent_tqdm,
)

from lfm.config import ModelConfig
from lfm.errors import MachineError, ModelError, UsageError
from lfm.model.checkpoint_files import INDEX_FILE, no_weights_cause, weight_file_names
from lfm.model.progress import Progress, ignore_progress
from lfm.model.sizes import format_bytes

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX_FILE,
)
_NEEDED_FILES = ("config.json", "tokenizer.json")
_TIMEOUT_S = 30.0  # without a byte; then the connection counts as dead and is opened again
_RETRY_PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # after attempts that brought nothing; any byte starts the count again
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_GIT_ID = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RESUME = "Run the same command again: what has arrived is kept and continued."


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """One commit of one repository, and where the hub's cache keeps it."""

    repo_id: str
    commit: str
    endpoint: str | None
    cache_dir: Path

    @property
    def storage(self) -> Path:
        return self.cache_dir / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    @property
    def folder(self) -> Path:
        return self.storage / "snapshots" / self.commit

    def is_complete(self) -> bool:
        """Whether everything that serving needs is there: the weights come last."""
        if not all((self.folder / name).exists() for name in _NEEDED_FILES):
            return False
        return all((self.folder / name).exists() for name in weight_file_names(self.folder))

    def link(self, name: str) -> None:
        """Put one file into the snapshot's folder, downloading it unless its blob is already there."""
        quiet: Any = silent_tqdm
        hf_hub_download(
            self.repo_id,
            name,
            revision=self.commit,
            endpoint=self.endpoint,
            cache_dir=self.cache_dir,
            tqdm_class=quiet,
        )


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """One file of the repository; `blob` is its name in the cache: the SHA-256 of large files, a git id of others."""

    name: str
    size: int
    blob: str


def download_model(
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    on_progress: Callable[[str], None] = ignore_progress,
    free_bytes: Callable[[Path], int] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Path:
    """Bring a model into the hub's cache and return its folder. A complete one needs no network.

    `endpoint` and `cache_dir` None: as the hub's client decides (HF_ENDPOINT, HF_HOME). `free_bytes` and `pause` let
    tests stand in for the disk and the clock. The architecture is checked before the weights are fetched.
    Raises UsageError for an unknown or gated repository or revision, MachineError without network or disk, ModelError
    for a repository that holds no model that can be served.
    """
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    with _translated_errors(repo_id, revision, endpoint, cache):
        api = HfApi(endpoint=endpoint)
        snapshot = _Snapshot(repo_id, _find_commit(api, repo_id, revision, cache), endpoint, cache)
        if snapshot.is_complete():
            return snapshot.folder
        files = _list_files(api, snapshot)
        _fetch_small_files(files, snapshot)
        ModelConfig.from_folder(snapshot.folder)  # another architecture is refused before 48 GB are fetched
        weights = _weights_among(files, snapshot)
        _check_free_space(weights, snapshot, free_bytes or _free_bytes)
        _fetch_weights(weights, snapshot, on_progress, pause)
    return snapshot.folder


def download_description(
    repo_id: str, *, revision: str | None = None, endpoint: str | None = None, cache_dir: Path | None = None
) -> Path:
    """Bring all of a model but its weights into the hub's cache and return the folder: enough to tell what it is.

    What is there already needs no network. Raises what `download_model` raises.
    """
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    with _translated_errors(repo_id, revision, endpoint, cache):
        api = HfApi(endpoint=endpoint)
        snapshot = _Snapshot(repo_id, _find_commit(api, repo_id, revision, cache), endpoint, cache)
        if not all((snapshot.folder / name).exists() for name in _NEEDED_FILES):
            _fetch_small_files(_list_files(api, snapshot), snapshot)
    return snapshot.folder


def _fetch_small_files(files: Mapping[str, _RemoteFile], snapshot: _Snapshot) -> None:
    if "config.json" not in files:
        raise ModelError(f"{snapshot.repo_id} has no config.json. Give the hub id of a model in Hugging Face layout.")
    for name in SMALL_FILES:
        if name in files:
            snapshot.link(name)


def _find_commit(api: HfApi, repo_id: str, revision: str | None, cache_dir: Path) -> str:
    """The commit that the revision names now; without a network, the one that it named last time."""
    with _malformed_answers():
        commit: str = api.resolve_revision(repo_id, revision=revision, cache_dir=cache_dir).resolved
    if not _GIT_ID.fullmatch(commit):  # it becomes part of a path
        raise ValueError(f"{commit!r} is no commit")
    return commit


def _list_files(api: HfApi, snapshot: _Snapshot) -> dict[str, _RemoteFile]:
    """The files at the top level of the repository."""
    with _malformed_answers():
        info = api.model_info(snapshot.repo_id, revision=snapshot.commit, files_metadata=True, timeout=_TIMEOUT_S)
    files: dict[str, _RemoteFile] = {}
    for sibling in info.siblings or []:
        blob = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        if "/" not in sibling.rfilename and blob is not None and (_SHA256.fullmatch(blob) or _GIT_ID.fullmatch(blob)):
            files[sibling.rfilename] = _RemoteFile(sibling.rfilename, sibling.size or 0, blob)
    return files


def _weights_among(files: Mapping[str, _RemoteFile], snapshot: _Snapshot) -> list[_RemoteFile]:
    names = weight_file_names(snapshot.folder)
    missing = [name for name in names if name not in files]
    if not missing:
        return [files[name] for name in names]
    if INDEX_FILE in files:
        raise ModelError(
            f"{snapshot.repo_id} lacks {missing[0]}, which its {INDEX_FILE} names. Choose another --revision or model."
        )
    raise ModelError(f"{snapshot.repo_id} {no_weights_cause(files.keys())}")


def _check_free_space(weights: list[_RemoteFile], snapshot: _Snapshot, free_bytes: Callable[[Path], int]) -> None:
    needed = sum(file.size - _size(_partial(file, snapshot)) for file in weights if not _blob(file, snapshot).exists())
    free = free_bytes(snapshot.storage)
    if needed > free:
        raise MachineError(
            f"{snapshot.repo_id} needs {format_bytes(needed)} more on the disk of {snapshot.cache_dir}, which has "
            f"{format_bytes(free)} free. Free some space, or set HF_HOME to a folder on a larger disk."
        )


def _fetch_weights(
    weights: list[_RemoteFile],
    snapshot: _Snapshot,
    on_progress: Callable[[str], None],
    pause: Callable[[float], None],
) -> None:
    """Fetch file by file: the line to the hub is the limit, and one large file at a time resumes with least loss."""
    done = sum(file.size if _blob(file, snapshot).exists() else _size(_partial(file, snapshot)) for file in weights)
    total = sum(file.size for file in weights)
    progress = Progress(f"downloading {snapshot.repo_id}", total, on_progress=on_progress, done_bytes=done)
    locks = snapshot.cache_dir / ".locks" / snapshot.storage.name
    for folder in (locks, snapshot.storage / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in weights:
        with WeakFileLock(locks / f"{file.blob}.lock"):  # the hub's own lock: its client waits for us and we for it
            if not _blob(file, snapshot).exists():
                _fetch_blob(file, snapshot, progress, pause)
        snapshot.link(file.name)
    progress.finish()


def _fetch_blob(file: _RemoteFile, snapshot: _Snapshot, progress: Progress, pause: Callable[[float], None]) -> None:
    """Complete the partial file, over as many connections as it takes, check it and give it its final name."""
    partial = _partial(file, snapshot)
    num_failures = 0
    while (before := _size(partial)) != file.size or not partial.exists():
        try:
            _fetch_rest(file, snapshot, partial, progress)
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in _TRANSIENT_STATUS:
                raise
            num_failures = 1 if _size(partial) > before else num_failures + 1
            if num_failures > len(_RETRY_PAUSES_S):
                raise
            pause(_RETRY_PAUSES_S[num_failures - 1])
    progress.note(f"checking {file.name}")
    if _SHA256.fullmatch(file.blob) and _sha256(partial) != file.blob:
        partial.unlink()
        raise MachineError(
            f"{file.name} of {snapshot.repo_id} arrived damaged and was removed. Run the same command again."
        )
    partial.replace(_blob(file, snapshot))


def _fetch_rest(file: _RemoteFile, snapshot: _Snapshot, partial: Path, progress: Progress) -> None:
    """One request for what is still missing of the partial file."""
    done = _size(partial)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if 0 < done < file.size:
        headers["Range"] = f"bytes={done}-"
    # The hub's own address each time, not the one that it redirects to: that is signed, and expires.
    url = hf_hub_url(snapshot.repo_id, file.name, revision=snapshot.commit, endpoint=snapshot.endpoint)
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        is_continued = response.status_code == httpx2.codes.PARTIAL_CONTENT
        if not is_continued:
            progress.advance(-done)
        with partial.open("ab" if is_continued else "wb") as output:
            for chunk in response.iter_bytes():
                output.write(chunk)
                progress.advance(len(chunk))
    if _size(partial) != file.size:
        raise httpx2.RemoteProtocolError(f"{file.name} ended after {_size(partial)} of {file.size} bytes")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blob(file: _RemoteFile, snapshot: _Snapshot) -> Path:
    return snapshot.storage / "blobs" / file.blob


def _partial(file: _RemoteFile, snapshot: _Snapshot) -> Path:
    return snapshot.storage / "blobs" / f"{file.blob}.incomplete"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _free_bytes(path: Path) -> int:
    """Free bytes on the disk of the nearest folder that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def _malformed_answers() -> Iterator[None]:
    """What the client raises where JSON is not shaped like the hub's, as the ValueError that it is."""
    try:
        yield
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"no listing of a repository: {error!r}") from error


@contextmanager
def _translated_errors(repo_id: str, revision: str | None, endpoint: str | None, cache_dir: Path) -> Iterator[None]:
    """Turn what the hub's client and the system raise into one line of cause and fix."""
    address = endpoint or constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        raise UsageError(
            f"{repo_id} is gated. Accept its terms at {address}/{repo_id}, then run `hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"There is neither a folder {repo_id} nor a model of that name on {address}. Check the spelling; for a "
            "private model run `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(
            f"{repo_id} has no revision {revision!r}. Name a branch, a tag or a commit, or leave it out."
        ) from error
    except (httpx2.HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError | RevisionResolutionError) else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status in (401, 403):
            raise UsageError(
                f"{address} refuses access to {repo_id} ({status}). Run `hf auth login` or set HF_TOKEN."
            ) from error
        reason = type(cause).__name__ if status is None else f"status {status}"
        raise MachineError(
            f"{repo_id} cannot be had from {address} ({reason}). Check the network, or name a folder that holds the "
            f"model. {_RESUME}"
        ) from error
    except HFValidationError as error:
        raise UsageError(f"{repo_id} is no hub id. Give one such as LiquidAI/LFM2-24B-A2B, or a folder.") from error
    except ValueError as error:
        raise MachineError(
            f"{address} answered with something else than a model hub would ({type(error).__name__}). "
            "Check HF_ENDPOINT, and whether a proxy or a login page stands in between."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"The disk of {cache_dir} is full ({format_bytes(_free_bytes(cache_dir))} free) while {repo_id} is "
                f"downloaded. Free some space, or set HF_HOME to a folder on a larger disk. {_RESUME}"
            ) from error
        raise MachineError(
            f"{cache_dir} cannot be used ({error}). Set HF_HOME to a folder that you can write."
        ) from error
