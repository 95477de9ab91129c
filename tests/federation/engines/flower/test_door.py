"""The door, the post behind it and a member's node in front of it, over real sockets of this machine."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.proto import fleet_pb2

from allmend.errors import UserError
from allmend.federation import pki
from allmend.federation.engines.flower import letters
from allmend.federation.engines.flower.door import LARGEST_REQUEST, Door, Listen, address, check_free
from allmend.federation.engines.flower.node import Letter, Node
from allmend.federation.engines.flower.post import Answered, Post
from allmend.federation.engines.flower.signing import Gate, sign_request

HOST = "127.0.0.1"
LARGEST = 1_000_000
KEYS = {name: Ed25519PrivateKey.from_private_bytes(name.encode() * 32) for name in "ab"}
FLEET = "/v1/fleet/pull-messages"


@dataclass
class Coordinator:
    post: Post
    door: Door
    host: str

    @property
    def address(self) -> str:
        return f"{self.host}:{self.door.port}"

    def ask(self, member: str, data: bytes, *, seconds: float = 20.0) -> bytes | None:
        """A question and its answer; None where none can be read in time."""
        letter = self.post.send(member, data)
        assert letter is not None
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for answer in self.post.answers({letter: member}):
                assert isinstance(answer, Answered)
                return answer.data
            time.sleep(0.02)
        return None


@contextlib.contextmanager
def coordinator(folder: Path, *, tls: Path | None = None, host: str = HOST, port: int = 0) -> Iterator[Coordinator]:
    public = {name: key.public_key().public_bytes_raw() for name, key in KEYS.items()}
    post = Post(folder / "database", public)
    post.expect(LARGEST)
    files = {"certificate": pki.Files(tls).server, "key": pki.Files(tls).server_key} if tls else {}
    try:
        door = Door(post.links, Gate(public), Listen(host, port, **files), post.most_objects)
        try:
            yield Coordinator(post, door, host)
        finally:
            door.close()
    finally:
        post.close()


@contextlib.contextmanager
def member(
    at: str,
    name: str = "a",
    *,
    answer: Callable[[bytes], bytes] = lambda question: question[::-1],
    ca: Path | None = None,
    clock: float = 0.0,
) -> Iterator[list[bool]]:
    """A member that answers until the end; what is yielded tells of each answer whether it was taken."""
    there = Node(at, KEYS[name], ca, patience=5.0)
    there._signer.offset = clock
    there.connect()
    taken: list[bool] = []

    def serve() -> None:
        with contextlib.suppress(UserError, RuntimeError):  # closed while it asks
            for letter in there.receive(poll=0.05):
                taken.append(there.answer(letter, answer(letter.data)))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        there.close()
        thread.join(5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_letters_and_answers_of_several_objects_over_tls(folder: Path) -> None:
    pki.make_pki(folder / "pki", [HOST], days=1)
    question = bytes(range(256)) * (letters.CHUNK // 128)  # two objects and the beginning of a third
    with coordinator(folder, tls=folder / "pki") as here:
        here.post.expect(2 * len(question))
        with member(here.address, ca=pki.Files(folder / "pki").ca):
            assert here.ask("a", question) == question[::-1]
            assert here.post.online().keys() == {"a"}
        assert here.post.online() == {}


def test_another_authority_is_not_trusted(folder: Path) -> None:
    pki.make_pki(folder / "pki", [HOST], days=1)
    pki.make_pki(folder / "other", [HOST], days=1)
    with (
        coordinator(folder, tls=folder / "pki") as here,
        pytest.raises(UserError, match="certificate is not to be trusted"),
        member(here.address, ca=pki.Files(folder / "other").ca),
    ):
        pass


def test_the_certificate_has_the_name_that_was_called(folder: Path) -> None:
    """Certificates name 127.0.0.1 whatever else they do, and not what else is this machine's."""
    pki.make_pki(folder / "pki", ["coordinator.example"], days=1)
    with (
        coordinator(folder, tls=folder / "pki", host="127.0.0.2") as here,
        pytest.raises(UserError, match="certificate is not to be trusted"),
        member(here.address, ca=pki.Files(folder / "pki").ca),
    ):
        pass


