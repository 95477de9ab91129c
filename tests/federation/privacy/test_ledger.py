"""The ledger against the accountant, for settings whose releases can be counted by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from allmend.errors import UserError
from allmend.federation.member import Member
from allmend.federation.privacy.accounting import Release, epsilon, noise_for
from allmend.federation.privacy.ledger import open_ledger
from allmend.recipe import Adapter, Arm, Privacy, StrategyChoice, Train
from allmend.results import MEMBERS

DELTA = 1e-3


def make_arm(*, rounds: int = 5, participation: float | None = None, train: Train | None = None, **privacy: Any) -> Arm:
    options = {} if participation is None else {"participation": participation}
    choice = StrategyChoice.model_validate({"name": "fedavg", "rounds": rounds, **options})
    layers = {name: {"delta": DELTA} | layer for name, layer in privacy.items()}
    return Arm("arm", Adapter(), train or Train(batch_size=4), choice, Privacy.model_validate(layers))


@pytest.fixture
def members(make_member: Callable[..., Member]) -> list[Member]:
    return [make_member("small", records=10), make_member("large", records=37)]


def test_no_guarantee_has_no_account(members: list[Member]) -> None:
    ledger = open_ledger(make_arm(), members)
    assert ledger.accounts == {}
    assert ledger.spent({"small": 3}, 3) == {}
    assert ledger.exhausted({}, 0, ["small"]) == []


def test_poisson_steps_are_counted_by_hand(members: list[Member]) -> None:
    """Batches of 4: 10 records make 3 steps a round, 37 make 10; each step holds a record with probability 4 / n."""
    ledger = open_ledger(make_arm(record={"noise_multiplier": 1.5}), members)
    for name, records, steps in (("small", 10, 3), ("large", 37, 10)):
        account = ledger.accounts[name]
        assert (account.unit, account.release) == ("record", Release(1.5, 4 / records))
        for rounds in (1, 2, 5):
            assert account.releases(rounds) == rounds * steps
            assert account.epsilon(rounds) == epsilon(Release(1.5, 4 / records), rounds * steps, DELTA)
        assert account.whole == account.epsilon(5)
        assert "Poisson" in account.sampling


@pytest.mark.parametrize(("train", "steps"), [({"local_steps": 7}, 7), ({"local_epochs": 0.5}, 5), ({}, 10)])
def test_steps_follow_the_training_settings(train: dict[str, Any], steps: int, members: list[Member]) -> None:
    arm = make_arm(train=Train(batch_size=4, **train), record={"noise_multiplier": 1.0})
    assert open_ledger(arm, members).accounts["large"].releases(3) == 3 * steps


def test_shuffled_passes_are_counted_whole_and_without_amplification(members: list[Member]) -> None:
    """7 steps of 4 a round go through 37 records (10 steps) 0.7 times: after 3 rounds the third pass has begun."""
    arm = make_arm(train=Train(batch_size=4, local_steps=7), record={"noise_multiplier": 1.5, "sampling": "shuffle"})
    account = open_ledger(arm, members).accounts["large"]
    assert account.release == Release(1.5, None)
    assert [account.releases(rounds) for rounds in range(6)] == [0, 1, 2, 3, 3, 4]
    # k passes are one Gaussian release with noise σ / √k
    assert account.epsilon(5) == pytest.approx(epsilon(Release(1.5 / 2), 1, DELTA))
    assert "no Poisson" in account.sampling
    amplified = open_ledger(make_arm(train=arm.train, record={"noise_multiplier": 1.5}), members).accounts["large"]
    assert amplified.epsilon(5) < account.epsilon(5)


def test_a_batch_larger_than_the_data_holds_every_record(members: list[Member]) -> None:
    arm = make_arm(train=Train(batch_size=64), record={"noise_multiplier": 2.0})
    account = open_ledger(arm, members).accounts["small"]
    assert account.release.rate == 1
    assert account.epsilon(4) == pytest.approx(epsilon(Release(2.0), 4, DELTA))


def test_records_without_a_token_to_learn_do_not_dilute_the_sample(make_member: Callable[..., Member]) -> None:
    """Training passes over them, so each of the others is drawn more often."""
    member = make_member("a", records=10)
    blank = [replace(one, target=torch.zeros_like(one.target)) for one in member.records[:5]]
    half = replace(member, records=[*blank, *member.records[5:]])
    account = open_ledger(make_arm(record={"noise_multiplier": 1.0}), [half]).accounts["a"]
    assert account.release.rate == 4 / 5
    assert account.releases(1) == 3  # of ten records, which is what the member says that it has


def test_members_are_counted_by_round(members: list[Member]) -> None:
    for participation, rate in ((None, None), (1.0, None), (0.3, 0.3)):
        arm = make_arm(participation=participation, member={"noise_multiplier": 1.2})
        (account,) = open_ledger(arm, members).accounts.values()
        assert (account.unit, account.release) == ("member", Release(1.2, rate))
        assert [account.releases(rounds) for rounds in (0, 1, 4)] == [0, 1, 4]
        assert account.whole == epsilon(Release(1.2, rate), 5, DELTA)
        assert ("Poisson" in account.sampling) == (rate is not None)
        assert ("no amplification" in account.sampling) == (rate is None)


def test_noise_that_is_left_open_is_what_the_budget_needs_for_all_rounds(members: list[Member]) -> None:
    ledger = open_ledger(make_arm(record={"epsilon": 2.0}, member={"epsilon": 4.0}), members)
    assert set(ledger.accounts) == {"small", "large", MEMBERS}
    for name, rate, times, budget in (("small", 0.4, 15, 2.0), ("large", 4 / 37, 50, 2.0), (MEMBERS, None, 5, 4.0)):
        account = ledger.accounts[name]
        assert account.release.noise_multiplier == noise_for(rate=rate, times=times, epsilon=budget, delta=DELTA)
        assert 0.99 * budget < account.whole <= budget


def test_each_client_pays_for_the_rounds_that_it_took_part_in(members: list[Member]) -> None:
    ledger = open_ledger(make_arm(record={"noise_multiplier": 1.0}, member={"noise_multiplier": 1.0}), members)
    accounts = ledger.accounts
    assert ledger.spent({"small": 2}, 3) == {
        "small": accounts["small"].epsilon(2),
        "large": 0.0,
        MEMBERS: accounts[MEMBERS].epsilon(3),
    }
    assert ledger.spent({}, 0) == dict.fromkeys(accounts, 0.0)


def test_without_noise_nothing_is_promised(members: list[Member]) -> None:
    for layer in ({"noise_multiplier": 0.0}, {"noise_multiplier": 0.0, "clip": math.inf}, {"noise_multiplier": 1e-3}):
        ledger = open_ledger(make_arm(record=layer, member=layer), members)
        assert all(account.whole == math.inf for account in ledger.accounts.values())
        assert ledger.spent({"small": 1}, 1) == {"large": 0.0}  # which has taken no part yet
        assert ledger.exhausted({}, 0, ["small"]) == []


@settings_of_hypothesis(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    noise=st.floats(0.5, 8),
    budget=st.floats(0.5, 20),
    plan=st.lists(st.lists(st.sampled_from(["small", "large"]), unique=True), min_size=1, max_size=8),
)
def test_whatever_is_planned_no_budget_is_ever_exceeded_and_none_ends_too_early(
    noise: float, budget: float, plan: list[list[str]], members: list[Member]
) -> None:
    layer = {"noise_multiplier": noise, "epsilon": budget, "sampling": "shuffle"}
    member = {"noise_multiplier": 2 * noise, "epsilon": budget}  # so that either can be the first to end
    try:
        ledger = open_ledger(make_arm(record=layer, member=member), members)
    except UserError:  # a round is too dear
        assert epsilon(Release(noise), 1, DELTA) > budget
        return
    took_part: dict[str, int] = {}
    for round, clients in enumerate(plan, start=1):
        after = {**took_part, **{name: took_part.get(name, 0) + 1 for name in clients}}
        dear = {name for name, value in ledger.spent(after, round).items() if value > budget}
        assert set(ledger.exhausted(took_part, round - 1, clients)) == dear
        if dear:
            break
        took_part = after
        assert all(value <= budget for value in ledger.spent(took_part, round).values())


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"record": {"noise_multiplier": 0.3, "epsilon": 1.0}}, "client 'small'"),
        ({"member": {"noise_multiplier": 0.5, "epsilon": 1.0}}, "members"),
        ({"member": {"noise_multiplier": 0.005, "epsilon": 1.0}}, "one round costs ε = inf"),
    ],
)
def test_a_round_that_is_too_dear_is_refused_with_its_price(
    layers: dict[str, Any], words: str, members: list[Member]
) -> None:
    with pytest.raises(UserError, match=r"more than the budget of 1 \(δ = 0\.001\)") as raised:
        open_ledger(make_arm(**layers), members)
    assert words in str(raised.value)
    assert "arm 'arm'" in str(raised.value)
    assert raised.value.hint
    assert "Raise epsilon or noise_multiplier" in raised.value.hint


def test_a_budget_that_no_noise_keeps_is_refused_with_what_could_be_reached(members: list[Member]) -> None:
    for unit, whose in (("record", "client 'small'"), ("member", "members")):
        with pytest.raises(UserError, match="the smallest ε that can be reached is") as raised:
            open_ledger(make_arm(**{unit: {"epsilon": 1e-6, "delta": 1e-9}}), members)
        assert raised.value.where == f"arm 'arm', {whose}"
        assert raised.value.hint
