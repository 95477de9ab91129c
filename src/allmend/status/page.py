"""A page on this machine that shows a run while it goes on: its report, made anew at each visit, and its metrics.

It listens on the machine's own address alone, answers GET for two paths, and only reads the run's folder.
"""

import threading
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from allmend.errors import UserError
from allmend.report.evidence import read_evidence
from allmend.report.page import page
from allmend.run import RunFolder
from allmend.status.metrics import exposition
from allmend.status.standing import standing

HOST = "127.0.0.1"
NAMES = frozenset((HOST, "localhost"))
"""Names that the page is asked for by. Any other is another site's, which a browser was led to believe is here."""

REFRESH = 10
"""Seconds after which a browser asks again while the run goes on."""


class StatusPage:
    """Serves a run's page until it is closed; use it as a context.

    Args:
        run: its folder.
        port: to listen on; 0 for a free one.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, run: Path, port: int = 0) -> None:
        folder = run

        class Handler(_Handler):
            run = folder

        try:
            self._server = ThreadingHTTPServer((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot listen on port {port}: {why}", where="--page", hint="Choose another port, or 0 for a free one."
            ) from error
        self._server.daemon_threads = True
        serve = partial(self._server.serve_forever, poll_interval=0.05)
        threading.Thread(target=serve, name="status page", daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}/"

    def __enter__(self) -> "StatusPage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    run: Path
    server_version = "allmend"
    sys_version = ""
    timeout = 30  # of a connection on which nothing comes

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in NAMES:
            self._send(HTTPStatus.FORBIDDEN, b"This page is asked for by the name localhost.\n")
            return
        try:
            match self.path:
                case "/":
                    running = standing(RunFolder.open(self.run)).state == "running"
                    self._send(HTTPStatus.OK, page(read_evidence(self.run)).encode(), "text/html", refresh=running)
                case "/metrics":
                    self._send(HTTPStatus.OK, exposition(standing(RunFolder.open(self.run))))
                case _:
                    self._send(HTTPStatus.NOT_FOUND, b"There are / and /metrics.\n")
        except UserError as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())

    def _send(self, status: HTTPStatus, body: bytes, kind: str = "text/plain", *, refresh: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if refresh:
            self.send_header("Refresh", str(REFRESH))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal shows the table."""