@pytest.mark.parametrize("clock", [86_400.0, -86_400.0])
def test_a_clock_that_is_a_day_off_does_no_harm(clock: float, folder: Path) -> None:
    with coordinator(folder) as here, member(here.address, clock=clock):
        assert here.ask("a", b"question") == b"noitseuq"


def test_a_key_that_is_not_registered_is_told_what_to_do(folder: Path) -> None:
    with coordinator(folder) as here:
        stranger = Node(here.address, Ed25519PrivateKey.generate(), None, patience=5.0)
        with pytest.raises(UserError, match="not registered") as error:
            stranger.connect()
        assert "allmend member key --public" in (error.value.hint or "")


def test_who_begins_anew_is_there_at_once(folder: Path) -> None:
    """The process before it has not said goodbye."""
    with coordinator(folder) as here:
        dead = Node(here.address, KEYS["a"], None, patience=5.0)
        dead._activate()
        with member(here.address):
            assert here.ask("a", b"question") == b"noitseuq"


def test_a_coordinator_that_begins_anew_finds_its_members_and_no_old_letter(folder: Path) -> None:
    with coordinator(folder) as here:
        port = here.door.port
        there = Node(here.address, KEYS["a"], None, patience=20.0)
        there.connect()
        assert here.post.send("a", b"before") is not None
        asked = next(iter(there.receive(poll=0.05)))
        assert asked.data == b"before"
    with coordinator(folder, port=port) as here:
        assert here.post.online().keys() == {"a"}
        assert not there.answer(asked, b"too late")
        there.close()
        with member(here.address):
            assert here.ask("a", b"after") == b"retfa"


