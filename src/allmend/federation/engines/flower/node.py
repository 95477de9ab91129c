"""A member's side of the wire: it asks for letters and answers them. It opens no socket of its own."""

import contextlib
import email.utils
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2
from flwr.supernode.fleet_http_client import FleetHttpClient

from allmend.errors import UserError
from allmend.federation.engines.flower import letters
from allmend.federation.engines.flower.signing import sign_request

HEARTBEAT = 10.0
"""Seconds, the least that Flower takes: after two without one a member counts as absent."""

UNKNOWN_HOST = ("Name or service not known", "nodename nor servname", "No address associated")

T = TypeVar("T")


@dataclass
class _Signer:
    """Signs each request by the coordinator's clock, which it learns from the answers."""

    key: Ed25519PrivateKey
    offset: float = 0.0

    @property
    def now(self) -> float:
        return time.time() + self.offset

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        request = context.request
        signature = sign_request(self.key, request.method, request.url.path, request.content, now=self.now)
        request.headers.update(signature)
        response = call_next(context)
        if date := response.headers.get("date"):
            with contextlib.suppress(ValueError, TypeError):
                skew = email.utils.parsedate_to_datetime(date).timestamp() - time.time()
                self.offset = skew if abs(skew) > 2 else 0.0  # the header has whole seconds
        return response


@dataclass(frozen=True)
class Letter:
    """What the coordinator has sent, and what an answer needs to know of it."""

    id: str
    run: int
    data: bytes
    expires: float


