"""`kill -9` of a member and of the coordinator in each phase: the same command goes on, and nothing is lost."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.consortium.processes import Federation

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(500)]

MakeFederation = Callable[..., Federation]

SITE = "allmend.federation.engines.flower.site:_Place.keep"
MEMBER = {
    "before it has agreed": {"at": "allmend.consortium.member:MemberSide._prepare", "when": "after"},
    "while it trains": {"at": "torch.optim:AdamW.step", "call": 3},
    "when it has trained, before its answer is on its disk": {"at": SITE},
    "when its answer is on its disk, before it has left": {"at": SITE, "when": "after", "call": 2},
    "while it sends its answer": {"at": "allmend.federation.engines.flower.letters:write", "when": "after", "call": 3},
    "while it scores a model": {"at": "allmend.consortium.member:MemberSide._scored"},
    "while it saves the shared model": {"at": "allmend.consortium.member:MemberSide._keep", "when": "after"},
}
HIDDEN = "allmend.federation.engines.flower.hidden:HiddenPart.answer"
MEMBER_IN_A_SUM = {
    f"in a secure sum, after its {words}": {"at": HIDDEN, "when": "after", "about": {"step": step, "round": round}}
    for round, (step, words) in enumerate(
        (("keys", "keys"), ("shares", "shares"), ("masked", "masked vector"), ("opened", "opened shares")), start=1
    )
}
COORDINATOR = {
    "while members join": {"at": "allmend.federation.engines.flower.post:Post.send", "when": "after"},
    "when some answers of a round have come": {
        "at": "allmend.federation.engines.flower.engine:FlowerEngine._read",
        "call": 2,
        "when": "after",
    },
    "while it combines answers": {"at": "allmend.federation.strategies.fedavg:FedAvg.combine", "call": 2},
    "before a checkpoint": {"at": "allmend.federation.checkpoint:Checkpoints.save", "call": 2},
    "after a checkpoint": {"at": "allmend.federation.checkpoint:Checkpoints.save", "call": 1, "when": "after"},
    "while members score a model": {"at": "allmend.consortium.coordinator:Moments.from_facts", "call": 2},
    "while it saves the model": {"at": "allmend.consortium.coordinator:save_outcomes", "when": "after"},
    "before the report": {"at": "allmend.session:write_report"},
}
SUM = "allmend.federation.privacy.secure_sum.coordinator:SecureSum.advance"
COORDINATOR_IN_A_SUM = {
    "in a secure sum, before masked vectors": {"at": SUM, "call": 2},
    "in a secure sum, when it is about to be opened": {
        "at": "allmend.federation.engines.flower.engine:FlowerEngine._begin",
        "when": "after",
        "call": 2,
    },
    "in a secure sum, when members have opened it": {"at": SUM, "call": 8},
    "when a secure sum is there, before it is used": {
        "at": "allmend.federation.engines.flower.engine:ask_sum",
        "when": "after",
        "call": 2,
    },
}
SECURE = "[privacy.secure_aggregation]\nfewest = 3\n"


def faults(folder: Path, deaths: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"kind": "die", "marker": str(folder / f"{words}.died"), **death} for words, death in deaths.items()]


def survived(
    it: Federation, who: str, deaths: dict[str, dict[str, Any]], tell: Callable[..., None], *seen: str
) -> None:
    """All deaths came, and the run came to what the simulation comes to."""
    assert it.machine.all_done() == len(deaths), it.machine.log("coordinator")
    assert {path.stem for path in it.folder.glob("*.died")} == set(deaths)
    assert [process.returncode for process in it.machine.running.values()] == [0] * len(it.machine.running)
    assert it.outcome == it.simulated()
    for words in deaths:
        tell(f"`kill -9` of {who} {words}", "the same command went on; the same adapter", *seen)


@pytest.mark.parametrize(("deaths", "more"), [(MEMBER, ""), (MEMBER_IN_A_SUM, SECURE)], ids=["plain", "secure"])
def test_of_a_member(
    deaths: dict[str, dict[str, Any]], more: str, make_federation: MakeFederation, tell: Callable[..., None]
) -> None:
    it = make_federation(rounds=5, more=more)
    it.coordinate(fewest=3)
    it.join("east")
    it.join("south")
    it.join("north", faults=faults(it.folder, deaths))
    survived(it, "a member", deaths, tell, "Going on with the run that was agreed to.")
    it.machine.said("north", "Going on with the run that was agreed to.")


@pytest.mark.parametrize(
    ("deaths", "more"), [(COORDINATOR, ""), (COORDINATOR_IN_A_SUM, SECURE)], ids=["plain", "secure"]
)
def test_of_the_coordinator(
    deaths: dict[str, dict[str, Any]], more: str, make_federation: MakeFederation, tell: Callable[..., None]
) -> None:
    it = make_federation(rounds=5, more=more)
    it.coordinate(fewest=3, faults=faults(it.folder, deaths))
    for name in it.names:
        it.join(name)
    survived(it, "the coordinator", deaths, tell, "Resuming tiny")
    it.machine.said("coordinator", "Resuming tiny")
    it.machine.said("east", r"waiting: the co.*")


def test_of_both(make_federation: MakeFederation, tell: Callable[..., None]) -> None:
    it = make_federation(rounds=6)
    it.coordinate(fewest=3)
    for name in it.names:
        it.join(name)
    it.machine.until("coordinator", "round 2:")
    everybody = list(it.machine.running)
    for name in everybody:
        it.machine.kill(name)
    for name in everybody:
        it.machine.again(name)
        time.sleep(0.1)
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated()
    said = it.machine.said("coordinator", r"\w+ \(\w+\): rounds [3-6] to 6")
    tell("`kill -9` of the coordinator and all members at once", "the same commands went on; the same adapter", said)
