"""Real processes over TLS: runs and influence end where simulations do, whoever is killed on the way."""

import re
from collections.abc import Callable

import pytest
from tests.consortium.processes import NAMES, Federation, adapter

from allmend.attribution.runs import attribute_run
from allmend.results import InfluenceByMember
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


def test_members_of_a_run_that_has_ended_come_back_for_influence(make_federation: Callable[..., Federation]) -> None:
    it = make_federation(rounds=1)
    it.coordinate(fewest=3)
    for name in NAMES:
        it.join(name)
    assert it.machine.done("coordinator") == 0, it.machine.log("coordinator")
    for name in NAMES:
        it.machine.done(name)
    words = ("--members", "members.toml", "--listen", it.address, "--min-records", "2", "--reveal", "client_sums")
    it.machine.start("asking", "attribute", "run", *words)
    it.machine.until("asking", "Offer ")
    digest = re.findall(r"Offer\s+([0-9a-f]{64})", it.machine.log("asking"))[-1]
    for name in NAMES:
        given = ("--ca", "pki/ca.pem", "--key", f"{name}.key", "--data", f"{name}.jsonl", "--name", name)
        it.machine.start(f"{name}-again", "join", it.address, *given, "--accept", digest)
    assert it.machine.done("asking") == 0, it.machine.log("asking")
    assert [it.machine.done(f"{name}-again") for name in NAMES] == [0, 0, 0]
    told = it.machine.log("asking")
    assert "Whose data helped fedavg" in told
    assert "Sums were formed behind masks" in told
    table = RunFolder.open(it.folder / "run").read_table("influence", InfluenceByMember)
    assert table is not None
    it.simulated()
    simulated = attribute_run(it.folder / "simulated", changes={"min_records": 2, "reveal": "client_sums"})
    for one, other in zip(table.arms[0].members, simulated.arms[0].members, strict=True):
        assert (one.client, one.mean.n) == (other.client, other.mean.n)
        assert one.mean.value == pytest.approx(other.mean.value, rel=1e-4)
    for name in NAMES:
        assert "Scores  " in it.machine.log(f"{name}-again")
        assert list((it.folder / f"allmend-{name}").glob("runs/*/arms/fedavg/influence/influence.parquet"))
