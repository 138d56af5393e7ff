"""Fetching a preset's files from the Hugging Face Hub: pinned, announced, resumed, verified."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from causal_forcing.errors import BadCheckpoint, DownloadFailed, InvalidRequest
from causal_forcing.presets import CheckpointFile, Preset
from causal_forcing.weights.locate import default_weights_dir, download_path
from causal_forcing.weights.writing import require_disk

DEFAULT_PARTS = ("transformer", "lora", "text_encoder", "tokenizer", "vae/wan")
"""Parts that are fetched unless others are asked for."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class PlannedFile:
    """One file of a download.

    Attributes:
        part: What it is of the preset.
        file: Where it comes from; revision, size and hash completed by what the Hub said.
        target: Where it goes.
        present: Whether a file of the right size is there already; it is verified, not fetched.
        missing_bytes: Bytes that had to be fetched when the download was planned.
        etag: The Hub's identifier of the contents, or None when the Hub was not asked.
    """

    part: str
    file: CheckpointFile
    target: Path
    present: bool
    missing_bytes: int = 0
    etag: str | None = None

    @property
    def partial(self) -> Path:
        """Where an unfinished download is kept, to be resumed."""
        return self.target.with_name(f".{self.target.name}.{(self.etag or 'unknown')[:16]}.partial")

    @property
    def kept_bytes(self) -> int:
        """Bytes of an unfinished download to go on from: none if it is longer than the file, so not the file's."""
        kept = self.partial.stat().st_size if self.partial.exists() else 0
        return kept if kept <= (self.file.size_bytes or kept) else 0


@dataclass(frozen=True)
class DownloadPlan:
    """What a download will do, announced before its first byte.

    Attributes:
        preset: Whose files.
        files: All of them, present ones included.
    """

    preset: str
    files: tuple[PlannedFile, ...]

    @property
    def missing_bytes(self) -> int:
        """Bytes to fetch."""
        return sum(file.missing_bytes for file in self.files)


@dataclass(frozen=True)
class Progress:
    """How far one file is.

    Attributes:
        part: What it is of the preset.
        path: Its place on disk.
        phase: ``fetch`` or ``verify``.
        done_bytes: Bytes fetched or hashed; a resumed file starts above 0.
        total_bytes: Its size, or None when it is not known.
    """

    part: str
    path: Path
    phase: str
    done_bytes: int
    total_bytes: int | None


OnProgress = Callable[[Progress], None]


def download(
    preset: Preset,
    destination: Path | None = None,
    *,
    parts: Sequence[str] = DEFAULT_PARTS,
    revisions: Mapping[str, str] | None = None,
    allow_unpinned: bool = False,
    offline: bool = False,
    endpoint: str | None = None,
    on_plan: Callable[[DownloadPlan], None] | None = None,
    on_progress: OnProgress | None = None,
) -> list[PlannedFile]:
    """Fetch what is missing of a preset, verify all of it, and return what lies where.

    An interrupted download goes on where it stopped when it is called again. A file takes its name only after its size
    and hash were found right; the hash is the pinned one, and the Hub's where the Hub states one.

    Args:
        preset: Which model.
        destination: Folder of weights; None takes the default one.
        parts: Which parts; names that a preset does not have are an error, except in the default.
        revisions: Commit to take by repository, for files whose commit is not known here; each must be one that the
            parts come from.
        allow_unpinned: Whether files without any known commit or hash may be fetched from the repository's main branch.
        offline: Whether to stay off the network (as ``HF_HUB_OFFLINE=1`` does): present files are verified, missing
            ones are an error.
        endpoint: Hub to ask; None takes ``HF_ENDPOINT`` or the public one.
        on_plan: Called once before the first byte; raising stops the download.
        on_progress: Called every few megabytes.

    Raises:
        InvalidRequest: If a part does not exist, no part comes from a repository in ``revisions``, a file is not
            pinned, or the disk is too full.
        DownloadFailed: If the network or the Hub refuses.
        BadCheckpoint: If a file has another size or hash than it must have.
    """
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    folder = destination or default_weights_dir()
    chosen = _choose_parts(preset, parts)
    _require_used(revisions or {}, {file.repo for _, file in chosen})
    files = [(part, _pin(part, file, revisions or {}, allow_unpinned)) for part, file in chosen]
    plan = DownloadPlan(preset.name, tuple(_plan(part, file, folder, offline, endpoint) for part, file in files))
    if on_plan is not None:
        on_plan(plan)
    require_disk(folder, plan.missing_bytes)
    return [_fetch_and_verify(planned, endpoint, on_progress) for planned in plan.files]


