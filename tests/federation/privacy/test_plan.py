import math
from typing import Any

import pytest

from allmend.errors import UserError
from allmend.federation.privacy.accounting import Release, epsilon, noise_for
from allmend.federation.privacy.plan import Plan, plan_members, plan_records

MEMBERS: dict[str, Any] = {"clients": 40, "rounds": 12, "fraction": 0.25, "epsilon": 3.0, "delta": 1e-4}
RECORDS: dict[str, Any] = {
    "records": 400,
    "batch_size": 20,
    "local_steps": 5,
    "rounds": 6,
    "epsilon": 3.0,
    "delta": 1e-4,
}


def members(**changes: Any) -> Plan:
    return plan_members(**MEMBERS | changes)


def records(**changes: Any) -> Plan:
    return plan_records(**RECORDS | changes)


def test_a_plan_for_members_keeps_its_budget() -> None:
    found = members()
    noise = noise_for(rate=0.25, times=12, epsilon=3.0, delta=1e-4)
    assert found.need.noise_multiplier == noise
    assert found.need.noise_on_average == pytest.approx(noise / 10)
    assert list(found.spent) == [1, 3, 6, 9, 12]
    for round, spent in found.spent.items():
        assert spent == epsilon(Release(noise, 0.25), round, 1e-4)
    assert found.spent[12] <= 3.0
    assert (found.unit, found.warnings) == ("member", ())


def test_a_plan_for_records_counts_steps() -> None:
    found = records()
    noise = noise_for(rate=0.05, times=30, epsilon=3.0, delta=1e-4)
    assert found.need.noise_multiplier == noise
    assert found.need.noise_on_average == pytest.approx(noise / 20)
    assert list(found.spent) == [1, 2, 3, 5, 6]
    assert found.spent[2] == epsilon(Release(noise, 0.05), 10, 1e-4)
    assert found.spent[6] <= 3.0
    assert (found.unit, found.warnings) == ("record", ())


def test_what_other_numbers_of_members_and_rounds_need() -> None:
    found = members()
    others = {need.choice: need for need in found.others}
    assert list(others) == ["6 rounds", "24 rounds", "120 members", "400 members"]
    assert others["6 rounds"].noise_multiplier == members(rounds=6).need.noise_multiplier
    assert others["24 rounds"].noise_multiplier > found.need.noise_multiplier > others["6 rounds"].noise_multiplier
    assert others["120 members"].noise_multiplier == found.need.noise_multiplier
    assert others["120 members"].noise_on_average == pytest.approx(found.need.noise_on_average / 3)


def test_what_other_batches_and_rounds_need() -> None:
    found = records()
    others = {need.choice: need for need in found.others}
    assert list(others) == ["3 rounds", "12 rounds", "batches of 80", "batches of 320"]
    larger = records(batch_size=80).need
    assert others["batches of 80"].noise_multiplier == larger.noise_multiplier > found.need.noise_multiplier
    assert others["batches of 80"].noise_on_average == larger.noise_on_average < found.need.noise_on_average


def test_a_single_round_is_compared_with_two() -> None:
    found = members(rounds=1)
    assert list(found.spent) == [1]
    assert [need.choice for need in found.others][:1] == ["2 rounds"]


def test_all_members_in_every_round_get_no_amplification() -> None:
    found = members(fraction=1.0)
    assert found.need.noise_multiplier == noise_for(rate=None, times=12, epsilon=3.0, delta=1e-4)
    assert found.need.noise_multiplier > members().need.noise_multiplier
    assert any("every round" in warning for warning in found.warnings)
    whole = records(batch_size=400)
    assert any("every step" in warning for warning in whole.warnings)
    assert [need.choice for need in whole.others] == ["3 rounds", "12 rounds"]


@pytest.mark.parametrize(("delta", "warned"), [(0.024, False), (0.025, True), (0.2, True)])
def test_a_delta_of_one_member_or_more_is_warned_of(delta: float, warned: bool) -> None:
    assert any("picked at random" in warning for warning in members(fraction=1.0, delta=delta).warnings) == warned
    assert any("picked at random" in w for w in records(records=40, batch_size=40, delta=delta).warnings) == warned


@pytest.mark.parametrize(("budget", "warned"), [(10.0, False), (11.0, True), (4e3, True)])
def test_a_large_epsilon_is_warned_of(budget: float, warned: bool) -> None:
    found = members(fraction=1.0, epsilon=budget).warnings
    assert any("weak promise" in warning for warning in found) == warned
    if budget == 11:
        assert f"{math.exp(11):.1e}" in found[-1]


def test_empty_rounds_are_warned_of() -> None:
    found = members(clients=4)
    assert any(f"{0.75**4:.0%}" in warning and "nobody" in warning for warning in found.warnings)


@pytest.mark.parametrize("name", ["clients", "rounds"])
def test_too_few(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: 0 is too few"):
        members(**{name: 0})


@pytest.mark.parametrize("name", ["records", "batch_size", "local_steps", "rounds"])
def test_too_few_for_records(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: -1 is too few"):
        records(**{name: -1})


@pytest.mark.parametrize("plan", [members, records])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", math.nan),
        ("epsilon", math.inf),
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", math.nan),
    ],
)
def test_no_budget(plan: Any, name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{name}: "):
        plan(**{name: value})


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_no_fraction(fraction: float) -> None:
    with pytest.raises(UserError, match=r"^fraction: "):
        members(fraction=fraction)


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(UserError, match="401 is more than the 400 records"):
        records(batch_size=401)


def test_a_budget_out_of_reach() -> None:
    with pytest.raises(UserError, match="smallest ε that can be reached"):
        members(rounds=10**6, fraction=1.0, epsilon=0.01)


def test_other_numbers_may_be_out_of_reach_where_the_plan_is_not() -> None:
    found = members(clients=100, rounds=200, fraction=1.0, epsilon=0.05, delta=1e-5)
    needs = {need.choice: need.noise_multiplier for need in found.others}
    assert needs["100 rounds"] < found.need.noise_multiplier < math.inf
    assert needs["400 rounds"] == math.inf
    with pytest.raises(UserError, match="400 releases"):
        members(clients=100, rounds=400, fraction=1.0, epsilon=0.05, delta=1e-5)
