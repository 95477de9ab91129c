"""`allmend status`: the standing in words."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from allmend.cli.status import MOST_WARNINGS, shown
from allmend.status.standing import ArmStanding, MemberStanding, Standing

RUNNING = Standing(
    run="joint",
    state="running",
    offer="ab" * 32,
    begun=1000.0,
    latest=1100.0,
    phase="fedavg: round 3 of 10",
    arms=(ArmStanding("fedavg", "fedavg", 2, 10, 2.345, 30.0, {"members": 0.75}),),
    members=(
        MemberStanding("clinic-a", 2, 1090.0, 2_000_000, 1_000_000, away=False, waited_for=True),
        MemberStanding("clinic-b", 1, 1040.0, 1_000_000, 500_000, away=True, waited_for=True),
    ),
)


def words(standing: Standing, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(shown(standing, now=1105.0))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_a_run_that_goes_on(width: int) -> None:
    text = words(RUNNING, width)
    for part in ("joint  running  fedavg: round 3 of 10", "5 s ago", "2 of 10", "2.345", "about 4 min 0 s", "0.75"):
        assert part in text
    a, b = (line for line in text.splitlines() if "clinic-" in line)
    assert "is waited for" in a
    assert "15 s ago" in a
    assert "2.0 MB" in a
    assert "away" in b
    assert max(len(line) for line in text.splitlines()) <= width


def test_where_nobody_can_be_away_there_is_no_column_for_it() -> None:
    here = tuple(MemberStanding(name, 2, 1090.0, 1, 1) for name in ("clinic-a", "clinic-b"))
    header = next(line for line in words(replace(RUNNING, members=here)).splitlines() if "member" in line)
    assert "now" not in header
    assert "now" in next(line for line in words(RUNNING).splitlines() if "member" in line)


def test_a_run_that_stopped_says_why_and_how_to_go_on() -> None:
    text = words(replace(RUNNING, state="stopped", cause="no space left", onward="Go on with it: x", phase=""))
    assert "no space left" in text
    assert "Go on with it: x" in text
    assert "about" not in text  # nothing is promised


def test_a_run_that_was_killed_says_so() -> None:
    assert "nobody works on it" in words(replace(RUNNING, state="not running", phase=""))


def test_a_run_before_its_first_arm() -> None:
    text = words(replace(RUNNING, arms=(), members=(), phase="starts"))
    assert "No arm has begun." in text
    assert "No member is known yet." in text


def test_the_last_warnings_are_shown_and_the_others_counted() -> None:
    text = words(replace(RUNNING, warnings=tuple(f"number {i}" for i in range(MOST_WARNINGS + 2))))
    assert "number 0" not in text
    assert "number 1\n" not in text
    assert f"number {MOST_WARNINGS + 1}" in text
    assert "2 earlier warnings in the report" in text


def test_markup_in_a_name_or_a_warning_is_text() -> None:
    text = words(replace(RUNNING, warnings=("[bold]x[/bold]",)))
    assert "[bold]x[/bold]" in text
