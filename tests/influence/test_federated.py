"""Federated scores are the pooled ones; what leaves is what was declared; blocks that are none are refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.influence.conftest import MakeRecords

from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.influence.blocks import fisher_blocks
from allmend.influence.federated import BLOCKS, SCORES, SIZES, FederatedInfluence, _is_sum_of_squares
from allmend.influence.gradients import OfRecords, mean_gradient
from allmend.influence.methods import Gfim
from allmend.influence.scores import influence
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors
from allmend.strategy import Reply, Seen, State, Sums, Task, Turn, of_group

CUTS = {"east": (0, 12), "north": (12, 20), "south": (20, 32)}


@dataclass
class Member:
    """Records, and a model that all members here use in turns."""

    name: str
    trainable: Trainable
    records: Sequence[Encoded]
    held_out: Sequence[Encoded] = ()
    state: State = field(default_factory=State)
    initial: Tensors = field(default_factory=dict)

    @property
    def examples(self) -> int:
        return len(self.records)

    def train(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError

    @property
    def scores(self) -> torch.Tensor:
        return self.state.tensors["influence/scores"]


@pytest.fixture
def trainable(trainable: Trainable) -> Trainable:
    trainable.model.double()
    return trainable


@pytest.fixture
def records(make_records: MakeRecords) -> list[Encoded]:
    return make_records(32, 0)


@pytest.fixture
def asked(make_records: MakeRecords) -> list[Encoded]:
    return make_records(6, 1)


def members(
    trainable: Trainable, records: Sequence[Encoded], cuts: dict[str, tuple[int, int]] = CUTS
) -> dict[str, Member]:
    return {name: Member(name, trainable, records[low:high]) for name, (low, high) in cuts.items()}


def play(it: FederatedInfluence, state: State, clients: dict[str, Member]) -> State:
    """All legs, one member after the other."""
    for leg in (SIZES, BLOCKS, SCORES):
        turn, sums, seen = Turn(1, leg, 1, len(clients)), Sums(), dict[str, Seen]()
        tasks = it.plan(state, turn, sorted(clients))
        for name, task in tasks.items():
            reply = it.work(task, clients[name])
            assert it.declare().undeclared(reply) == []
            layout = it.layout_of(leg, of_group("model", task.tensors))
            assert {key: one.shape for key, one in reply.summed.items()}.items() <= layout.items()
            sums.add(reply)
            seen[name] = Seen(reply.seen, reply.seen_facts)
        state = it.combine(state, turn, sums, seen)
    return state


def begun(it: FederatedInfluence, trainable: Trainable, asked: Sequence[Encoded]) -> State:
    return it.begin(trainable.state(), mean_gradient(OfRecords(trainable, asked))[1], ["all"])


def strategy(**options: Any) -> FederatedInfluence:
    return FederatedInfluence(**({"held_out": False, "min_records": 4} | options))


def pooled(trainable: Trainable, records: Sequence[Encoded], asked: Sequence[Encoded]) -> torch.Tensor:
    return influence(OfRecords(trainable, records), OfRecords(trainable, asked), Gfim()).values


def test_federated_scores_are_the_pooled_ones(
    trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    parties = members(trainable, records)
    state = play(strategy(), begun(strategy(), trainable, asked), parties)
    found = torch.cat([party.scores for party in parties.values()])
    assert torch.allclose(found, pooled(trainable, records, asked), rtol=1e-10)
    assert state.facts["records"] == 32
    # the coordinator has nothing of a record, nor the members their blocks any more
    assert {name.partition("/")[0] for name in state.tensors} == {"model", "target", "size", "direction"}
    assert all(set(party.state.tensors) == {"influence/scores", "influence/losses"} for party in parties.values())


def test_held_out_records_are_a_target_that_is_only_summed(
    trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    parties = members(trainable, records)
    parties["east"].held_out, parties["south"].held_out = asked[:2], asked[2:]
    it = strategy(held_out=True)
    state = play(it, it.init(trainable.state()), parties)
    found = torch.cat([party.scores for party in parties.values()])
    assert torch.allclose(found, pooled(trainable, records, asked), rtol=1e-6)  # the target travels in float32
    assert state.facts["targets"] == 6
    with pytest.raises(UserError, match="no member holds records out"):
        play(it, it.init(trainable.state()), members(trainable, records))


def test_the_order_and_number_of_members_do_not_matter(
    trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    one, two = members(trainable, records), members(trainable, records, {"a": (16, 32), "z": (0, 16)})
    for parties in (one, two):
        play(strategy(), begun(strategy(), trainable, asked), parties)
    first = torch.cat([party.scores for party in one.values()])
    assert torch.allclose(first, torch.cat([two["z"].scores, two["a"].scores]), rtol=1e-9)


def test_a_member_with_few_records_keeps_its_block_and_scores_all_the_same(
    trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    it = strategy(reveal="client_sums")
    parties = members(trainable, records, {"small": (0, 3), "large": (3, 32)})
    state = play(it, begun(it, trainable, asked), parties)
    assert state.facts["records"] == 29
    targets = mean_gradient(OfRecords(trainable, asked))[1]
    solved = Gfim().solve(OfRecords(trainable, records[3:]), targets)
    for name, direction in solved.directions.items():
        assert torch.allclose(state.tensors[f"direction/{name}"], direction, rtol=1e-8)
    assert len(parties["small"].scores) == 3
    assert not any(name.startswith("small/") for name in state.facts)
    with pytest.raises(UserError, match="no member has 500 records or more"):
        play(strategy(min_records=500), begun(it, trainable, asked), members(trainable, records))


def test_client_sums_are_seen_only_where_that_is_asked_for(
    trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    told = strategy(reveal="client_sums")
    assert set(told.declare().seen) == {"scores"}
    assert strategy().declare().seen == {}
    parties = members(trainable, records)
    state = play(told, begun(told, trainable, asked), parties)
    for name, party in parties.items():
        values = party.scores[:, 0]
        moments = (values.sum(), values.square().sum(), values.abs().sum(), (values < 0).sum().double())
        for part, expected in zip(("sum", "squares", "absolute", "below"), moments, strict=True):
            assert state.facts[f"{name}/0/{part}"] == pytest.approx(expected.item(), rel=1e-12)
        assert state.facts[f"{name}/records"] == len(values)


def test_scaled_blocks_lie_between_minus_one_and_one_and_come_back(
    trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    it = strategy()
    parties, state = members(trainable, records), begun(strategy(), trainable, asked)
    for leg in (SIZES, BLOCKS):
        turn, sums = Turn(1, leg, 1, 3), Sums()
        tasks = it.plan(state, turn, sorted(parties))
        for name, task in tasks.items():
            reply = it.work(task, parties[name])
            if leg == BLOCKS:
                assert all(float(one.abs().max()) <= 1 + 1e-12 for one in reply.summed.values())
            sums.add(reply)
        if leg == SIZES:
            state = it.combine(state, turn, sums, {})
    assert all(float(sums[name].abs().max()) <= 1 + 1e-12 for name in sums)
    whole = fisher_blocks(OfRecords(trainable, records))
    sizes = of_group("size", state.tensors)
    found = it.blocks(sizes, dict.fromkeys(sizes, 2), sums)
    assert (found.records, dict(found.count)) == (whole.records, dict(whole.count))
    for name, block in whole.sums.items():
        assert torch.allclose(found.sums[name], block.double(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("lie", "words"), [("negated", "negative eigenvalue"), ("larger", "than its members")])
def test_a_block_that_is_no_sum_of_squares_is_refused(
    trainable: Trainable, records: list[Encoded], asked: list[Encoded], lie: str, words: str
) -> None:
    it, parties = strategy(), members(trainable, records)
    state = begun(it, trainable, asked)
    for leg in (SIZES, BLOCKS):
        turn, sums = Turn(1, leg, 1, 3), Sums()
        for name, task in it.plan(state, turn, sorted(parties)).items():
            reply = it.work(task, parties[name])
            if leg == BLOCKS and name == "east":
                factor = -3 if lie == "negated" else 3
                reply = Reply({key: factor * one for key, one in reply.summed.items()}, reply.summed_facts)
            sums.add(reply)
        if leg == SIZES:
            state = it.combine(state, turn, sums, {})
    with pytest.raises(UserError, match=words):
        it.combine(state, turn, sums, {})


def test_values_that_were_cut_are_told(trainable: Trainable, asked: list[Encoded]) -> None:
    it = strategy()
    with pytest.raises(UserError, match="2 values were too large for the sum"):
        it.combine(begun(it, trainable, asked), Turn(1, SIZES, 1, 3), Sums.of({}, {"records": 9.0}, 3, cut=2), {})


def test_a_task_holds_what_its_leg_needs_alone(trainable: Trainable, asked: list[Encoded]) -> None:
    it, state = strategy(), State({"model/a": torch.ones(1), "size/a": torch.ones(1), "direction/a": torch.ones(1)})
    state.facts["names"] = "all"
    tasks: list[Task] = [it.plan(state, Turn(1, leg, 1, 3), ["east"])["east"] for leg in (SIZES, BLOCKS, SCORES)]
    assert [sorted(task.tensors) for task in tasks] == [
        ["model/a"],
        ["model/a", "size/a"],
        ["direction/a", "model/a"],
    ]
    assert [task.facts for task in tasks] == [{}, {}, {"names": "all"}]


@pytest.mark.parametrize(("least", "fine"), [(0.0, True), (-5e-7, True), (-2e-6, False), (-0.5, False)])
def test_an_eigenvalue_below_rounding_is_told_from_one_within(least: float, fine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(0.01, 1, 12, dtype=torch.float64)
    values[0] = 0
    values /= values.sum()
    values[0] = least  # of a trace of about 1
    assert _is_sum_of_squares(basis @ torch.diag(values) @ basis.T) is fine
    assert not _is_sum_of_squares(-torch.eye(3, dtype=torch.float64))