def _choose_parts(preset: Preset, parts: Sequence[str]) -> list[tuple[str, CheckpointFile]]:
    files = dict(preset.files)
    if not files:
        held = "ships with this package" if preset.embedded else "has no public files"
        raise InvalidRequest("preset", preset.name, f"{held}: nothing to download", reason="NOTHING_TO_DOWNLOAD")
    if parts is not DEFAULT_PARTS:
        unknown = [part for part in parts if part not in files]
        if unknown or not parts:
            raise InvalidRequest("parts", unknown or list(parts), f"preset {preset.name} has {', '.join(files)}")
    return [(part, files[part]) for part in parts if part in files]


def _require_used(revisions: Mapping[str, str], repos: Iterable[str]) -> None:
    if unused := sorted(revisions.keys() - set(repos)):
        raise InvalidRequest("revisions", unused, f"the files come from {', '.join(sorted(repos))}")


def _pin(part: str, file: CheckpointFile, revisions: Mapping[str, str], allow_unpinned: bool) -> CheckpointFile:
    given = revisions.get(file.repo)
    if given is not None:
        if not _COMMIT.fullmatch(given):
            raise InvalidRequest(f"revisions.{file.repo}", given, "must be a full commit hash (40 hex digits)")
        if file.revision not in (None, given):
            file = replace(file, size_bytes=None, sha256=None)  # these described another commit
        return replace(file, revision=given)
    if not file.is_pinned and not allow_unpinned:
        raise InvalidRequest(
            part,
            f"{file.repo}/{file.path}",
            "has no commit or hash known to this program, so its contents could change unseen: give the commit to take "
            "(revision), or allow unpinned files",
            reason="UNPINNED_FILE",
        )
    return file


def _plan(part: str, file: CheckpointFile, folder: Path, offline: bool, endpoint: str | None) -> PlannedFile:
    target = download_path(file, folder)
    if target.is_file() and file.size_bytes in (None, target.stat().st_size) and (offline or file.sha256 is not None):
        return PlannedFile(part, file, target, present=True)
    if offline:
        state = "has another size than it must have" if target.is_file() else "is not there"
        raise BadCheckpoint(f"{target}: {state}, and the network is off limits", reason="CHECKPOINT_MISSING")
    complete, _, etag = _ask_hub(file, endpoint)
    present = target.is_file() and target.stat().st_size == complete.size_bytes
    planned = PlannedFile(part, complete, target, present, etag=etag)
    if present:
        return planned
    return replace(planned, missing_bytes=max(0, (complete.size_bytes or 0) - planned.kept_bytes))


