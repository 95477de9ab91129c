"""A network that is cut, a member that freezes, a clock that is wrong, a door that is taken, and letters of 1 GB."""

import http.client
import re
import signal
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.consortium.processes import Federation, Wire

from allmend.federation.engines.flower.signing import sign_request
from allmend.federation.keys import read_key

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

MakeFederation = Callable[..., Federation]
GIGABYTE = 2**30


def test_a_network_that_is_cut_for_half_a_minute(make_federation: MakeFederation, tell: Callable[..., None]) -> None:
    it = make_federation(rounds=8)
    wire = Wire(it.port)
    it.coordinate(fewest=3)
    it.join("east")
    for name in ("north", "south"):
        it.join(name, address=wire.address)
    it.machine.until("coordinator", "round 2:")
    wire.cut()
    time.sleep(30)
    wire.mend()
    assert it.machine.all_done() == 0
    wire.close()
    assert it.outcome == it.simulated()
    seen = it.machine.said("coordinator", r"waiting for .*away: .*"), it.machine.said("north", r"waiting: .*")
    tell("network of two members cut for 30 s", "the round waited for them; the same adapter", *seen)


def test_a_member_that_freezes_past_the_deadline(make_federation: MakeFederation, tell: Callable[..., None]) -> None:
    it = make_federation(rounds=6)
    it.coordinate(fewest=2, answer_within=8)
    for name in it.names:
        it.join(name)
    it.machine.until("coordinator", "round 2:")
    it.machine.kill("north", signal.SIGSTOP)
    it.machine.until("coordinator", "client 'north' did not answer")
    it.machine.kill("north", signal.SIGCONT)
    assert it.machine.all_done() == 0
    missed = [int(n) for n in re.findall(r"'north' did not answer in round (\d+)", it.machine.log("coordinator"))]
    assert it.outcome == it.simulated({round: ["north"] for round in missed})
    said = it.machine.said("coordinator", r"client 'north' did not answer[^\n]*")
    tell(
        "a member frozen (`SIGSTOP`) past the deadline",
        "the round went on without it; the adapter of a run in which it was not sampled then",
        said,
    )


@pytest.mark.parametrize("seconds", [86400.0, -86400.0], ids=["fast", "slow"])
def test_a_clock_that_is_a_day_off(seconds: float, make_federation: MakeFederation, tell: Callable[..., None]) -> None:
    it = make_federation(rounds=3)
    it.coordinate(fewest=3)
    it.join("east")
    it.join("south")
    it.join("north", faults=[{"kind": "clock", "seconds": seconds}])
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated()
    tell(
        f"a member's clock a day {'fast' if seconds > 0 else 'slow'}",
        "it learnt the coordinator's time from its answers; the same adapter",
    )


def test_a_port_that_is_taken(make_federation: MakeFederation, tell: Callable[..., None]) -> None:
    it = make_federation()
    with socket.create_server(("127.0.0.1", it.port)):
        it.coordinate()
        assert it.machine.done("coordinator") == 2
    said = it.machine.said("coordinator", r"cannot listen on .*")
    it.coordinate(fewest=3)
    for name in it.names:
        it.join(name)
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated()
    tell("the coordinator's port is taken", "exit code 2; free again, the same command began; the same adapter", said)


def memory(it: Federation) -> int:
    """The largest memory of the coordinator so far, in bytes."""
    text = Path(f"/proc/{it.machine.running['coordinator'].pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found
    return 1024 * int(found[1])


def send(it: Federation, headers: dict[str, str], size: int) -> int:
    """POST so many bytes as a member may, and give the status of the answer."""
    context = ssl.create_default_context(cafile=it.folder / "pki/ca.pem")
    connection = http.client.HTTPSConnection("127.0.0.1", it.port, context=context, timeout=60)
    connection.putrequest("POST", "/v1/fleet/push-messages", skip_accept_encoding=True)
    for name, value in (headers | {"Content-Length": str(size)}).items():
        connection.putheader(name, value)
    connection.endheaders()
    block = bytes(2**20)
    try:
        for _ in range(size // len(block)):
            connection.send(block)
    except OSError:  # it has closed the door, which is as well
        pass
    try:
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_letters_of_a_gigabyte(make_federation: MakeFederation, tell: Callable[..., None]) -> None:
    it = make_federation(rounds=4)
    it.coordinate(fewest=2, answer_within=20)
    it.machine.until("coordinator", "Offer ")
    before = memory(it)
    assert send(it, {}, GIGABYTE) in (0, 401)
    signature = sign_request(read_key(it.folder / "north.key"), "POST", "/v1/fleet/push-messages", b"", now=time.time())
    assert send(it, signature, GIGABYTE) in (0, 401, 413)
    risen = memory(it) - before
    assert risen < 100 * 2**20
    it.join("east")
    it.join("south")
    it.join("north", faults=[{"kind": "swell", "round": 2, "size": GIGABYTE}])
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated({2: ["north"]})
    said = it.machine.said("coordinator", r"client 'north' did not answer in round 2.*")
    disk = sum(path.stat().st_size for path in it.folder.glob("run/post.db*"))
    assert disk < 200 * 2**20
    tell(
        "a request of 1 GB, by a stranger and with a member's headers",
        f"refused while it came; the coordinator's memory rose by {risen >> 20} MB",
    )
    tell("an answer of 1 GB by a member", "refused at the door; the round went on without it", said)
