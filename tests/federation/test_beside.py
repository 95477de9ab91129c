"""What a dry run foretells of the work beside training is what members count while they do it."""

from collections.abc import Callable
from typing import Any

import pytest

from allmend.federation.beside import records_beside, tokens_beside
from allmend.federation.member import ASIDE, LEARNT
from allmend.federation.strategies import build_strategy
from allmend.recipe import Adapter, Arm, Privacy, StrategyChoice, Train
from allmend.strategy import State

ROUNDS = 8


def arm_of(name: str, train: Train, **options: Any) -> Arm:
    choice = StrategyChoice(name=name, rounds=ROUNDS, **options)
    return Arm(name, Adapter(), train, choice, Privacy())


def read_by(state: State) -> float:
    """Records that went through a member's model."""
    return float(state.tensors[LEARNT][:, 0].sum()) + float(state.facts.get(ASIDE, 0.0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedavg", {}),
        ("local", {}),
        ("ditto", {}),
        ("ifca", {"groups": 3}),
        ("ifca", {"groups": 2, "probe_records": 2}),
        ("cobo", {"pairs_per_member": 8.0, "freeze_after_visits": 3}),
        ("cobo", {"pairs_per_member": 8.0, "freeze_after_visits": 0, "probe_records": 2}),
        ("cobo", {"pairs_per_member": 8.0, "freeze_after_visits": 0, "neighbours": 3, "common_rounds": 0.5}),
        ("clustered", {"probe_records": 4}),
    ],
)
def test_records_that_are_foretold_are_those_that_are_read(
    name: str, options: dict[str, Any], run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    """Pairs are drawn with certainty here, so that nothing is left to chance."""
    members = [make_member(member, records=6) for member in "abcd"]
    strategy = build_strategy(name, options, seed=0)
    found = run(strategy, members, settings, rounds=ROUNDS)

    plain = run(build_strategy("local", {}, seed=0), members, settings, rounds=ROUNDS)
    read = sum(map(read_by, found.states.values())) - sum(map(read_by, plain.states.values()))
    arm = arm_of(name, settings, **options)
    foretold = sum(records_beside(strategy, arm, len(member.records), len(members)) for member in members)
    assert foretold == pytest.approx(read, rel=0.01, abs=1e-6)
    mean = sum(len(record) for member in members for record in member.records) / 24
    assert tokens_beside(strategy, arm, members) == pytest.approx(foretold * mean, rel=0.1)


def test_router_steps_are_foretold(settings: Train) -> None:
    """Six records, of which two are set apart: turns after every second of 24 steps, of three batches of two."""
    train = settings.model_copy(update={"batch_size": 4, "local_steps": 3, "local_epochs": None})
    options = {"router_every": 2, "router_steps": 3, "validation": 0.3}
    strategy = build_strategy("comigs", options, seed=0)

    assert records_beside(strategy, arm_of("comigs", train, **options), 6, 3) == 12 * 3 * 2


def test_one_member_has_nobody_to_be_compared_with(settings: Train) -> None:
    assert records_beside(build_strategy("cobo", {}, seed=0), arm_of("cobo", settings), 6, 1) == 0
