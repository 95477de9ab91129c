"""Groups by sketches: members of a kind find each other, sums are of groups, and where there are none there is one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from allmend.federation.member import MemberClient
from allmend.federation.strategies import build_strategy
from allmend.federation.strategies.clustered import Clustered
from allmend.federation.strategies.several import RETURN, TRAIN
from allmend.models.tensors import Tensors, dump, parse
from allmend.recipe import Train
from allmend.strategy import Seen, State, Sums, Task, Trained, Turn, of_group

RATE, SIZE = 0.2, 40


@dataclass
class Cloud:
    """A member whose loss is the mean of ½ |x − a|² over its points a [n, d]; a step of gradient descent a round."""

    name: str
    points: torch.Tensor
    initial: Tensors = field(default_factory=lambda: {"x": torch.zeros(SIZE)})
    state: State = field(default_factory=State)
    asked: list[Tensors] = field(default_factory=list)

    @property
    def examples(self) -> int:
        return len(self.points)

    def train(self, start: Tensors, turn: Turn, **_: Any) -> Trained:
        return Trained({"x": start["x"] - RATE * (start["x"] - self.points.mean(0))}, 1.0, 1, 1, {})

    def gradient(
        self, at: Tensors, turn: Turn, *, records: int | None = None, part: tuple[int, int] = (0, 1)
    ) -> Tensors:
        self.asked.append(at)
        return {"x": at["x"] - self.points[part[0] :: part[1]].mean(0)}


def clouds(kinds: int, each: int, *, seed: int = 0, distance: float = 2.0) -> dict[str, Cloud]:
    """Members `m0`, `m1`, … of kinds in turn, whose points lie around their kind's centre."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number in range(kinds * each):
        centre = torch.zeros(SIZE)
        centre[number % kinds] = distance
        name = f"m{number:02d}"
        found[name] = Cloud(name, centre + torch.randn(16, SIZE, generator=generator))
    return found


def play(
    strategy: Clustered, clients: Mapping[str, Cloud], first: int, last: int, rounds: int, state: State | None = None
) -> tuple[State, list[set[str]]]:
    """Some rounds; gives the state and whose tensors each training leg summed."""
    state = state or strategy.init(next(iter(clients.values())).initial)
    worked = []
    for round in range(first, last + 1):
        for leg in (TRAIN, RETURN):
            turn, seen, sums = Turn(round, leg, rounds, len(clients)), {}, Sums()
            tasks = strategy.plan(state, turn, list(clients))
            for name, task in tasks.items():
                sent = Task(turn, *parse(dump(task.tensors, task.facts)), task.seen)
                reply = strategy.work(sent, clients[name])
                assert strategy.declare().undeclared(reply) == []
                assert reply.summed.keys() <= strategy.layout(clients[name].initial, leg).keys()
                sums.add(reply)
                seen[name] = Seen(reply.seen, reply.seen_facts)
            if leg == TRAIN:
                worked.append(set(tasks))
            state = strategy.combine(state, turn, sums, seen)
            state = State(*parse(dump(state.tensors, state.facts)))
    return state, worked


def groups(state: State) -> dict[str, int]:
    return {name.removeprefix("group/"): int(group) for name, group in state.facts.items() if name.startswith("group/")}


def personal(strategy: Clustered, state: State, client: Cloud) -> torch.Tensor:
    model = strategy.personal(state, client.state)
    assert model is not None
    return model["x"]


def test_kinds_are_found_and_each_has_the_model_of_its_members() -> None:
    clients, strategy = clouds(3, 4), Clustered(common_rounds=0.1)
    state, _ = play(strategy, clients, 1, 40, 40)

    found = groups(state)
    assert len(set(found.values())) == 3
    for kind in range(3):
        own = [name for number, name in enumerate(clients) if number % 3 == kind]
        assert len({found[name] for name in own}) == 1
        optimum = torch.stack([clients[name].points.mean(0) for name in own]).mean(0)
        for name in own:
            assert torch.allclose(personal(strategy, state, clients[name]), optimum, atol=1e-2)


def test_where_members_are_alike_there_is_one_group() -> None:
    """By chance a cut passes in a tenth of draws: of ten, hardly in five."""
    found = []
    for seed in range(10):
        clients = clouds(1, 12, seed=seed)
        state, _ = play(Clustered(common_rounds=0.1, min_group=1), clients, 1, 10, 10)
        found.append(len(set(groups(state).values())))
    assert found.count(1) >= 6


