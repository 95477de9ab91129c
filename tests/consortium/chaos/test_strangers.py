"""Whoever should not be in a run is told so, at once and in one message; and the run is as if nobody had tried."""

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from tests.consortium.processes import Federation, Machine

from allmend.federation import pki

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Federation]:
    """A coordinator that waits for its members."""
    machine = Machine(tmp_path_factory.mktemp("strangers"))
    made = Federation(machine, tiny_folder)
    made.coordinate(fewest=3)
    made.machine.until("coordinator", "Offer ")
    yield made
    machine.close()


def refused(it: Federation, process: str, pattern: str) -> str:
    assert it.machine.done(process) == 2, it.machine.log(process)
    del it.machine.running[process]
    return it.machine.said(process, pattern)


def test_an_authority_that_is_not_the_coordinators(it: Federation, tell: Callable[..., None]) -> None:
    pki.make_pki(it.folder / "foreign", [], days=2)
    it.join("east", process="fooled", ca="foreign/ca.pem")
    said = refused(it, "fooled", r"the coordinator's certificate is not to be trusted.*")
    tell("a member with another authority's `ca.pem`", "exit code 2 at the member; nothing was sent", said)


def test_a_key_that_is_not_registered(it: Federation, tell: Callable[..., None]) -> None:
    it.key("stranger")
    it.join("east", process="stranger", key="stranger.key")
    said = refused(it, "stranger", r"the coordinator does not know this member.*")
    tell("a key that is not registered", "exit code 2 at the stranger; the coordinator read nothing of it", said)


def test_a_name_that_is_another_members(it: Federation, tell: Callable[..., None]) -> None:
    it.join("east", process="thief", key="south.key")
    said = refused(it, "thief", r"the coordinator has another key for this member.*")
    tell("a registered member under another's name", "exit code 2 at the member; it joined nothing", said)


def test_another_version(it: Federation, tell: Callable[..., None]) -> None:
    it.join("south", process="old", faults=[{"kind": "version", "number": "0.0.1"}])
    said = refused(it, "old", r"the coordinator has allmend .*")
    tell("a member with an old version", "exit code 2 at the member, with both versions", said)


def test_the_run_is_as_if_nobody_had_tried(it: Federation) -> None:
    for name in it.names:
        it.join(name)
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated()


@pytest.mark.parametrize("wrong", ["expired", "of another name"])
def test_a_certificate_that_does_not_hold(
    wrong: str, make_federation: Callable[..., Federation], tell: Callable[..., None]
) -> None:
    it = make_federation()
    with mock.patch.object(pki, "LOCAL", () if wrong == "of another name" else pki.LOCAL):
        if wrong == "expired":
            long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=30)
            with mock.patch.object(pki, "_validity", return_value=(long_ago, long_ago + datetime.timedelta(days=1))):
                pki.renew_server(it.folder / "pki", [], days=1)
        else:
            pki.renew_server(it.folder / "pki", ["elsewhere.example"], days=1)
    it.coordinate(fewest=3)
    it.join("east")
    said = refused(it, "east", r"the coordinator's certificate is not to be trusted.*")
    it.machine.kill("coordinator")
    pki.renew_server(it.folder / "pki", [], days=2)
    it.machine.again("coordinator")
    for name in it.names:
        it.join(name)
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated()
    tell(f"the coordinator's certificate is {wrong}", "exit code 2 at the member; `allmend pki renew` mended it", said)