def _ask_hub(file: CheckpointFile, endpoint: str | None) -> tuple[CheckpointFile, str, str | None]:
    """Return the file completed by what the Hub says of it, where to fetch it (some links expire), and its etag."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(file.repo, file.path, revision=file.revision, endpoint=endpoint)
    with _hub_errors(file):
        said = get_hf_file_metadata(url)
    if file.size_bytes is not None and said.size not in (None, file.size_bytes):
        raise BadCheckpoint(f"{file.repo}/{file.path}: the Hub has {said.size} bytes, expected {file.size_bytes}")
    sha256 = said.etag if said.etag and _SHA256.fullmatch(said.etag) else None
    if file.sha256 is not None and sha256 not in (None, file.sha256):
        raise BadCheckpoint(f"{file.repo}/{file.path}: the Hub has SHA-256 {sha256}, expected {file.sha256}")
    commit = said.commit_hash if said.commit_hash and _COMMIT.fullmatch(said.commit_hash) else None
    complete = replace(
        file,
        revision=file.revision or commit,
        size_bytes=file.size_bytes or said.size,
        sha256=file.sha256 or sha256,
    )
    return complete, said.location, said.etag


def _fetch_and_verify(planned: PlannedFile, endpoint: str | None, on_progress: OnProgress | None) -> PlannedFile:
    report = _reporter(planned, on_progress)
    if planned.present:
        _verify(planned.target, planned.file, report)
        return planned
    partial = planned.partial
    partial.parent.mkdir(parents=True, exist_ok=True)
    _fetch(planned, endpoint, report)
    try:
        _verify(partial, planned.file, report)
    except BadCheckpoint:
        partial.unlink()
        raise
    partial.replace(planned.target)
    return replace(planned, present=True)


class _CountingFile:
    """What `http_get` uses of a file; reports how much of it there is."""

    def __init__(self, file: BinaryIO, report: Callable[[str, int], None]) -> None:
        self._file, self._report = file, report

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._report("fetch", self._file.tell())
        return written

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def truncate(self) -> int:
        kept = self._file.truncate()
        self._report("fetch", kept)
        return kept


def _fetch(planned: PlannedFile, endpoint: str | None, report: Callable[[str, int], None]) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    _, url, _ = _ask_hub(planned.file, endpoint)  # the link of the plan may have expired
    with planned.partial.open("ab") as file, _hub_errors(planned.file):
        file.seek(file.truncate(planned.kept_bytes))
        report("fetch", file.tell())
        disable_progress_bars("huggingface_hub.http_get")  # progress goes through the callback
        try:
            http_get(
                url,
                cast("BinaryIO", _CountingFile(file, report)),
                resume_size=file.tell(),
                headers=build_hf_headers() if _is_hub(url) else {},
                expected_size=planned.file.size_bytes,
            )
        finally:
            enable_progress_bars("huggingface_hub.http_get")


def _is_hub(url: str) -> bool:
    """Return whether a URL is the Hub's own, which gets the user's token; storage behind it must not."""
    from huggingface_hub import constants

    return url.startswith((f"{constants.ENDPOINT}/", "https://huggingface.co/"))


def _verify(path: Path, file: CheckpointFile, report: Callable[[str, int], None]) -> None:
    size = path.stat().st_size
    if file.size_bytes not in (None, size):
        raise BadCheckpoint(f"{path}: has {size} bytes, expected {file.size_bytes}", reason="CHECKPOINT_DAMAGED")
    if file.sha256 is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
            report("verify", opened.tell())
    if digest.hexdigest() != file.sha256:
        message = f"{path}: SHA-256 is {digest.hexdigest()}, expected {file.sha256}; delete it and download it again"
        raise BadCheckpoint(message, reason="CHECKPOINT_DAMAGED")


def _reporter(planned: PlannedFile, on_progress: OnProgress | None) -> Callable[[str, int], None]:
    last = ("", -_BLOCK_BYTES)

    def report(phase: str, done: int) -> None:
        nonlocal last
        is_news = phase != last[0] or not 0 <= done - last[1] < _BLOCK_BYTES or done == planned.file.size_bytes
        if on_progress is not None and is_news:
            last = (phase, done)
            on_progress(Progress(planned.part, planned.target, phase, done, planned.file.size_bytes))

    return report


@contextmanager
def _hub_errors(file: CheckpointFile) -> Iterator[None]:
    """Turn what the Hub's client raises into :class:`DownloadFailed`; a callback's own errors pass."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client it uses

    try:
        yield
    except (HTTPError, OSError) as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        commit = file.revision or "main"
        kept = "what was fetched is kept, and the same call goes on with it"
        raise DownloadFailed(f"{file.repo}/{file.path} at {commit[:12]}: {first}; {kept}") from None
