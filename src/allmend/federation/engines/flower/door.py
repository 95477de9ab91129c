"""The coordinator's door: the one socket that members reach, and what is let in through it.

Behind it are Flower's handlers of its Fleet API and its state of nodes, messages and objects, as a library: no other
of Flower's interfaces is opened. In front of them stand what Flower lacks: a limit to what an unknown sender can make
us read, signatures over the whole request, and that a member speaks for itself only.
"""

import ipaddress
import itertools
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from flwr.proto import fleet_pb2
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.protobuf.routing import ProtobufRoute
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_DEPENDENCY, ProtobufTranslationMiddleware
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.servicer.fleet import fleet_handlers
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from allmend.errors import UserError
from allmend.federation.engines.flower.signing import Gate, SignatureError

LARGEST_REQUEST = 8 * 2**20
"""Bytes; Flower cuts what it sends into objects of 5 MiB."""

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)


@dataclass
class _Guard:
    """Reads a request only as far as its headers earn it, and passes on signed ones alone."""

    app: App
    gate: Gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self.gate.claimed(headers)
            body = await _read(receive)
            if body is None:
                await _refuse(send, 413, f"a request has at most {LARGEST_REQUEST} bytes")
                return
            scope["member"] = self.gate.check(headers, scope["method"], scope["path"], body)
        except SignatureError as error:
            _log.warning("refused a request from %s: %s", (scope.get("client") or ("?",))[0], error)
            await _refuse(send, 401, str(error))
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> MutableMapping[str, Any]:
            return next(given, None) or await receive()

        await self.app(scope, again, send)


async def _read(receive: Receive) -> bytes | None:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_REQUEST:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


async def _refuse(send: Send, status: int, why: str) -> None:
    body = json.dumps({"detail": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


State = Annotated[LinkState, Depends(get_linkstate)]


def _own(request: Request, state: State) -> None:
    """Refuse a request that speaks for another member's node."""
    asked = request.state.protobuf_request
    key = request.app.state.gate.members[request.scope["member"]]
    if isinstance(asked, fleet_pb2.ActivateNodeRequest):
        fits = asked.public_key == key
    else:
        node = asked.node.node_id if hasattr(asked, "node") else asked.node_id
        fits = state.get_node_id_by_public_key(key) == node
        if isinstance(asked, fleet_pb2.PushMessagesRequest):
            fits = fits and _one_letter_of(node, asked)
    if not fits:
        raise HTTPException(403, "a member speaks for itself")
    if isinstance(asked, fleet_pb2.PushMessagesRequest):
        most = request.app.state.most_objects()
        if next(itertools.islice(iterate_object_tree(asked.message_object_trees[0]), most, None), None) is not None:
            _log.warning("refused an answer of %s: more than %d objects", request.scope["member"], most)
            raise HTTPException(403, f"an answer to what was asked has at most {most} objects")


def _one_letter_of(node: int, asked: Any) -> bool:
    if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
        return False
    return bool(asked.messages_list[0].metadata.src_node_id == node)


def _activate(request: Any, state: LinkState) -> Any:
    """A member that begins anew is there at once: its signature says that it is the same, and Flower would wait for the
    old one's heartbeats to fail."""
    node = state.get_node_id_by_public_key(request.public_key)
    if node is not None:
        state.deactivate_node(node)
    return fleet_handlers.activate_node(request, state)


def _with_store(handler: Callable[..., Any]) -> Callable[[Any, LinkState], Any]:
    return lambda request, state: handler(request, state, state.object_store)


_HANDLERS: Mapping[str, Callable[[Any, LinkState], Any]] = {
    "/activate-node": _activate,
    "/deactivate-node": fleet_handlers.deactivate_node,
    "/send-node-heartbeat": fleet_handlers.send_node_heartbeat,
    "/pull-messages": _with_store(fleet_handlers.pull_messages),
    "/push-messages": fleet_handlers.push_messages,
    "/push-object": fleet_handlers.push_object,
    "/pull-object": fleet_handlers.pull_object,
    "/confirm-message-received": _with_store(fleet_handlers.confirm_message_received),
}
"""What a member needs of Flower's Fleet API; the paths are Flower's."""


def _route(handler: Callable[[Any, LinkState], Any]) -> Callable[[Any, LinkState], Any]:
    def call(request: Annotated[Any, PROTOBUF_REQUEST_DEPENDENCY], state: State) -> Any:
        return handler(request, state)

    return call


def _app(links: LinkStateFactory, gate: Gate, most_objects: Callable[[], int]) -> FastAPI:
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[  # the first is the outermost
            Middleware(_Guard, gate=gate),
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
        ],
    )
    app.state.linkstate_factory, app.state.gate, app.state.most_objects = links, gate, most_objects
    routes = APIRouter(prefix="/v1/fleet", route_class=ProtobufRoute, dependencies=[Depends(_own)])
    for path, handler in _HANDLERS.items():
        routes.add_api_route(path, _route(handler), methods=["POST"], response_model=None)
    app.include_router(routes)
    return app


@dataclass(frozen=True)
class Listen:
    """Where members reach the coordinator.

    Attributes:
        host, port: of the socket; port 0 takes a free one.
        certificate, key: of the server; both None for plain HTTP, on this machine's own addresses only.
    """

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


class Door:
    """A server in a thread of its own, until `close`.

    Args:
        links: Flower's state.
        gate: knows the members.
        listen: where.
        most_objects: of an answer, as large as one may now be.

    Raises:
        UserError: the address is taken or not this machine's, a certificate cannot be read, or the door would be open
            without TLS to others.
    """

    def __init__(self, links: LinkStateFactory, gate: Gate, listen: Listen, most_objects: Callable[[], int]) -> None:
        if (listen.certificate is None) != (listen.key is None):
            raise UserError("a certificate needs its key", where="--cert, --key")
        if listen.certificate is None and not _is_loopback(listen.host):
            raise UserError(
                f"without TLS the door stays shut to other machines, and {listen.host} is reached from there",
                where="--listen",
                hint="`allmend pki init` makes certificates.",
            )
        config = uvicorn.Config(
            _app(links, gate, most_objects),
            host=listen.host,
            port=listen.port,
            ssl_certfile=listen.certificate,
            ssl_keyfile=listen.key,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=60,
            limit_concurrency=1000,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise UserError(
                f"the certificate cannot be used: {error.strerror or error}",
                where=listen.certificate,
                hint="`allmend pki init` makes one; --pki names its folder.",
            ) from error
        self._server = uvicorn.Server(config)
        try:
            bound = config.bind_socket()
        except SystemExit:
            raise _taken(listen.host, listen.port) from None
        self.port: int = bound.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, args=([bound],), name="door", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)

    def close(self) -> None:
        """Stop listening."""
        self._server.should_exit = True
        self._thread.join(10)


def check_free(host: str, port: int) -> None:
    """Raise unless this machine can listen there.

    Raises:
        UserError: it cannot.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError:
            raise _taken(host, port) from None


def _taken(host: str, port: int) -> UserError:
    return UserError(
        f"cannot listen on {host}:{port}: it is taken, or not this machine's",
        where="--listen",
        hint="Stop what has it, or choose another port.",
    )


def address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`.

    Raises:
        UserError: it is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) < 2**16:
        raise UserError(f"{text!r} is not HOST:PORT", where="--listen", hint="For example 0.0.0.0:8443.")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
