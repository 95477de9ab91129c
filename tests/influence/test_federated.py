"""Federated scores are the pooled ones by every method; what leaves is what was declared; lies are refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.influence.conftest import MakeRecords

from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.influence.federated import FederatedInfluence
from allmend.influence.gradients import Given, OfRecords, Source, mean_gradient
from allmend.influence.methods import DataInf, Gfim, HessianFree, Method
from allmend.influence.scores import influence, score
from allmend.influence.summed_curvature import SummedBlocks, SummedCorrections, SummedCurvature
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors
from allmend.strategy import Reply, Seen, State, Sums, Turn, of_group

METHODS: dict[str, tuple[SummedCurvature | None, Method]] = {
    "gfim": (SummedBlocks(), Gfim()),
    "datainf": (SummedCorrections(), DataInf()),
    "hessian_free": (None, HessianFree()),
}
EACH = pytest.mark.parametrize("method", list(METHODS))
WITH_CURVATURE = pytest.mark.parametrize("method", ["gfim", "datainf"])

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
    for leg in range(it.legs):
        turn, sums, seen = Turn(1, leg, 1, len(clients)), Sums(), dict[str, Seen]()
        tasks = it.plan(state, turn, sorted(clients))
        for name, task in tasks.items():
            reply = it.work(task, clients[name])
            assert it.declare().undeclared(reply) == []
            layout = it.layout(of_group("model", task.tensors), leg)
            assert {key: one.shape for key, one in reply.summed.items()}.items() <= layout.items()
            sums.add(reply)
            seen[name] = Seen(reply.seen, reply.seen_facts)
        state = it.combine(state, turn, sums, seen)
    return state


def begun(it: FederatedInfluence, trainable: Trainable, asked: Sequence[Encoded]) -> State:
    return it.begin(trainable.state(), mean_gradient(OfRecords(trainable, asked))[1], ["all"])


def strategy(method: str = "gfim", **options: Any) -> FederatedInfluence:
    return FederatedInfluence(**({"held_out": False, "min_records": 4, "curvature": METHODS[method][0]} | options))


def pooled(
    method: str, trainable: Trainable, records: Sequence[Encoded], asked: Sequence[Encoded], **groups: Any
) -> torch.Tensor:
    return influence(OfRecords(trainable, records), OfRecords(trainable, asked), METHODS[method][1], **groups).values


def scores_of(parties: dict[str, Member]) -> torch.Tensor:
    return torch.cat([party.scores for party in parties.values()])


@EACH
def test_federated_scores_are_the_pooled_ones(
    method: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    parties, it = members(trainable, records), strategy(method)
    state = play(it, begun(it, trainable, asked), parties)
    assert torch.allclose(scores_of(parties), pooled(method, trainable, records, asked), rtol=1e-10)
    # the coordinator has nothing of a record, nor the members their blocks any more
    groups = {"model", "target", "direction"} | ({"size"} if it.curvature else set())
    assert {name.partition("/")[0] for name in state.tensors} == groups
    assert all(set(party.state.tensors) == {"influence/scores", "influence/losses"} for party in parties.values())
    assert all(set(party.state.facts) == {"names"} for party in parties.values())
    assert state.facts.get("records") == (32 if it.curvature else None)


@EACH
def test_each_of_several_targets_has_its_scores(
    method: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    groups = [(name,) for name in "aabbbc"]
    curvature = SummedCorrections(targets=3) if method == "datainf" else METHODS[method][0]
    parties, it = members(trainable, records), strategy(method, curvature=curvature)
    names, targets = mean_gradient(OfRecords(trainable, asked), groups)
    play(it, it.begin(trainable.state(), targets, names), parties)
    expected = pooled(method, trainable, records, asked, groups=groups)
    assert expected.shape == (32, 3)
    assert torch.allclose(scores_of(parties), expected, rtol=1e-9)


@EACH
def test_held_out_records_are_a_target_that_is_only_summed(
    method: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    parties = members(trainable, records)
    parties["east"].held_out, parties["south"].held_out = asked[:2], asked[2:]
    it = strategy(method, held_out=True)
    state = play(it, it.init(trainable.state()), parties)
    # the target travels in float32
    assert torch.allclose(scores_of(parties), pooled(method, trainable, records, asked), rtol=1e-5)
    assert state.facts["targets"] == 6
    with pytest.raises(UserError, match="no member holds records out"):
        play(it, it.init(trainable.state()), members(trainable, records))


@EACH
def test_the_order_and_number_of_members_do_not_matter(
    method: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    one, two = members(trainable, records), members(trainable, records, {"a": (16, 32), "z": (0, 16)})
    for parties in (one, two):
        play(strategy(method), begun(strategy(method), trainable, asked), parties)
    assert torch.allclose(scores_of(one), torch.cat([two["z"].scores, two["a"].scores]), rtol=1e-9)


@WITH_CURVATURE
def test_a_member_with_few_records_adds_nothing_and_scores_all_the_same(
    method: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    it = strategy(method, reveal="client_sums")
    parties = members(trainable, records, {"small": (0, 3), "large": (3, 32)})
    state = play(it, begun(it, trainable, asked), parties)
    assert state.facts["records"] == 29
    targets = mean_gradient(OfRecords(trainable, asked))[1]
    solved = METHODS[method][1].solve(OfRecords(trainable, records[3:]), targets)
    for name, direction in solved.directions.items():
        assert torch.allclose(state.tensors[f"direction/{name}"], direction, rtol=1e-8)
    assert len(parties["small"].scores) == 3
    assert not any(name.startswith("small/") for name in state.facts)
    with pytest.raises(UserError, match="no member has 500 records or more"):
        play(strategy(method, min_records=500), begun(it, trainable, asked), members(trainable, records))


@WITH_CURVATURE
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_what_a_member_with_few_records_sends_is_zeros(
    method: str, clip: float | None, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    it = strategy(method, clip=clip)
    parties = members(trainable, records, {"small": (0, 3), "large": (3, 32)})
    state = begun(it, trainable, asked)
    for leg in (0, 1):
        turn, sums = Turn(1, leg, 1, 2), Sums()
        for name, task in it.plan(state, turn, sorted(parties)).items():
            reply = it.work(task, parties[name])
            sums.add(reply)
            if name == "small":
                assert (reply.summed, set(reply.summed_facts.values())) == ({}, {0.0})
        state = it.combine(state, turn, sums, {})


@WITH_CURVATURE
def test_a_member_that_is_not_in_the_sizes_has_no_part(
    method: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    it, parties = strategy(method), members(trainable, records)
    state, turn, sums = begun(it, trainable, asked), Turn(1, 0, 1, 3), Sums()
    for name, task in it.plan(state, turn, sorted(parties)).items():
        if name != "south":  # its answer is lost, and with it what it kept
            sums.add(it.work(task, parties[name]))
    state = it.combine(state, turn, sums, {})
    (task,) = it.plan(state, Turn(1, 1, 1, 3), ["south"]).values()
    assert it.work(task, parties["south"]) == Reply({}, {"records": 0.0})


def test_without_curvature_no_leg_is_played_for_it(
    trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    alone, held_out = strategy("hessian_free"), strategy("hessian_free", held_out=True)
    assert (alone.names, held_out.names) == (("scores",), ("target", "scores"))
    assert (alone.legs, held_out.legs) == (1, 2)
    assert alone.declare().summed == {}
    assert set(held_out.declare().summed) == {"target", "targets"}
    assert alone.layout(trainable.state()) == {}
    assert {name.partition("/")[0] for name in held_out.layout(trainable.state())} == {"target"}
    parties = members(trainable, records)
    (task,) = alone.plan(begun(alone, trainable, asked), Turn(1, 0, 1, 3), ["east"]).values()
    assert {name.partition("/")[0] for name in task.tensors} == {"model", "direction"}
    assert alone.work(task, parties["east"]) == Reply()


def test_what_leaves_is_said_of_each_method() -> None:
    words = strategy("gfim").declare().summed
    assert list(words) == ["size", "block", "records"]
    assert "clipped" not in words
    words = strategy("datainf", clip=0.25, held_out=True).declare().summed
    assert list(words) == ["size", "correction", "records", "clipped", "target", "targets"]
    assert "scaled down to norm 0.25" in words["clipped"]
    assert "for each of" not in words["correction"]
    declared = strategy(curvature=SummedCorrections(targets=7)).declare()
    assert "for each of 7 targets" in declared.summed["correction"]
    assert "damping λ" in declared.sent
    assert strategy("hessian_free").declare().sent == "the shared parameters, and the target's gradients"


class Shortened:
    """The records' gradients, scaled down by hand."""

    def __init__(self, source: Source, norm: float) -> None:
        whole: dict[str, torch.Tensor] = {}
        for batch in source:
            for name, g in batch.gradients.items():
                held = whole.setdefault(name, torch.zeros(len(source), *g.shape[1:], dtype=g.dtype))
                for place, one in zip(batch.places, g, strict=True):
                    held[place] = one
        self.longer = sum(int(one.norm() > norm) for g in whole.values() for one in g)
        self.largest = max(float(one.norm()) for g in whole.values() for one in g)
        short = {
            name: torch.stack([one * min(1.0, norm / max(float(one.norm()), 1e-300)) for one in g])
            for name, g in whole.items()
        }
        self.source = Given(short)


