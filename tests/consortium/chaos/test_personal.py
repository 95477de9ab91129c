"""`kill -9` where members have models of their own: each ends with the one that a simulation gives it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.consortium.chaos.test_deaths import SECURE, SITE, MakeFederation, faults
from tests.consortium.processes import Federation

from allmend.life import tune
from allmend.recipe import load_recipe
from allmend.run import RunFolder

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(500)]

COBO = "allmend.federation.strategies.cobo:CoBo"
COMIGS = "allmend.federation.strategies.comigs:CoMiGS"
CLUSTERED = "allmend.federation.strategies.clustered:Clustered"
CLIENT = "allmend.federation.member:MemberClient"

KINDS: dict[str, dict[str, Any]] = {
    "cobo": {"strategy": 'name = "cobo"\npairs_per_member = 3.0\nrho = 0.3', "more": ""},
    "cobo with neighbours": {
        "strategy": 'name = "cobo"\npairs_per_member = 3.0\nneighbours = 1\ncommon_rounds = 0.4',
        "more": "",
    },
    "clustered behind masks": {"strategy": 'name = "clustered"\ncommon_rounds = 0.4', "more": SECURE},
    "comigs behind masks": {
        "strategy": 'name = "comigs"\nrouter_every = 2\nrouter_steps = 1',
        "adapter": 'kind = "mixture"\nrank = 2',
        "more": SECURE,
    },
}
MEMBER = {
    "cobo": {
        "while it takes a gradient at a midpoint": {"at": f"{CLIENT}.gradient", "call": 2},
        "when its answer is on its disk, before it has left": {"at": SITE, "when": "after", "call": 4},
    },
    "cobo with neighbours": {"while it takes its first gradient": {"at": f"{CLIENT}.gradient"}},
    "clustered behind masks": {"while it sketches its second half": {"at": f"{CLIENT}.gradient", "call": 2}},
    "comigs behind masks": {
        "when experts and routers have learnt": {"at": f"{CLIENT}.alternate", "when": "after", "call": 2},
        "while it takes the generalists back": {"at": f"{COMIGS}.work", "call": 2},
    },
}
COORDINATOR = {
    "cobo": {
        "when models are pulled, before pairs are compared": {"at": f"{COBO}.combine", "when": "after", "call": 3},
        "before products move the graph": {"at": f"{COBO}._probed", "call": 2},
    },
    "cobo with neighbours": {"while neighbours are found": {"at": f"{COBO}._with_newcomers", "call": 1}},
    "clustered behind masks": {"while groups are found": {"at": f"{CLUSTERED}._grouped", "when": "after"}},
    "comigs behind masks": {"before generalists are averaged": {"at": f"{COMIGS}.combine", "call": 3}},
}


def own(folder: Path) -> dict[str, bytes]:
    """The files of a member's model."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors") if "checkpoint" not in path.name}


def ended_alike(it: Federation, count: int) -> None:
    """All deaths came, and each member has the model that a simulation gives it, as has the coordinator its graph."""
    assert it.machine.all_done() == count, it.machine.log("coordinator")
    assert [process.returncode for process in it.machine.running.values()] == [0] * len(it.machine.running)
    run = RunFolder.open(it.folder / "run")
    simulated = tune(load_recipe(it.folder / "recipe.toml"), it.folder / "simulated", base=it.folder)
    arm = load_recipe(it.folder / "recipe.toml").strategy.name
    for name in it.names:
        (folder,) = (it.folder / f"allmend-{name}").glob(f"runs/*/arms/{arm}")
        kind = "mixture" if arm == "comigs" else "adapter"
        found = own(folder / kind)
        assert found
        assert found == own(simulated.arm(arm) / "members" / name / kind), name
    table = "results/collaborators.json"
    if (simulated.path / table).exists():
        assert (run.path / table).read_bytes() == (simulated.path / table).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_member_and_of_the_coordinator(
    kind: str, make_federation: MakeFederation, tell: Callable[..., None]
) -> None:
    it = make_federation(rounds=4, **KINDS[kind])
    it.coordinate(fewest=3, faults=faults(it.folder, COORDINATOR[kind]))
    it.join("east")
    it.join("south")
    it.join("north", faults=faults(it.folder, MEMBER[kind]))
    deaths = MEMBER[kind] | COORDINATOR[kind]
    ended_alike(it, len(deaths))
    assert {path.stem for path in it.folder.glob("*.died")} == set(deaths)
    for of, words in (("a member", MEMBER), ("the coordinator", COORDINATOR)):
        for death in words[kind]:
            seen = "Resuming tiny" if of == "the coordinator" else "Going on with the run that was agreed to."
            tell(f"`kill -9` of {of}, {kind}, {death}", "the same command went on; the same personal models", seen)
