"""The page on this machine: the report as it is now, the metrics, and nothing for strangers."""

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.status.conftest import OFFERED, arm, done, started

from allmend.errors import UserError
from allmend.events import RunFinished
from allmend.status.page import HOST, StatusPage


@pytest.fixture
def served(begun: Any) -> Iterator[StatusPage]:
    begun.add(started("a"), arm(), done(1, "a"))
    with StatusPage(begun.folder.path) as page:
        yield page


def get(page: StatusPage, path: str = "/", *, host: str | None = None, method: str = "GET") -> tuple[int, str, Any]:
    where = page.address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(where, timeout=10)
    connection.request(method, path, headers={"Host": where if host is None else host})
    answer = connection.getresponse()
    try:
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def test_it_shows_the_report_as_it_is_now(begun: Any, served: StatusPage) -> None:
    status, body, headers = get(served)
    assert status == 200
    assert "joint" in body
    assert headers["Refresh"] is None  # nobody works on it
    begun.add(done(2, "a", loss=1.234567))
    assert "1.23" not in body
    assert "1.23" in get(served)[1]
    assert not (begun.folder.path / "report.html").exists()  # it only reads


def test_it_asks_to_be_visited_again_while_the_run_goes_on(begun: Any, served: StatusPage) -> None:
    begun.work()
    assert get(served)[2]["Refresh"]
    begun.add(RunFinished(seconds=1.0))
    assert get(served)[2]["Refresh"] is None


def test_metrics_are_beside_it(served: StatusPage) -> None:
    status, body, headers = get(served, "/metrics")
    assert status == 200
    assert 'allmend_rounds_done{arm="fedavg"} 1.0' in body
    assert headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("path", ["/events.jsonl", "/../run.json", "/%2e%2e/run.json", "//etc/passwd", "/?x"])
def test_no_other_path_is_served(served: StatusPage, path: str) -> None:
    assert get(served, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(served: StatusPage, method: str) -> None:
    assert get(served, method=method)[0] == 501


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example:80"])
def test_another_site_that_claims_this_address_is_turned_away(served: StatusPage, host: str) -> None:
    """DNS rebinding: the browser believes that another site's name is this machine."""
    status, body, _ = get(served, host=host)
    assert status == 403
    assert "joint" not in body


def test_it_listens_on_this_machine_alone(served: StatusPage) -> None:
    assert served.address.startswith(f"http://{HOST}:")
    addresses = {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    port = int(served.address.rstrip("/").rpartition(":")[2])
    for address in addresses - {HOST}:
        if not address.startswith("127."):
            with pytest.raises(ConnectionRefusedError), socket.create_connection((address, port), timeout=2):
                pass


def test_a_broken_log_is_told_and_ends_nothing(begun: Any, served: StatusPage) -> None:
    begun.folder.events.write_bytes(b"not an event\n" * 2)
    status, body, _ = get(served)
    assert status == 503
    assert "event log" in body or "not an event" in body


def test_a_port_that_is_taken_is_told(begun: Any, served: StatusPage, tmp_path: Path) -> None:
    port = int(served.address.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=rf"cannot listen on port {port}"):
        StatusPage(begun.folder.path, port)
    with pytest.raises(UserError, match="cannot listen on port 70000"):
        StatusPage(begun.folder.path, 70000)


def test_a_run_that_goes_on_is_not_told_how_to_go_on(begun: Any, served: StatusPage) -> None:
    assert "allmend tune --resume" in get(served)[1]
    begun.work()
    body = get(served)[1]
    assert "This run goes on" in body
    assert "--resume" not in body


def test_a_run_among_organisations_goes_on_with_its_own_command(begun: Any, served: StatusPage) -> None:
    begun.add(started(), OFFERED)
    body = get(served)[1]
    assert "start it again with the same command" in body
    assert "--resume" not in body