def test_another_run_behind_the_same_door_finds_the_members_that_are_there(tmp_path: Path) -> None:
    """Its database has other numbers for them."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with coordinator(tmp_path / "one") as here:
        port = here.door.port
        there = Node(here.address, KEYS["b"], None, patience=20.0)
        thread = threading.Thread(target=answering, args=(there,), daemon=True)
        there.connect()
        thread.start()
        assert here.ask("b", b"before") == b"erofeb"
    with coordinator(tmp_path / "two", port=port) as here:
        while "b" not in here.post.online():
            time.sleep(0.05)
        assert here.ask("b", b"after") == b"retfa"
        there.close()
    thread.join(5)


def answering(there: Node) -> None:
    with contextlib.suppress(UserError, RuntimeError):  # closed while it asks
        for letter in there.receive(poll=0.05):
            there.answer(letter, letter.data[::-1])


@pytest.mark.parametrize(("tls", "words"), [(True, "no TLS"), (False, "not speak plain HTTP")])
def test_who_speaks_otherwise_than_the_door_is_told(tls: bool, words: str, folder: Path) -> None:
    pki.make_pki(folder / "pki", [HOST], days=1)
    with coordinator(folder, tls=None if tls else folder / "pki") as here:
        there = Node(here.address, KEYS["a"], pki.Files(folder / "pki").ca if tls else None, patience=20.0)
        with pytest.raises(UserError, match=words):
            there.connect()


def test_a_machine_that_nobody_knows_is_told_at_once() -> None:
    with pytest.raises(UserError, match="no machine of this name"):
        Node("nowhere.invalid:1", KEYS["a"], None, patience=20.0).connect()


def test_an_answer_of_more_objects_than_were_asked_for_does_not_come_in(folder: Path) -> None:
    chunks = letters.objects_of(LARGEST) + 1
    content = b"".join(bytes([number]) * letters.CHUNK for number in range(chunks))
    with coordinator(folder) as here, member(here.address, answer=lambda question: content) as taken:
        assert here.ask("a", b"question", seconds=3.0) is None
        assert taken == [False]
        stored = here.post.links.state().object_store
        assert len(stored) < chunks


def test_an_answer_that_grows_when_it_is_put_together_is_nobodys(folder: Path) -> None:
    """Twenty times the same five megabytes are a single object on the way."""
    with coordinator(folder) as here:
        here.post.expect(LARGEST)
        here.post.most_objects = lambda: 100  # type: ignore[method-assign]
        with member(here.address, answer=lambda question: bytes(20 * letters.CHUNK)):
            assert here.ask("a", b"question") is None


def test_a_member_speaks_for_itself_alone(folder: Path) -> None:
    with coordinator(folder) as here, member(here.address, "a"):
        other = Node(here.address, KEYS["b"], None, patience=5.0)
        other._activate()
        node_of_a = here.post._nodes["a"]
        other._node.node_id = node_of_a
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            other._client.PullMessages(fleet_pb2.PullMessagesRequest(node=other._node))
        letter = Letter("0" * 64, here.post._run, b"", time.time() + 60)
        assert not other.answer(letter, b"in the name of a")
        assert here.ask("a", b"question") == b"noitseuq"


def call(here: Coordinator, path: str = FLEET, *, method: str = "POST", body: bytes = b"", name: str = "a") -> Any:
    headers = {"content-type": "application/protobuf"} | sign_request(KEYS[name], method, path, body, now=time.time())
    return httpx.request(method, f"http://{here.address}{path}", headers=headers, content=body)


def test_a_body_has_an_end(folder: Path) -> None:
    with coordinator(folder) as here:
        assert call(here, body=bytes(LARGEST_REQUEST + 1)).status_code == 413
        assert call(here, body=bytes(LARGEST_REQUEST)).status_code not in (401, 413)


def test_a_stranger_is_answered_before_its_body_is_read(folder: Path) -> None:
    with coordinator(folder) as here, socket.create_connection((HOST, here.door.port), timeout=5) as line:
        line.sendall(f"POST {FLEET} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/v1/control/list-runs", "/v1/fleet/register-node"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_of_flower_is_open(path: str, method: str, folder: Path) -> None:
    with coordinator(folder) as here:
        assert call(here, path, method=method).status_code in (404, 405)


@pytest.mark.parametrize("body", [b"rubbish", b"\xff" * 1000, b"\x0a\xff\xff\xff\xff\x0f"])
def test_rubbish_of_a_member_is_refused_and_stops_nobody(body: bytes, folder: Path) -> None:
    with coordinator(folder) as here:
        for path in ("pull-messages", "push-messages", "push-object", "activate-node", "send-node-heartbeat"):
            assert 400 <= call(here, f"/v1/fleet/{path}", body=body, name="b").status_code < 500
        with member(here.address):
            assert here.ask("a", b"question") == b"noitseuq"


def test_without_tls_the_door_is_for_this_machine_alone(folder: Path) -> None:
    post = Post(folder / "database", {})
    with pytest.raises(UserError, match="without TLS the door stays shut"):
        Door(post.links, Gate({}), Listen("0.0.0.0", 0), post.most_objects)
    post.close()


def test_a_port_that_is_taken_is_named(folder: Path) -> None:
    with coordinator(folder) as here:
        with pytest.raises(UserError, match=rf"cannot listen on {HOST}:{here.door.port}"):
            check_free(HOST, here.door.port)
        with pytest.raises(UserError, match=rf"cannot listen on {HOST}:{here.door.port}"):
            Door(here.post.links, Gate({}), Listen(HOST, here.door.port), here.post.most_objects)
        with member(here.address):
            assert here.ask("a", b"question") == b"noitseuq"


def test_a_member_waits_no_longer_than_it_has_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind((HOST, 0))
        waits: list[str] = []
        there = Node(f"{HOST}:{nobody.getsockname()[1]}", KEYS["a"], None, patience=0.3, on_wait=waits.append)
        with pytest.raises(UserError, match="cannot be reached"):
            there.connect()
    assert waits


def test_the_database_is_its_owners_alone(folder: Path) -> None:
    Post(folder / "database", {}).close()
    assert (folder / "database").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("text", "found"), [("0.0.0.0:8443", ("0.0.0.0", 8443)), ("[::1]:1", ("::1", 1)), ("name:0", ("name", 0))]
)
def test_an_address(text: str, found: tuple[str, int]) -> None:
    assert address(text) == found


@pytest.mark.parametrize("text", ["", "8443", "host:", ":8443", "host:65536", "host:-1", "host:1x", "host:²"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UserError, match="not HOST:PORT"):
        address(text)