@WITH_CURVATURE
def test_clipped_gradients_are_in_the_curvature_and_whole_ones_in_the_scores(
    method: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    source, targets = OfRecords(trainable, records), mean_gradient(OfRecords(trainable, asked))[1]
    norms = torch.cat([g.flatten(1).norm(dim=1) for batch in source for g in batch.gradients.values()])
    clip = float(norms.quantile(0.6))
    by_hand = Shortened(source, clip)
    assert 0 < by_hand.longer < len(norms)
    it, parties = strategy(method, clip=clip), members(trainable, records)
    state = play(it, begun(it, trainable, asked), parties)
    expected = score(source, METHODS[method][1].solve(by_hand.source, targets).directions)[0]
    assert torch.allclose(scores_of(parties), expected, rtol=1e-9)
    assert not torch.allclose(scores_of(parties), pooled(method, trainable, records, asked), rtol=1e-3)
    assert (state.facts["clipped"], state.facts["gradients"]) == (by_hand.longer, len(norms))


@WITH_CURVATURE
def test_a_norm_that_no_gradient_reaches_changes_no_bit(
    method: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    largest = Shortened(OfRecords(trainable, records), 1.0).largest
    found = []
    for clip in (None, largest * (1 + 1e-9)):
        it, parties = strategy(method, clip=clip), members(trainable, records)
        state = play(it, begun(it, trainable, asked), parties)
        assert state.facts.get("clipped") == (None if clip is None else 0)
        found.append((scores_of(parties), state))
    assert torch.equal(found[0][0], found[1][0])
    for name, tensor in found[0][1].tensors.items():
        assert torch.equal(tensor, found[1][1].tensors[name])


@WITH_CURVATURE
@pytest.mark.parametrize(("share", "step"), [(1.01, 0.0), (0.99, 0.0), (1.01, 1.0)])
def test_more_than_clipped_gradients_come_to_is_refused_before_anything_goes_on(
    method: str, share: float, step: float, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    """A member says that its sizes are larger, so that the sum is above or below n c²; `step` forgives rounding."""
    clip = 0.05
    it, parties, state = (
        strategy(method, clip=clip, step=step),
        members(trainable, records),
        begun(strategy(method), trainable, asked),
    )
    turn, sums = Turn(1, 0, 1, 3), Sums()
    replies = {name: it.work(task, parties[name]) for name, task in it.plan(state, turn, sorted(parties)).items()}
    name = min(key for key in replies["east"].summed)
    missing = share * 32 * clip**2 - sum(float(reply.summed[name].sum()) for reply in replies.values())
    assert missing > 0
    replies["east"].summed[name] = replies["east"].summed[name].clone()
    replies["east"].summed[name][0] += missing
    for reply in replies.values():
        sums.add(reply)
    if share < 1 or step:
        assert it.combine(state, turn, sums, {}).facts["records"] == 32
        return
    with pytest.raises(UserError) as refused:
        it.combine(state, turn, sums, {})
    words = str(refused.value)
    assert name.removeprefix("size/") in words
    assert f"is {share * 32 * clip**2:.4g}, and 32 records whose gradients are clipped to 0.05" in words
    assert f"come to {32 * clip**2:.4g} at most" in words


def test_a_size_below_zero_is_refused(trainable: Trainable, records: list[Encoded], asked: list[Encoded]) -> None:
    it, parties = strategy("datainf"), members(trainable, records)
    state, turn, sums = begun(it, trainable, asked), Turn(1, 0, 1, 3), Sums()
    for name, task in it.plan(state, turn, sorted(parties)).items():
        reply = it.work(task, parties[name])
        factor = -9 if name == "east" else 1
        sums.add(Reply({key: factor * one for key, one in reply.summed.items()}, reply.summed_facts))
    with pytest.raises(UserError, match="is below 0"):
        it.combine(state, turn, sums, {})


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


@WITH_CURVATURE
def test_parts_lie_between_minus_one_and_one_as_does_their_sum(
    method: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    it = strategy(method)
    parties, state = members(trainable, records), begun(it, trainable, asked)
    for leg in (0, 1):
        turn, sums = Turn(1, leg, 1, 3), Sums()
        tasks = it.plan(state, turn, sorted(parties))
        for name, task in tasks.items():
            reply = it.work(task, parties[name])
            if leg:
                assert all(float(one.abs().max()) <= 1 + 1e-12 for one in reply.summed.values())
            sums.add(reply)
        if not leg:
            state = it.combine(state, turn, sums, {})
    assert all(float(sums[name].abs().max()) <= 1 + 1e-12 for name in sums)
    assert any(float(sums[name].abs().max()) > 1e-3 for name in sums), "units are not of another magnitude"


@pytest.mark.parametrize(
    ("method", "factor", "words"),
    [
        ("gfim", -3, "negative eigenvalue"),
        ("gfim", 3, "than its members"),
        ("datainf", -3, "none that 32 records have"),
        ("datainf", 40, "none that 32 records have"),
    ],
)
def test_a_part_that_no_records_come_to_is_refused(
    method: str, factor: int, words: str, trainable: Trainable, records: list[Encoded], asked: list[Encoded]
) -> None:
    it, parties = strategy(method), members(trainable, records)
    state = begun(it, trainable, asked)
    for leg in (0, 1):
        turn, sums = Turn(1, leg, 1, 3), Sums()
        for name, task in it.plan(state, turn, sorted(parties)).items():
            reply = it.work(task, parties[name])
            if leg and name == "east":
                reply = Reply({key: factor * one for key, one in reply.summed.items()}, reply.summed_facts)
            sums.add(reply)
        if not leg:
            state = it.combine(state, turn, sums, {})
    with pytest.raises(UserError, match=words):
        it.combine(state, turn, sums, {})


def test_values_that_were_cut_are_told(trainable: Trainable, asked: list[Encoded]) -> None:
    it = strategy()
    with pytest.raises(UserError, match="2 values were too large for the sum"):
        it.combine(begun(it, trainable, asked), Turn(1, 0, 1, 3), Sums.of({}, {"records": 9.0}, 3, cut=2), {})


def test_a_task_holds_what_its_leg_needs_alone() -> None:
    tensors = {f"{group}/a": torch.ones(1, 1, 1) for group in ("model", "size", "target", "direction")}
    state = State(tensors, {"names": "all", "records": 9})
    last = ["direction/a", "model/a"], {"names": "all"}
    expected: dict[str, list[Any]] = {
        "gfim": [(["model/a"], {}), (["model/a", "size/a"], {}), last],
        "datainf": [(["model/a"], {}), (["damping/a", "model/a", "target/a"], {"records": 9}), last],
        "hessian_free": [last],
    }
    for method, tasks in expected.items():
        it = strategy(method)
        found = [it.plan(state, Turn(1, leg, 1, 3), ["east"])["east"] for leg in range(it.legs)]
        assert [(sorted(task.tensors), task.facts) for task in found] == tasks
