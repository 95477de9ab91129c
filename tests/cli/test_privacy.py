"""`allmend privacy plan` on good and bad input."""

from collections.abc import Callable
from typing import Any

import pytest

from allmend.federation.privacy.accounting import noise_for

Allmend = Callable[..., Any]

MEMBERS = ("--clients", 40, "--fraction", 0.25, "--rounds", 12, "--target-epsilon", 3, "--delta", 1e-4)
RECORDS = ("--records", 400, "--batch-size", 20, "--local-steps", 5, "--rounds", 6, "--target-epsilon", 3)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_plan_for_members(allmend: Allmend) -> None:
    shown = allmend("privacy", "plan", *MEMBERS)
    assert (shown.code, shown.err) == (0, "")
    noise = noise_for(rate=0.25, times=12, epsilon=3.0, delta=1e-4)
    for phrase in (
        "40 members, each in a round with probability 0.25; 12 rounds",
        f"noise_multiplier = {noise:g}, under [privacy.member]",
        "ε = 3 at δ = 0.0001",
        "after round 12",
        "a member with all its records",
        "120 members",
    ):
        assert phrase in words(shown.out)
    assert "Warning" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


def test_a_plan_for_records(allmend: Allmend) -> None:
    shown = allmend("privacy", "plan", *RECORDS)
    assert (shown.code, shown.err) == (0, "")
    noise = noise_for(rate=0.05, times=30, epsilon=3.0, delta=1e-5)
    for phrase in (f"noise_multiplier = {noise:g}, under [privacy.record]", "one training record", "batches of 80"):
        assert phrase in words(shown.out)


def test_without_a_fraction_all_members_take_part(allmend: Allmend) -> None:
    shown = allmend("privacy", "plan", "--clients", 3, "--rounds", 5, "--target-epsilon", 3, "--delta", 0.5)
    assert shown.code == 0
    assert "3 members, all in every round; 5 rounds" in words(shown.out)
    assert shown.out.count("Warning") == 2


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("--clients", 3, "--records", 9), "--clients is about members, --records about records"),
        (("--records", 9), "--batch-size and --local-steps"),
        (("--fraction", 0.5), "--clients for members"),
        ((), "not said"),
        (("--clients", 0), "too few"),
        (("--clients", 3, "--fraction", 2), "fraction: 2"),
        (("--clients", 3, "--delta", 0), "delta: 0"),
        (("--clients", 3, "--delta", "nan"), "delta: nan"),
        (("--clients", 3, "--delta", 1e-300, "--fraction", 0.5), "smallest ε that can be reached"),
        (("--clients", 3, "--clip", 1.0), "--clip: only a run's model has a use for it"),
        (("--clients", 3, "--clip", 0, "--run", "nowhere"), "--clip: 0 is no clip"),
        (("--records", 9, "--batch-size", 10, "--local-steps", 1), "10 is more than the 9 records"),
    ],
)
def test_a_plan_that_makes_no_sense(allmend: Allmend, arguments: tuple[object, ...], phrase: str) -> None:
    shown = allmend("privacy", "plan", "--rounds", 5, "--target-epsilon", 2, *arguments)
    assert shown.code == 2
    assert phrase in words(shown.err)
    assert shown.out == ""


def test_a_budget_is_needed(allmend: Allmend) -> None:
    shown = allmend("privacy", "plan", "--rounds", 5, "--clients", 3)
    assert shown.code == 2
    assert "--target-epsilon" in shown.err
