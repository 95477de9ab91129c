"""The Hub: its own cache, and its refusals told apart."""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from allmend.errors import UserError
from allmend.models.sources import resolve

MakeFolder = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub client's cache, empty, and an address where nobody listens."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def test_a_model_in_the_hubs_cache_needs_no_network(hub: Path, make_folder: MakeFolder) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = hub / "models--owner--name"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    (store / "refs" / "v1").write_text(commit)
    shutil.copytree(make_folder(), store / "snapshots" / commit)
    assert resolve("owner/name") == store / "snapshots" / commit
    assert resolve("owner/name@v1") == store / "snapshots" / commit


def test_an_interrupted_download_names_what_is_missing(hub: Path, make_folder: MakeFolder) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = hub / "models--owner--name"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    shutil.copytree(folder, store / "snapshots" / commit)
    with pytest.raises(UserError, match="no weights"):  # the network was asked in between
        resolve("owner/name")


@pytest.mark.usefixtures("hub")
def test_no_network_and_no_copy_is_told() -> None:
    with pytest.raises(UserError, match="cannot be reached") as caught:
        resolve("owner/name")
    assert "hf download" in str(caught.value)


@contextlib.contextmanager
def answering(status: int, code: str) -> Iterator[str]:
    """A server that answers everything as the Hub does when it refuses."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "gated"),
        (404, "RepoNotFound", "no such model on the Hub"),
        (404, "RevisionNotFound", "no revision 'v9'"),
    ],
)
def test_refusals_of_the_hub_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    import huggingface_hub.constants

    with answering(status, code) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(UserError, match=message) as caught:
            resolve("owner/name@v9")
    assert "owner/name" in str(caught.value)
    assert caught.value.hint
