"""Downloads, from a server on this machine that answers as the Hub does."""

import errno
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import grokkit
from grokkit.checkpoint import downloading, open_checkpoint
from grokkit.checkpoint.manifest import FileRecord
from grokkit.errors import CheckpointError

NAME, COMMIT = "someone/grok-tiny", "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """The few addresses of the Hub that a download asks for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.directory = directory
        self.asked: list[tuple[str, str, str | None]] = []
        self.bytes_left: int | None = None  # of file content, before connections break
        self.wrong_digest: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        return [path.split(f"/resolve/{COMMIT}/")[1] for m, path, _ in self.asked
                if m == "GET" and "/resolve/" in path]  # fmt: skip

    def handle_error(self, request, client_address) -> None:
        """Connections that break are what some tests are about."""


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        if path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            return self.send(json.dumps(self.listing()).encode(), {})
        prefix = f"/{NAME}/resolve/{COMMIT}/"
        file = self.server.directory / path.removeprefix(prefix)
        if not path.startswith(prefix) or not file.is_file():
            return self.send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                   "Accept-Ranges": "bytes"}  # fmt: skip
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.send(content, headers)
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(content[start:], headers, 206)

    def listing(self) -> dict:
        files = []
        for path in sorted(p for p in self.server.directory.rglob("*") if p.is_file()):
            name = str(path.relative_to(self.server.directory))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if name == self.server.wrong_digest:
                digest = "0" * 64
            size = path.stat().st_size
            file = {"rfilename": name, "size": size, "blobId": "0" * 40}
            if "ckpt-0" in name:
                file["lfs"] = {"sha256": digest, "size": size, "pointerSize": 100}
            files.append(file)
        return {"id": NAME, "sha": COMMIT, "siblings": files, "private": False, "tags": [],
                "downloads": 0, "likes": 0}  # fmt: skip

    def send(self, content: bytes, headers: dict, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = self.server.bytes_left
        if left is not None and "resolve" in self.path:
            self.server.bytes_left = max(left - len(content), 0)
            if len(content) > left:
                self.wfile.write(content[:left])
                self.wfile.flush()
                self.close_connection = True
                raise ConnectionAbortedError
        self.wfile.write(content)


@pytest.fixture
def hub(golden, tmp_path):
    """Serves the golden checkpoint, and files that are none of it."""
    directory = shutil.copytree(golden, tmp_path / "served")
    (directory / "README.md").write_text("a model")
    (directory / "reference.npz").unlink()
    server = Hub(directory)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


CODE = """
import sys
from grokkit import cli
sys.exit(cli.main(["download", *sys.argv[1:]]))
"""


def download(url: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """The command in a process of its own: the library reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | settings | environment,
    )  # fmt: skip


def test_a_download(hub, golden, tmp_path):
    pytest.importorskip("huggingface_hub")
    target = tmp_path / "new" / "tiny"
    run = download(hub.url, target, "--repository", NAME)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{target}: 146 official files, 2,204,552 bytes")
    assert "tokenizer.model" in run.stdout
    assert "downloading to tiny" in run.stderr and "checking tiny: 100%" in run.stderr
    for path in (golden / "ckpt-0").iterdir():
        assert (target / "ckpt-0" / path.name).read_bytes() == path.read_bytes()
    assert not (target / "README.md").exists()
    assert len(open_checkpoint(target)) == 146
    # Again: nothing is fetched, and nothing is read to compare digests.
    hub.asked.clear()
    run = download(hub.url, target, "--repository", NAME)
    assert run.returncode == 0 and hub.fetched() == []
    assert "checking tiny: 0.00B" in run.stderr


@pytest.mark.slow
def test_a_connection_that_breaks(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    target = tmp_path / "tiny"
    hub.bytes_left = 400_000
    run = download(hub.url, target, "--repository", NAME, "--no-progress")
    assert run.returncode == 2, run.stderr
    assert "expected: an answer from http://127.0.0.1" in run.stderr
    assert "files that are complete are not fetched again" in run.stderr
    with pytest.raises(CheckpointError, match="start the download again|missing"):
        open_checkpoint(target)
    there = {p.name for p in (target / "ckpt-0").iterdir()}
    assert 0 < len(there) < 146
    hub.bytes_left = None
    hub.asked.clear()
    run = download(hub.url, target, "--repository", NAME, "--no-progress")
    assert run.returncode == 0, run.stderr
    assert not there & {Path(name).name for name in hub.fetched()}
    assert len(open_checkpoint(target)) == 146


@pytest.mark.slow
def test_a_large_file_that_breaks_off(hub, tmp_path):
    """Whether or not the library goes on in its middle, it comes out whole and leaves nothing."""
    pytest.importorskip("huggingface_hub")
    content = os.urandom(45_000_000)
    (hub.directory / "other.safetensors").write_bytes(content)
    total = sum(p.stat().st_size for p in hub.directory.rglob("*") if p.is_file())
    hub.bytes_left = total - 15_000_000
    target = tmp_path / "tiny"
    run = download(hub.url, target, "--repository", NAME, "--no-progress")
    assert run.returncode == 2 and "are not fetched again" in run.stderr
    assert not (target / "other.safetensors").exists()
    hub.bytes_left = None
    hub.asked.clear()
    run = download(hub.url, target, "--repository", NAME, "--no-progress")
    assert run.returncode == 0, run.stderr
    assert (target / "other.safetensors").read_bytes() == content
    assert hub.fetched() == ["other.safetensors"]
    assert not list(target.rglob("*.incomplete"))


def test_what_a_killed_download_leaves(tmp_path):
    """It is removed once nobody writes to it."""
    folder = tmp_path / ".cache" / "huggingface" / "download" / "ckpt-0"
    folder.mkdir(parents=True)
    old, fresh = folder / "x.tag.0123abcd.incomplete", folder / "x.tag.4567cdef.incomplete"
    for path in (old, fresh):
        path.write_bytes(bytes(100))
    os.utime(old, (0, 0))
    downloading.sweep(tmp_path)
    assert list(folder.iterdir()) == [fresh]
    downloading.sweep(tmp_path / "elsewhere")


@pytest.mark.slow
def test_refusals(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    target = tmp_path / "tiny"
    run = download(hub.url, target, "--repository", "someone/else")
    assert run.returncode == 2
    assert f"expected: a model repository on {hub.url}" in run.stderr
    run = download("http://127.0.0.1:9", target)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "xai-org/grok-1\n  expected: an answer from http://127.0.0.1:9\n" in run.stderr
    assert "what to do: check the connection" in run.stderr
    assert not target.exists()
    hub.wrong_digest = "ckpt-0/tensor00007_000"
    run = download(hub.url, target, "--repository", NAME)
    assert run.returncode == 2
    assert f"{target / hub.wrong_digest}\n  expected: sha256 {'0' * 64}" in run.stderr
    assert not (target / hub.wrong_digest).exists()


def test_too_little_space(tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "_hub", lambda: None)
    files = {"ckpt-0/a": FileRecord(5_000_000_000_000_000, "")}
    monkeypatch.setattr(downloading, "_list", lambda *_: ("c", files))
    with pytest.raises(CheckpointError, match=r"expected: 5,000,000,016,777,216 bytes free"):
        grokkit.download(tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a directory to fill"):
        grokkit.download(tmp_path / "file", progress=False)


def test_a_full_disk(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    monkeypatch.setattr(downloading, "_list", lambda *_: ("c", {"ckpt-0/a": FileRecord(5, "")}))
    with pytest.raises(CheckpointError, match="room for 5 bytes\n  found: No space left"):
        grokkit.download(tmp_path / "x", progress=False)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install huggingface_hub"):
        grokkit.download(tmp_path / "x")