@dataclass
class Node:
    """A member's connection, kept through the coordinator's restarts.

    Args:
        address: `host:port`.
        key: the member's.
        ca: certificate of the coordinator's authority; None for plain HTTP on this machine.
        patience: seconds of silence after which it gives up.
    """

    address: str
    key: Ed25519PrivateKey
    ca: Path | None
    patience: float = float("inf")
    on_wait: Callable[[str], None] = lambda why: None
    _signer: _Signer = field(init=False)
    _client: FleetHttpClient = field(init=False)
    _node: Any = field(init=False, default=None)
    _closed: threading.Event = field(init=False, default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._signer = _Signer(self.key)
        verify: ssl.SSLContext | bool = False
        if self.ca is not None:
            try:
                verify = ssl.create_default_context(cafile=self.ca)
            except OSError as error:
                raise UserError(f"the certificate cannot be read: {error}", where=self.ca) from error
        scheme = "http" if self.ca is None else "https"
        self._client = FleetHttpClient(f"{scheme}://{self.address}", interceptors=[self._signer], verify=verify)

    def connect(self) -> None:
        """Make this member known as present, and keep it so.

        Raises:
            UserError: the coordinator refuses, or is not who it should be.
        """
        self._activate()
        threading.Thread(target=self._heartbeats, name="heartbeat", daemon=True).start()

    def receive(self, *, poll: float = 0.5) -> Iterator[Letter]:
        """Letters as they come, without end.

        Args:
            poll: seconds between questions while there is none.
        """
        while not self._closed.is_set():
            ask = fleet_pb2.PullMessagesRequest(node=self._node)
            found = self._try(lambda: self._client.PullMessages(ask), gone=None)  # noqa: B023
            if found is None:  # another run behind the same door: it knows this member by another number
                self._closed.wait(poll)
                self._activate()
                continue
            if not found.messages_list:
                self._closed.wait(poll)
                continue
            message, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
            run, id = message.metadata.run_id, message.metadata.message_id
            objects = {part: self._pull(run, part) for part in letters.ids_of(tree)}
            if any(part is None for part in objects.values()):
                continue  # the coordinator has begun anew, and will send again
            request = message_pb2.ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=id)
            self._try(lambda: self._client.ConfirmMessageReceived(request), gone=None)  # noqa: B023
            data = letters.read(id, {part: value for part, value in objects.items() if value is not None})
            yield Letter(id, run, data, message.metadata.created_at + message.metadata.ttl)

    def answer(self, letter: Letter, data: bytes) -> bool:
        """Send an answer; False where nobody waits for it any more."""
        now = self._signer.now
        written = letters.write(
            data,
            run=letter.run,
            source=self._node.node_id,
            target=SUPERLINK_NODE_ID,
            now=now,
            ttl=max(1.0, letter.expires - now - 60),
            reply_to=letter.id,
        )
        request = fleet_pb2.PushMessagesRequest(
            node=self._node, messages_list=[message_to_proto(written.envelope)], message_object_trees=[written.tree]
        )
        while True:
            taken = self._try(lambda: self._client.PushMessages(request), gone=None)
            if taken is None:
                return False
            stored = True
            for part in taken.objects_to_push:
                push = message_pb2.PushObjectRequest(
                    node=self._node,
                    run_id=letter.run,
                    session_id=taken.session_id,
                    object_id=part,
                    object_content=written.objects[part],
                )
                done = self._try(lambda: self._client.PushObject(push), gone=None)  # noqa: B023
                if done is None:
                    return False
                stored = stored and done.stored
            if stored:
                return True

    def close(self) -> None:
        """Leave; the coordinator knows at once."""
        self._closed.set()
        with contextlib.suppress(httpx.HTTPError, ValueError):
            if self._node is not None:
                self._client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    def _activate(self) -> None:
        request = fleet_pb2.ActivateNodeRequest(
            public_key=self.key.public_key().public_bytes_raw(), heartbeat_interval=HEARTBEAT
        )
        found = self._try(lambda: self._client.ActivateNode(request), busy=True)
        self._node = node_pb2.Node(node_id=found.node_id)

    def _heartbeats(self) -> None:
        while not self._closed.wait(HEARTBEAT * 0.8):
            request = heartbeat_pb2.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)
            with contextlib.suppress(httpx.HTTPError, ValueError):
                self._client.SendNodeHeartbeat(request)

    def _pull(self, run: int, part: str) -> bytes | None:
        request = message_pb2.PullObjectRequest(node=self._node, run_id=run, object_id=part)
        while True:
            found = self._try(lambda: self._client.PullObject(request), gone=None)
            if found is None or not found.object_found:
                return None
            if found.object_available:
                return bytes(found.object_content)
            time.sleep(0.2)

    def _try(self, call: Callable[[], T], *, gone: Any = ..., busy: bool = False) -> Any:
        """Call until the coordinator answers.

        Args:
            call: what to do.
            gone: what to return where the coordinator has begun a new run; raise when not given.
            busy: whether a refusal because the member still counts as present is a reason to wait.
        """
        began, wait, clock = time.monotonic(), 0.2, False
        while True:
            try:
                return call()
            except httpx.HTTPStatusError as error:
                status, detail = error.response.status_code, error.response.text
                if status == 401 and '"clock"' in detail and not clock:
                    clock = True  # the answer has told the coordinator's time
                    continue
                if status == 401:
                    raise UserError(
                        f"the coordinator does not know this member: {_detail(error.response)}",
                        where=self.address,
                        hint="Give the coordinator the line that `allmend member key --public FILE` prints.",
                    ) from None
                if status == 403 and gone is not ...:
                    return gone
                if status < 500 and not (busy and status == 412) and status != 413:
                    raise
                why = f"the coordinator answers {status}"
            except httpx.ConnectError as error:
                self._explain(str(error))
                why = f"the coordinator cannot be reached: {error}"
            except (httpx.TransportError, ValueError) as error:
                self._explain(str(error))
                why = f"the connection was cut: {error}"
            if time.monotonic() - began > self.patience:
                raise UserError(why, where=self.address, hint="Try again later.") from None
            self.on_wait(why)
            self._closed.wait(wait)
            if self._closed.is_set():
                raise UserError("the connection was closed", where=self.address)
            wait = min(5.0, 2 * wait)

    def _explain(self, error: str) -> None:
        """Raise where waiting would mend nothing."""
        what, hint = "", ""
        if "certificate verify failed" in error.replace("_", " ").lower():
            what = f"the coordinator's certificate is not to be trusted: {error}"
            hint = "Ask the coordinator for its ca.pem."
            if "mismatch" in error or "not valid for" in error:
                hint = "Use a name that its certificate has; `allmend pki renew NAME` at the coordinator adds one."
        elif self._node is None and "WRONG_VERSION_NUMBER" in error:
            what, hint = (
                "this door speaks plain HTTP, and no TLS",
                "Look at the port; with --insecure there, join so too.",
            )
        elif self._node is None and self.ca is None and "disconnected without sending" in error:
            what, hint = "this door does not speak plain HTTP", "Leave out --insecure, and name its ca.pem with --ca."
        elif self._node is None and any(words in error for words in UNKNOWN_HOST):
            what, hint = f"no machine of this name is known here: {error}", "Look at the address, and at the network."
        if what:
            raise UserError(what, where=self.address, hint=hint) from None


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
