"""Real processes over TLS: the run ends where the simulation does, whoever is killed on the way."""

from collections.abc import Callable

import pytest
from tests.consortium.processes import NAMES, Federation, adapter

from allmend.run import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("more", ["", "[privacy.secure_aggregation]\n"], ids=["open", "secure"])
def test_processes_end_at_the_bits_of_the_simulation(more: str, make_federation: Callable[..., Federation]) -> None:
    it = make_federation(more=more)
    it.coordinate(fewest=3)
    for name in NAMES:
        it.join(name)
    assert it.machine.done("coordinator") == 0, it.machine.log("coordinator")
    assert [it.machine.done(name) for name in NAMES] == [0, 0, 0]
    run = RunFolder.open(it.folder / "run")
    assert adapter(run) == it.simulated()
    assert (run.path / "report.html").exists()
    assert run.path.stat().st_mode & 0o077 == 0
    assert (run.path / "post.db").stat().st_mode & 0o077 == 0


def test_who_is_killed_and_comes_back_changes_nothing(make_federation: Callable[..., Federation]) -> None:
    it = make_federation(rounds=8)
    it.coordinate(fewest=3)
    for name in NAMES:
        it.join(name)
    it.machine.until("coordinator", "round 2:")
    it.machine.kill("north")
    it.machine.again("north")
    it.machine.until("coordinator", "round 4:")
    it.machine.kill("coordinator")
    it.machine.again("coordinator")
    it.machine.until("coordinator", "round 6:")
    it.machine.kill("coordinator")
    it.machine.kill("south")
    it.machine.again("coordinator")
    it.machine.again("south")
    assert it.machine.done("coordinator") == 0, it.machine.log("coordinator")
    assert it.outcome == it.simulated()
