"""Federated averaging against its definition, written out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from allmend.federation.member import MemberClient
from allmend.federation.strategies.centralised import Centralised
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.recipe import Train
from allmend.strategy import Reply, State, Sums, Task, Turn, of_group

MEMBERS = [f"m{index}" for index in range(7)]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def one_round(clients: Sequence[Any], start: torch.Tensor, strategy: FedAvg | None = None) -> torch.Tensor:
    strategy = strategy or FedAvg()
    state, turn = strategy.init({"x": start}), Turn(1, 0, 1)
    tasks = strategy.plan(state, turn, [client.name for client in clients])
    sums = Sums()
    for client in clients:
        sums.add(strategy.work(tasks[client.name], client))
    shared = strategy.shared(strategy.combine(state, turn, sums, {}))
    assert shared is not None
    return shared["x"]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.integers(0, 99))
@settings_of_hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_round_is_the_weighted_mean_of_the_members_models(
    make_toy: Callable[..., Any], weights: list[int], seed: int
) -> None:
    clients = [make_toy(f"m{index}", weight) for index, weight in enumerate(weights)]
    start = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    found = one_round(clients, start)
    models = [(start + client.step).double() for client in clients]
    mean = sum(w * model for w, model in zip(weights, models, strict=True)) / sum(weights)
    torch.testing.assert_close(found.double(), mean, **CLOSE)
    low, high = torch.stack(models).amin(0), torch.stack(models).amax(0)
    assert ((found >= low - 1e-5) & (found <= high + 1e-5)).all()


def test_identical_members_are_one_member(make_toy: Callable[..., Any]) -> None:
    start, one = torch.ones(3), make_toy("a", 5)
    alone = one_round([one], start)
    torch.testing.assert_close(alone, start + one.step, **CLOSE)
    for count in (2, 3, 7):
        copies = [make_toy("a", 5) for _ in range(count)]
        for index, copy in enumerate(copies):
            copy.name = f"copy {index}"
        torch.testing.assert_close(one_round(copies, start), alone, **CLOSE)


def test_the_type_of_the_parameters_stays(make_toy: Callable[..., Any]) -> None:
    clients = [make_toy("a", 3), make_toy("b", 2)]
    assert one_round(clients, torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_loss_that_must_not_leave_does_not(make_toy: Callable[..., Any], make_quiet_toy: Callable[..., Any]) -> None:
    task = FedAvg().plan(FedAvg().init({"x": torch.ones(3)}), Turn(1, 0, 1), ["a"])["a"]
    loud, quiet = (FedAvg().work(task, make("a", 3)) for make in (make_toy, make_quiet_toy))
    assert loud.summed_facts == {"weight": 3.0, "loss": 3 * float(make_toy("a").step.sum())}
    assert quiet.summed_facts == {"weight": 3.0}
    assert torch.equal(loud.summed["update/x"], quiet.summed["update/x"])


# --- who takes part


@given(st.integers(1, 40), st.floats(0.001, 1.0), st.integers(0, 2**31 - 1), st.integers(1, 999))
def test_sampling_takes_the_right_number_and_is_deterministic(
    members: int, participation: float, seed: int, number: int
) -> None:
    names = [f"m{index}" for index in range(members)]
    strategy = FedAvg(participation=participation, seed=seed)
    tasks = strategy.plan(State(), Turn(number, 0, 999), names)
    assert len(tasks) == max(1, round(participation * members))
    assert abs(len(tasks) - participation * members) <= 1
    assert set(tasks) <= set(names)
    again = FedAvg(participation=participation, seed=seed).plan(State(), Turn(number, 0, 5), names[::-1])
    assert list(again) == list(tasks)  # in whatever order the members are named


def test_everyone_takes_part_about_equally_often() -> None:
    strategy, rounds = FedAvg(participation=3 / 7, seed=1), 700
    counts = dict.fromkeys(MEMBERS, 0)
    for number in range(1, rounds + 1):
        for name in strategy.plan(State(), Turn(number, 0, rounds), MEMBERS):
            counts[name] += 1
    assert sum(counts.values()) == 3 * rounds
    spread = math.sqrt(rounds * 3 / 7 * 4 / 7)
    assert all(abs(count - 300) < 4.5 * spread for count in counts.values())


def test_rounds_and_seeds_draw_differently() -> None:
    def drawn(seed: int) -> list[tuple[str, ...]]:
        strategy = FedAvg(participation=0.4, seed=seed)
        return [tuple(strategy.plan(State(), Turn(number, 0, 9), MEMBERS)) for number in range(1, 10)]

    assert len(set(drawn(0))) > 3
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize("participation", [0.0, -0.1, 1.0001, math.nan])
def test_impossible_shares_are_refused(participation: float) -> None:
    with pytest.raises(ValueError, match="participation"):
        FedAvg(participation=participation)


# --- with a real model


class ForgetsOptimizer(Centralised):
    """Centralised training whose optimiser starts afresh each round."""

    def work(self, task: Task, client: Any) -> Reply:
        reply = super().work(task, client)
        client.state.tensors = {n: t for n, t in client.state.tensors.items() if not n.startswith("optimizer/")}
        return reply


def difference(first: Any, second: Any) -> float:
    first, second = of_group("model", first.state.tensors), of_group("model", second.state.tensors)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_one_member_alone_is_centralised_training_with_a_fresh_optimizer_each_round(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    member = [make_member("a")]
    averaged = run(FedAvg(), member, settings, rounds=3)
    moved = max(
        (t - of_group("model", run(FedAvg(), member, settings, rounds=1).state.tensors)[n]).abs().max().item()
        for n, t in of_group("model", averaged.state.tensors).items()
    )
    assert moved > 1e-3
    assert difference(averaged, run(ForgetsOptimizer(), member, settings, rounds=3)) < 1e-6
    # in the first round there is no optimiser to keep yet; from the second on, keeping it tells
    one = run(FedAvg(), member, settings, rounds=1)
    assert difference(one, run(Centralised(), member, settings, rounds=1)) < 1e-6
    assert difference(averaged, run(Centralised(), member, settings, rounds=3)) > 1e-4


def test_one_member_alone_is_the_member_by_itself_in_the_first_round(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    member = [make_member("a")]
    shared = of_group("model", run(FedAvg(), member, settings, rounds=1).state.tensors)
    own = Local().personal(State(), run(Local(), member, settings, rounds=1).states["a"])
    assert own is not None
    for name, tensor in own.items():
        torch.testing.assert_close(shared[name], tensor, **CLOSE)


def test_a_round_of_real_training_is_the_weighted_mean(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a", records=2), make_member("b", records=5), make_member("c", records=3)]
    found = of_group("model", run(FedAvg(), members, settings, rounds=1).state.tensors)
    trainable = make_trainable()
    initial = trainable.state()
    models = [MemberClient(m, trainable, settings, initial).train(initial, Turn(1, 0, 1)).tensors for m in members]
    for name in initial:
        mean = (2 * models[0][name].double() + 5 * models[1][name].double() + 3 * models[2][name].double()) / 10
        torch.testing.assert_close(found[name].double(), mean, **CLOSE)


def test_members_with_the_same_data_and_seed_are_one_member(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    one = run(FedAvg(), [make_member("a")], settings, rounds=2)
    three = run(FedAvg(), [make_member(name, data="a") for name in ("x", "y", "z")], settings, rounds=2)
    assert difference(one, three) < 1e-6


def test_names_and_order_of_members_do_not_matter(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    data = ("a", "b", "c")
    plain = run(FedAvg(), [make_member(name) for name in data], settings, rounds=2)
    turned = run(FedAvg(), [make_member(name) for name in reversed(data)], settings, rounds=2)
    assert difference(plain, turned) == 0
    # other names change the order of adding, which float64 hides
    renamed = [make_member(name, data=which) for name, which in zip(("z", "m", "b"), data, strict=True)]
    assert difference(plain, run(FedAvg(), renamed, settings, rounds=2)) < 1e-6


class Without(FedAvg):
    """Averages over those who are not dropped: in a round, one member's task gets lost."""

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        tasks = super().plan(state, turn, members)
        if turn.round == 2:
            del tasks["b"]
        return tasks


class Picks(FedAvg):
    """Samples everyone but `b` in round 2."""

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        return super().plan(state, turn, [name for name in members if (turn.round, name) != (2, "b")])


def test_a_dropped_member_is_one_that_was_not_sampled(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    members = [make_member(name) for name in ("a", "b", "c")]
    dropped = run(Without(), members, settings, rounds=3)
    unsampled = run(Picks(), members, settings, rounds=3)
    assert difference(dropped, unsampled) == 0
    assert dropped.states["b"].facts["steps"] == 2 / 3 * dropped.states["a"].facts["steps"]
    assert difference(dropped, run(FedAvg(), members, settings, rounds=3)) > 1e-4
    # and the round without it is the mean over the others, written out
    first = of_group("model", run(FedAvg(), members, settings, rounds=1).state.tensors)
    trainable = make_trainable()
    others = []
    for member in (members[0], members[2]):
        client = MemberClient(member, trainable, settings, trainable.state(), State(facts={"steps": 2}))
        others.append(client.train(first, Turn(2, 0, 3)).tensors)
    second = of_group("model", run(Without(), members, settings, rounds=2).state.tensors)
    for name in second:
        torch.testing.assert_close(second[name], (others[0][name] + others[1][name]) / 2, **CLOSE)
