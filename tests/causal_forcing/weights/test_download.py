"""Downloads against a hub on loopback: pinned, announced, resumed, verified, refused."""

import hashlib
import shutil
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from causal_forcing.errors import BadCheckpoint, DownloadFailed, InvalidRequest
from causal_forcing.presets import CheckpointFile, PresetFiles, get_preset
from causal_forcing.weights.download import DEFAULT_PARTS, download

COMMIT, OTHER_COMMIT = "1" * 40, "2" * 40
REPO = "owner/name"


@dataclass
class Hub:
    """The part of the Hugging Face protocol that downloads use: HEAD and ranged GET of ``/resolve/``.

    With ``signs``, HEAD sends on to a storage host whose links end with the first body that any of them gave.
    """

    files: dict = field(default_factory=dict)  # (commit, path) -> bytes
    requests: list = field(default_factory=list)  # (method, path, range)
    fail_after: int | None = None  # cut the next body after so many bytes
    etag: str | None = None  # instead of the true hash
    ignores_ranges: bool = False
    signs: bool = False
    signature: int = 0  # of the links that work
    url: str = ""

    def link(self, path):
        return f"{self.url.replace('127.0.0.1', 'localhost')}/{self.signature}{path}"

    def resolve(self, path):
        if self.signs:
            path = path.removeprefix(f"/{self.signature}")
        prefix = f"/{REPO}/resolve/"
        if not path.startswith(prefix):
            return None, None
        commit, _, name = path.removeprefix(prefix).partition("/")
        commit = COMMIT if commit == "main" else commit
        return commit, self.files.get((commit, name))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, *, with_body):
        hub = self.server.hub
        span = self.headers.get("Range")
        hub.requests.append((self.command, self.path, span))
        commit, content = hub.resolve(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        span = None if hub.ignores_ranges else span
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        body = content[start:]
        sends_on = hub.signs and not with_body
        self.send_response(416 if start >= len(content) else 302 if sends_on else 206 if span else 200)
        if sends_on:
            self.send_header("Location", hub.link(self.path))
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", "0" if sends_on else str(len(body)))
        self.send_header("ETag", f'"{hub.etag or hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not with_body:
            return
        hub.signature += 1
        cut, hub.fail_after = hub.fail_after, None
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.hub
    server.shutdown()
    server.server_close()
    thread.join()


CONTENT = bytes(range(256)) * 4000


def pinned(content=CONTENT, path="sub/x.pt", **changes):
    file = CheckpointFile(REPO, path, COMMIT, len(content), hashlib.sha256(content).hexdigest(), "MIT")
    return replace(file, **changes)


@pytest.fixture
def make_preset():
    def make(file, **others):
        return replace(get_preset("tiny"), name="p", files=PresetFiles(transformer=file, **others), embedded=False)

    return make


@pytest.fixture
def run(hub, tmp_path):
    hub.files[COMMIT, "sub/x.pt"] = CONTENT

    def call(preset, **kwargs):
        return download(preset, tmp_path / "weights", endpoint=hub.url, **kwargs)

    return call


def target(tmp_path):
    return tmp_path / "weights" / "owner" / "name" / "sub" / "x.pt"


def gets(hub):
    return [request for request in hub.requests if request[0] == "GET"]


def test_a_file_is_announced_fetched_verified_and_then_named(run, hub, make_preset, tmp_path):
    events = []
    (planned,) = run(
        make_preset(pinned()),
        on_plan=lambda plan: events.append(("plan", plan.missing_bytes, len(gets(hub)), target(tmp_path).exists())),
        on_progress=lambda p: events.append((p.phase, p.done_bytes, p.total_bytes)),
    )
    assert planned.target == target(tmp_path)
    assert planned.target.read_bytes() == CONTENT
    assert events[0] == ("plan", len(CONTENT), 0, False)
    assert ("fetch", len(CONTENT), len(CONTENT)) in events
    assert events[-1] == ("verify", len(CONTENT), len(CONTENT))
    assert f"/resolve/{COMMIT}/" in gets(hub)[0][1]
    assert [path.name for path in planned.target.parent.iterdir()] == ["x.pt"]


def test_a_present_file_is_verified_and_not_fetched(run, hub, make_preset, tmp_path):
    run(make_preset(pinned()))
    hub.requests.clear()
    phases = []
    run(make_preset(pinned()), on_progress=lambda p: phases.append(p.phase))
    assert hub.requests == []
    assert set(phases) == {"verify"}


def test_an_interrupted_download_goes_on_where_it_stopped(run, hub, make_preset, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(progress):
        if progress.done_bytes:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(make_preset(pinned()), on_progress=interrupt)
    assert not target(tmp_path).exists()
    (partial,) = target(tmp_path).parent.glob(".x.pt.*.partial")
    partial.write_bytes(CONTENT[:300_000])
    plans = []
    run(make_preset(pinned()), on_plan=plans.append)
    assert plans[0].missing_bytes == len(CONTENT) - 300_000
    assert gets(hub)[-1][2] == "bytes=300000-"
    assert target(tmp_path).read_bytes() == CONTENT


def test_a_connection_that_breaks_is_taken_up_again(run, hub, make_preset, tmp_path):
    hub.fail_after = 100_000
    run(make_preset(pinned()))
    assert [request[2] for request in gets(hub)] == [None, "bytes=100000-"]
    assert target(tmp_path).read_bytes() == CONTENT


def keep_partial(tmp_path, content):
    target(tmp_path).parent.mkdir(parents=True)
    etag = hashlib.sha256(CONTENT).hexdigest()
    target(tmp_path).with_name(f".x.pt.{etag[:16]}.partial").write_bytes(content)


def test_a_server_that_sends_everything_again_is_counted_from_the_beginning(run, hub, make_preset, tmp_path):
    keep_partial(tmp_path, CONTENT[:300_000])
    hub.ignores_ranges = True
    fetched = []
    run(make_preset(pinned()), on_progress=lambda p: fetched.append(p.done_bytes) if p.phase == "fetch" else None)
    assert [request[2] for request in gets(hub)] == ["bytes=300000-"]
    assert target(tmp_path).read_bytes() == CONTENT
    assert fetched == [300_000, 0, len(CONTENT)]


def test_a_partial_that_is_longer_than_the_file_is_fetched_anew(run, hub, make_preset, tmp_path):
    keep_partial(tmp_path, CONTENT + b"more")
    plans = []
    run(make_preset(pinned()), on_plan=plans.append)
    assert plans[0].missing_bytes == len(CONTENT)
    assert [request[2] for request in gets(hub)] == [None]
    assert target(tmp_path).read_bytes() == CONTENT


def test_a_link_is_asked_for_right_before_it_is_followed(run, hub, make_preset, tmp_path):
    hub.files[COMMIT, "v.pth"] = b"vae"
    hub.signs = True
    files = run(make_preset(pinned(), vaes={"wan": pinned(b"vae", "v.pth")}))
    assert [planned.target.read_bytes() for planned in files] == [CONTENT, b"vae"]
    assert [request[1].split("/", 2)[1] for request in gets(hub)] == ["0", "1"]


def test_a_partial_of_other_contents_is_not_continued(run, hub, make_preset, tmp_path):
    target(tmp_path).parent.mkdir(parents=True)
    target(tmp_path).with_name(".x.pt.0123456789abcdef.partial").write_bytes(b"old")
    run(make_preset(pinned()))
    assert gets(hub)[-1][2] is None


@pytest.mark.parametrize("damage", ["fetched", "present"])
def test_wrong_contents_are_refused(run, hub, make_preset, tmp_path, damage):
    wrong = b"x" * len(CONTENT)
    if damage == "fetched":
        hub.files[COMMIT, "sub/x.pt"] = wrong
        hub.etag = hashlib.sha256(CONTENT).hexdigest()
    else:
        target(tmp_path).parent.mkdir(parents=True)
        target(tmp_path).write_bytes(wrong)
    with pytest.raises(BadCheckpoint, match="SHA-256 is") as caught:
        run(make_preset(pinned()))
    assert caught.value.reason == "CHECKPOINT_DAMAGED"
    assert target(tmp_path).exists() == (damage == "present")
    assert list(target(tmp_path).parent.glob("*.partial")) == []


@pytest.mark.parametrize("change", [{"size_bytes": 7}, {"sha256": "0" * 64}])
def test_a_hub_that_has_something_else_is_refused_before_fetching(run, hub, make_preset, change):
    with pytest.raises(BadCheckpoint, match="the Hub has"):
        run(make_preset(pinned(**change)))
    assert gets(hub) == []


def test_a_truncated_file_is_replaced(run, make_preset, tmp_path):
    target(tmp_path).parent.mkdir(parents=True)
    target(tmp_path).write_bytes(CONTENT[:100])
    run(make_preset(pinned()))
    assert target(tmp_path).read_bytes() == CONTENT


def test_an_unpinned_file_is_refused_until_a_commit_is_given_or_it_is_allowed(run, hub, make_preset, tmp_path):
    preset = make_preset(CheckpointFile(REPO, "sub/x.pt"))
    with pytest.raises(InvalidRequest) as caught:
        run(preset)
    assert caught.value.reason == "UNPINNED_FILE"
    assert hub.requests == []
    (planned,) = run(preset, revisions={REPO: COMMIT})
    assert planned.file.revision == COMMIT
    shutil.rmtree(tmp_path / "weights")
    (planned,) = run(preset, allow_unpinned=True)
    assert planned.file.revision == COMMIT  # what main was, so that it can be pinned next time
    assert planned.file.size_bytes == len(CONTENT)
    assert planned.file.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_a_given_commit_replaces_what_was_pinned_for_another(run, hub, make_preset):
    newer = CONTENT + b"newer"
    hub.files[OTHER_COMMIT, "sub/x.pt"] = newer
    (planned,) = run(make_preset(pinned()), revisions={REPO: OTHER_COMMIT})
    assert planned.target.read_bytes() == newer


@pytest.mark.parametrize("revision", ["main", "1234567", "G" * 40])
def test_a_commit_must_be_a_full_hash(run, make_preset, revision):
    with pytest.raises(InvalidRequest) as caught:
        run(make_preset(pinned()), revisions={REPO: revision})
    assert caught.value.metadata["field"] == f"revisions.{REPO}"


def test_a_commit_of_a_repository_that_nothing_comes_from_is_refused(run, hub, make_preset):
    vaes = {"tae": CheckpointFile("other/name", "t.pth")}  # not one of the default parts
    for repo in ("typo/name", "other/name"):
        with pytest.raises(InvalidRequest, match=rf"revisions: got \['{repo}'\]; the files come from owner/name"):
            run(make_preset(pinned(), vaes=vaes), revisions={repo: COMMIT})
    assert hub.requests == []


def test_a_full_disk_is_refused_before_fetching(run, hub, make_preset, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": len(CONTENT) - 1}))
    with pytest.raises(InvalidRequest) as caught:
        run(make_preset(pinned()))
    assert caught.value.reason == "DISK_FULL"
    assert gets(hub) == []


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_offline_never_asks_the_network(run, hub, make_preset, monkeypatch, tmp_path, how):
    from huggingface_hub import constants

    if how == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    options = {"offline": True} if how == "flag" else {}
    with pytest.raises(BadCheckpoint, match="is not there, and the network is off limits"):
        run(make_preset(pinned()), **options)
    target(tmp_path).parent.mkdir(parents=True)
    target(tmp_path).write_bytes(CONTENT)
    (planned,) = run(make_preset(pinned()), **options)
    assert planned.present
    target(tmp_path).write_bytes(CONTENT[:5])
    with pytest.raises(BadCheckpoint, match="another size"):
        run(make_preset(pinned()), **options)
    assert hub.requests == []


def test_a_missing_file_and_a_dead_hub_are_download_failures(run, hub, make_preset):
    with pytest.raises(DownloadFailed, match="owner/name/absent.pt at 111111111111") as caught:
        run(make_preset(pinned(path="absent.pt")))
    assert caught.value.retryable
    hub.url = "http://127.0.0.1:1"
    with pytest.raises(DownloadFailed):
        run(make_preset(pinned()))


def test_only_the_asked_for_parts_are_fetched(run, hub, make_preset, tmp_path):
    hub.files[COMMIT, "v.pth"] = b"vae"
    hub.files[COMMIT, "t.pth"] = b"tae"
    vaes = {"wan": pinned(b"vae", "v.pth"), "tae": pinned(b"tae", "t.pth")}
    preset = make_preset(pinned(), vaes=vaes)
    assert [planned.part for planned in run(preset)] == ["transformer", "vae/wan"]
    assert [planned.part for planned in run(preset, parts=["vae/tae"])] == ["vae/tae"]
    with pytest.raises(InvalidRequest) as caught:
        run(preset, parts=["vae/vqgan"])
    assert caught.value.metadata["field"] == "parts"
    assert "vae/tae" in caught.value.message


def test_presets_without_files_say_so(run, make_preset):
    with pytest.raises(InvalidRequest, match="ships with this package"):
        run(get_preset("tiny"))
    with pytest.raises(InvalidRequest, match="preset wan-14b has text_encoder"):
        run(get_preset("wan-14b"), parts=["transformer"])


@pytest.mark.parametrize("name", ["framewise", "framewise-2step", "framewise-1step", "chunkwise"])
def test_everything_that_a_causal_forcing_preset_fetches_is_pinned_and_sized(name):
    files = [file for part, file in get_preset(f"causal-forcing-{name}").files if part in DEFAULT_PARTS]
    assert len(files) == 4
    assert all(file.revision and file.sha256 and file.size_bytes for file in files)


def test_the_longlive_preset_needs_a_commit(tmp_path):
    with pytest.raises(InvalidRequest, match=r"longlive_base\.pt"):
        download(get_preset("longlive"), tmp_path, offline=True)
