"""The section on routers: what it shows of whom, and what it says was read."""

import re
from html import unescape
from pathlib import Path

import pytest

from allmend.report.evidence import Evidence
from allmend.report.sections.routing import (
    ends_of,
    ends_of_scale,
    expert_map,
    experts_of,
    read_in_words,
    routing,
    routing_map,
)
from allmend.results import ArmRouting, Estimate, MemberRouting, RoutingTable


def member(name: str, *masses: float, target: bool = False, own: int = 1, records: int = 4) -> MemberRouting:
    def estimate(value: float) -> Estimate:
        return Estimate(value=value, low=max(0.0, value - 0.05), high=min(1.0, value + 0.05), n=1200)

    return MemberRouting(
        member=name,
        records=records,
        target=target,
        shared=1,
        own=own,
        mass=tuple(map(estimate, masses)),
        overall=estimate(sum(masses) / len(masses)),
        gates=tuple((mass, *[(1 - mass) / max(1, own)] * own) for mass in masses),
    )


def arm(*members: MemberRouting, name: str = "comigs", warnings: tuple[str, ...] = ()) -> ArmRouting:
    return ArmRouting(arm=name, layers=(3, 7, 8), members=members, warnings=warnings)


def shown(*arms: ArmRouting) -> str:
    return routing(Evidence(run=Path(), routing=RoutingTable(arms=arms)))


def test_every_member_and_layer_has_a_cell_with_its_figure() -> None:
    found = unescape(routing_map(arm(member("north", 0.2, 0.5, 0.9), member("south", 0.6, 0.61, 0.0))))
    tips = re.findall(r"<title>(.*?)</title>", found, flags=re.DOTALL)
    assert len(tips) == 6
    assert "north, layer 8\ngeneralists 0.90 (95\u202f% interval 0.85 to 0.95, n\u00a0=\u00a01,200)" in tips
    assert any(tip.startswith("south, layer 3\ngeneralists 0.60") for tip in tips)
    # orange below a half, blue above it
    cells = re.findall(r'class="(cell[^"]*)" style="--v:(\d+)%"', found)[:6]
    assert [css for css, _ in cells] == ["cell less", "cell", "cell", "cell", "cell", "cell less"]
    assert int(cells[1][1]) == 0
    assert int(cells[2][1]) > int(cells[3][1])


def test_the_section_has_names_warnings_and_ends() -> None:
    page = shown(arm(member("north", 0.2, 0.5, 0.9), warnings=("arm 'comigs', client 'north': look",)))
    assert "Who answers: routers" in page
    assert 'class="warning">arm &#x27;comigs&#x27;, client &#x27;north&#x27;: look' in page
    assert re.search(r"0.20<small>layer 3</small>.*0.90<small>layer 8</small>", page)
    assert "<h3>" not in page


def test_several_arms_have_headings_and_empty_ones_are_left_out() -> None:
    assert shown() == ""
    assert shown(arm()) == ""
    assert routing(Evidence(run=Path())) == ""
    page = shown(arm(member("north", 0.5, 0.5, 0.5)), arm(), arm(member("north", 0.5, 0.5, 0.5), name="other"))
    assert re.findall("<h3>(.*?)</h3>", page) == ["comigs", "other"]


def test_a_member_without_a_router_has_no_ends() -> None:
    page = shown(arm(member("north", 1.0, 1.0, 1.0, own=0)))
    assert "layer 3</small>" not in page.partition("<details>")[0]


def test_differences_that_hardly_matter_do_not_look_large() -> None:
    assert ends_of_scale([0.49, 0.51]) == pytest.approx((0.4, 0.6))
    assert ends_of_scale([0.2, 0.51]) == pytest.approx((0.2, 0.8))
    assert ends_of_scale([]) == pytest.approx((0.4, 0.6))
    found = routing_map(arm(member("north", 0.49, 0.5, 0.51)))
    assert {int(strength) for strength in re.findall(r'class="cell[^"]*" style="--v:(\d+)%"', found)[:3]} == {0, 10}


def test_without_generalists_there_is_no_map() -> None:
    alone = member("north", 0.0, 0.0, 0.0, own=2)
    page = shown(arm(alone.model_copy(update={"shared": 0, "gates": ((0.5, 0.5),) * 3}), warnings=("look",)))
    assert "There is no generalist" in page
    assert "look" in page
    assert "<svg" not in page


def test_layers_with_least_and_most() -> None:
    assert ends_of(member("north", 0.5, 0.1, 0.9)) == (1, 2)
    assert ends_of(member("north", 0.5)) == (0, 0)


def test_experts_have_names_and_a_map() -> None:
    assert experts_of(member("north", 0.5, own=2)) == ["generalist", "specialist 1", "specialist 2"]
    found = unescape(expert_map(member("north", 0.4, 0.2, 0.1, own=2), (3, 7, 8)))
    assert "specialist 2, layer 8\nweight 0.45" in found


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ((False, False), "of 8 held-out records: every"),
        ((True, True), "of 8 records of the targets, which routers learnt from: every"),
        ((False, True), "of 8 held-out records and, for 1 client without any, of the target: every"),
    ],
)
def test_what_was_read_is_told(targets: tuple[bool, bool], words: str) -> None:
    members = [member(str(place), 0.5, target=target) for place, target in enumerate(targets)]
    assert f"2,400 tokens {words}" in read_in_words(members)
