"""The section on influence: what may be said of each client, what may not, and what travelled."""

import re
from pathlib import Path
from typing import Any

from allmend.report.evidence import Evidence
from allmend.report.sections.influence import influence
from allmend.results import ArmInfluence, Estimate, InfluenceByMember, LegTraffic, MemberInfluence


def member(client: str, value: float, half: float, *, balance: float = 0.9, target: str = "all") -> MemberInfluence:
    return MemberInfluence(
        client=client,
        target=target,
        mean=Estimate(value=value, low=value - half, high=value + half, n=40),
        below=Estimate(value=0.25, low=0.14, high=0.4, n=40),
        size=2.0,
        balance=balance,
    )


def arm(*members: MemberInfluence, **more: Any) -> ArmInfluence:
    legs = (LegTraffic(name="sizes", members=("east", "north"), sent=1840000, received=460000),)
    known = {
        "arm": "fedavg",
        "weights": "w",
        "target": "held_out",
        "target_records": 30,
        "targets": ("all",),
        "records": 120,
        "damping": 0.1,
        "modules": None,
        "min_records": 32,
        "reveal": "client_sums",
        "members": members,
        "legs": legs,
        "hidden": False,
    }
    return ArmInfluence(**(known | more))


def words(*arms: ArmInfluence) -> str:
    html = influence(Evidence(run=Path("x"), influence=InfluenceByMember(arms=arms)))
    return " ".join(re.sub(r"<title>.*?</title>|<[^>]+>", " ", html).split())


def test_nothing_is_shown_where_nothing_was_measured() -> None:
    assert influence(Evidence(run=Path("x"))) == ""
    assert influence(Evidence(run=Path("x"), influence=InfluenceByMember(arms=()))) == ""


def test_intervals_decide_what_is_said_of_a_client() -> None:
    said = words(arm(member("east", 4.0, 1.0), member("north", -3.0, 1.0), member("south", 0.5, 1.0)))
    assert "Helped: east; hurt: north; unclear: south." in said
    assert "less than the others" not in said
    # in units of the mean absolute score, 2 here
    assert "+2.00 +1.50 to +2.50" in said.replace(";", "")


def test_scores_that_cancel_are_not_called_harmful() -> None:
    said = words(arm(member("east", -1.0, 0.5, balance=-0.05)))
    assert "not “harmful”" in said


def test_targets_and_arms_are_told_apart() -> None:
    two = arm(
        member("east", 4.0, 1.0, target="a"),
        member("east", -4.0, 1.0, target="b"),
        targets=("a", "b"),
        target="asked.jsonl",
    )
    said = words(two, arm(member("east", 4.0, 1.0), arm="second"))
    assert "For a: helped: east. For b: hurt: east." in said
    assert "asked.jsonl (30 records of the coordinator’s)" in said
    assert "second" in said
    html = influence(Evidence(run=Path("x"), influence=InfluenceByMember(arms=(two,))))
    cells = [tip for tip in re.findall(r"<title>(.*?)</title>", html) if tip.startswith("east for ")]
    assert len(cells) == 2 * 2, "a row of the interval plot and a cell of the heat map for each target"
    assert all("95\u202f% interval" in tip for tip in cells)


def test_what_clients_keep_and_what_was_hidden_is_said() -> None:
    said = words(arm(reveal="none", hidden=True, error=2e-7, skipped=("a", "b")))
    assert "keep to themselves" in said
    assert "Sums were formed behind masks; rounding for that moves the directions by 2 × 10⁻⁷" in said
    assert "2 factors without a gradient left out." in said
    assert "1.84" in said
    told = words(arm(member("east", 1.0, 0.5), silent=("west",)))
    assert "Too few records to tell (32 are the fewest): west." in told
    assert "in sight of whoever adds up" in told


def test_the_method_and_what_was_clipped_are_said() -> None:
    plain = words(arm())
    assert re.search("Curvature over 120 training records, damping 0.10? of each block’s mean eigenvalue", plain)
    assert "scaled down" not in plain
    said = words(arm(method="datainf", clip=0.5, clipped=37, gradients=960))
    assert re.search("Curvature by DataInf over 120 training records, damping 0.10? of the mean square", said)
    assert "37 of 960 gradients, a record’s of a factor each, were scaled down to norm 0.50 for the curvature." in said
    said = words(arm(method="hessian_free", records=0))
    assert "No curvature (hessian_free)" in said
    assert "damping" not in said