def test_before_groups_are_found_it_is_fedavg() -> None:
    clients, strategy = clouds(2, 4), Clustered(common_rounds=1.0)
    state, _ = play(strategy, clients, 1, 2, 3)

    mean = torch.stack([client.points.mean(0) for client in clients.values()]).mean(0)
    assert torch.allclose(of_group("model-0", state.tensors)["x"], mean * (1 - (1 - RATE) ** 2), atol=1e-5)
    assert groups(state) == {}
    assert not any(client.asked for client in clients.values())


def test_all_tell_of_the_same_point_and_only_once() -> None:
    clients = clouds(2, 4)
    play(Clustered(common_rounds=0.2), clients, 1, 10, 10)

    points = [at["x"] for client in clients.values() for at in client.asked]
    assert len(points) == 2 * len(clients)
    assert all(torch.equal(point, points[0]) for point in points)


def test_small_groups_train_alone_and_are_in_no_sum() -> None:
    clients = clouds(2, 4)
    odd = torch.zeros(SIZE)
    odd[5] = 5.0
    clients["odd1"], clients["odd2"] = (
        Cloud(name, odd + torch.randn(16, SIZE, generator=torch.Generator().manual_seed(seed)))
        for seed, name in enumerate(("odd1", "odd2"))
    )
    strategy = Clustered(common_rounds=0.1, min_group=3)
    state, _ = play(strategy, clients, 1, 40, 40)

    found = groups(state)
    assert found["odd1"] == found["odd2"] == -1
    assert sorted(set(found.values())) == [-1, *sorted(set(found.values()) - {-1})]
    for name in ("odd1", "odd2"):
        assert torch.allclose(personal(strategy, state, clients[name]), clients[name].points.mean(0), atol=1e-2)
        reply = strategy.work(Task(Turn(9, TRAIN, 10)), clients[name])
        assert reply.summed == {}


def test_a_group_of_which_too_few_are_here_waits() -> None:
    clients, strategy = clouds(2, 4), Clustered(common_rounds=0.1, min_group=3)
    state, _ = play(strategy, clients, 1, 4, 10)
    here = {name: client for name, client in clients.items() if name not in ("m01", "m03")}
    before = {name: tensor for name, tensor in state.tensors.items() if name.startswith("model-")}

    state, worked = play(strategy, here, 5, 5, 10, state)

    assert worked == [{"m00", "m02", "m04", "m06"}]
    waiting = groups(state)["m05"]
    assert torch.equal(state.tensors[f"model-{waiting}/x"], before[f"model-{waiting}/x"])


def test_who_comes_late_joins_its_kind() -> None:
    clients, strategy = clouds(2, 5), Clustered(common_rounds=0.1)
    first = {name: client for name, client in clients.items() if name != "m03"}
    state, _ = play(strategy, first, 1, 5, 10)

    state, worked = play(strategy, clients, 6, 7, 10, state)

    assert "m03" not in worked[0]
    assert "m03" in worked[1]
    assert groups(state)["m03"] == groups(state)["m01"] != groups(state)["m00"]


def test_a_gradient_that_is_no_number_leaves_its_member_out_of_the_groups() -> None:
    clients = clouds(2, 4)
    clients["m02"].gradient = lambda *_, **__: {"x": torch.full((SIZE,), math.nan)}  # type: ignore[method-assign]
    state, _ = play(Clustered(common_rounds=0.1), clients, 1, 4, 10)

    assert set(groups(state)) == set(clients) - {"m02"}


@pytest.mark.parametrize(
    ("option", "value"),
    [("most_groups", 0), ("common_rounds", 0.0), ("min_group", 0), ("probe_records", 1), ("sketch_size", 0)],
)
def test_impossible_options_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        build_strategy("clustered", {option: value}, seed=0)


def test_halves_of_the_records_are_parts_of_the_gradient(
    make_trainable: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    """Both halves, weighed by their tokens, are the whole; a single record has no halves."""
    trainable = make_trainable()
    client = MemberClient(make_member("north", records=6), trainable, settings, trainable.state())
    turn, at = Turn(1, RETURN, 3), trainable.state()
    whole = client.gradient(at, turn)
    halves = [client.gradient(at, turn, part=(half, 2)) for half in range(2)]
    tokens = [
        sum(int((record.target & (record.position > 0)).sum()) for record in client.records[half::2])
        for half in range(2)
    ]
    for name, tensor in whole.items():
        mean = sum(count * half[name] for count, half in zip(tokens, halves, strict=True)) / sum(tokens)
        assert torch.allclose(mean, tensor, atol=1e-6), name
    single = MemberClient(make_member("lone", records=1), trainable, settings, trainable.state())
    assert all(torch.equal(single.gradient(at, turn, part=(1, 2))[n], t) for n, t in single.gradient(at, turn).items())
