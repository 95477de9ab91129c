"""Federated scores are the pooled ones; what leaves is what was declared; blocks that are none are refused."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.influence.test_methods import made

from allmend.errors import UserError
from allmend.influence.federated import FederatedInfluence, play
from allmend.influence.gradients import Given, mean_gradient
from allmend.influence.methods import Gfim
from allmend.influence.scores import influence
from allmend.models.tensors import Tensors
from allmend.strategy import Reply, State, Sums, Task, Turn

CUTS = {"east": (0, 40), "north": (40, 75), "south": (75, 120)}


@dataclass
class Member:
    """Records whose gradients are there already."""

    name: str
    source: Given
    state: State = field(default_factory=State)
    initial: Tensors = field(default_factory=dict)
    asked: list[Tensors] = field(default_factory=list)

    @property
    def examples(self) -> int:
        return len(self.source)

    def gradients(self, start: Tensors) -> Given:
        self.asked.append(start)
        return self.source

    def train(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError


def members(whole: Given, cuts: dict[str, tuple[int, int]] = CUTS) -> dict[str, Member]:
    return {
        name: Member(name, Given({key: g[low:high] for key, g in whole.gradients.items()}))
        for name, (low, high) in cuts.items()
    }


def strategy(target: Given, **options: Any) -> FederatedInfluence:
    return FederatedInfluence(targets=mean_gradient(target)[1], **options)


def test_federated_scores_are_the_pooled_ones() -> None:
    whole, target = made(120), made(9, seed=1)
    pooled = influence(whole, target, Gfim()).values
    parties = members(whole)
    initial = {"x": torch.ones(3)}
    state = play(strategy(target), parties, initial)
    found = torch.cat([parties[name].state.tensors["influence/scores"] for name in CUTS])
    assert torch.allclose(found, pooled, rtol=1e-10)
    assert state.facts["records"] == 120
    # the coordinator has nothing of a record: blocks' solutions alone
    assert {name.partition("/")[0] for name in state.tensors} == {"model", "direction"}
    for party in parties.values():
        assert all(torch.equal(asked["x"], initial["x"]) for asked in party.asked)


def test_the_order_and_number_of_members_do_not_matter() -> None:
    whole, target = made(120), made(9, seed=1)
    cuts = {"z": (0, 60), "a": (60, 120)}
    one, two = members(whole), members(whole, cuts)
    play(strategy(target), one, {})
    play(strategy(target), two, {})
    first, second = (
        torch.cat([parties[name].state.tensors["influence/scores"] for name in names])
        for parties, names in ((one, CUTS), (two, cuts))
    )
    assert torch.allclose(first, second, rtol=1e-9)


def test_a_member_with_few_records_keeps_its_block_and_scores_all_the_same() -> None:
    whole, target = made(120), made(9, seed=1)
    parties = members(whole, {"small": (0, 10), "large": (10, 120)})
    state = play(strategy(target), parties, {})
    rest = Given({key: g[10:] for key, g in whole.gradients.items()})
    assert state.facts["records"] == 110
    solved = Gfim().solve(rest, mean_gradient(target)[1])
    for name, direction in solved.directions.items():
        assert torch.allclose(state.tensors[f"direction/{name}"], direction, rtol=1e-9)
    assert len(parties["small"].state.tensors["influence/scores"]) == 10
    with pytest.raises(UserError, match="no member has 500 records or more"):
        play(strategy(target, min_records=500), members(whole), {})


def test_client_sums_are_seen_only_where_that_is_asked_for() -> None:
    whole, target = made(120), made(9, seed=1)
    parties = members(whole)
    told = strategy(target, reveal="client_sums")
    assert "sums" in told.declare().seen
    assert strategy(target).declare().seen == {}
    state = play(told, parties, {})
    for name, party in parties.items():
        values = party.state.tensors["influence/scores"]
        total, squares, count = state.tensors[f"sums/{name}"]
        assert torch.allclose(total, values.sum(0))
        assert torch.allclose(squares, values.square().sum(0))
        assert float(count) == len(values)


def test_the_layout_is_that_of_the_replies() -> None:
    whole, target = made(60), made(9, seed=1)
    it = strategy(target)
    layout = it.layout({})
    reply = it.work(Task(Turn(1, 0, 1)), Member("a", whole))
    assert {name: tensor.shape for name, tensor in reply.summed.items()} == layout
    assert it.declare().undeclared(reply) == []


@pytest.mark.parametrize("lie", ["negated", "shifted"])
def test_a_block_that_is_no_sum_of_squares_is_refused(lie: str) -> None:
    whole, target = made(60), made(9, seed=1)
    it = strategy(target)
    honest = it.work(Task(Turn(1, 0, 1)), Member("a", whole))
    if lie == "negated":
        summed = {name: -10 * one if name.startswith("block") else one for name, one in honest.summed.items()}
    else:
        summed = {name: one - 30 if name.startswith("block") else one for name, one in honest.summed.items()}
    sums = Sums()
    for reply in (honest, Reply(summed, honest.summed_facts)):
        sums.add(reply)
    with pytest.raises(UserError, match="has a negative eigenvalue"):
        it.solved(sums)
