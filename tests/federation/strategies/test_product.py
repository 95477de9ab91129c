"""Averaging products of factors: exact where there is room, the nearest where there is not, and able to go on."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allmend.federation.arm import strategy_of
from allmend.federation.member import MemberClient
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.product import FedAvgProduct, factored
from allmend.models.tensors import Tensors, dump, parse
from allmend.recipe import Adapter, Arm, Privacy, StrategyChoice, Train
from allmend.strategy import Reply, State, Sums, Task, Turn, of_group, shapes

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(tensors: Tensors) -> torch.Tensor:
    return tensors[B].double() @ tensors[A].double()


@given(st.integers(1, 6), st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))
@settings(deadline=None)
def test_factors_are_of_the_nearest_matrix_of_their_rank(rank: int, rows: int, columns: int, seed: int) -> None:
    whole = random(rows, columns, seed=seed)
    found = factored(whole, random(rank, columns, seed=seed + 1))
    assert found.a.shape == (rank, columns)
    assert found.b.shape == (rows, rank)
    rest = torch.linalg.svdvals(whole)[rank:].square().sum()
    assert float((whole - found.b @ found.a).square().sum()) == pytest.approx(float(rest), abs=1e-9)
    assert found.lost == pytest.approx(float(rest), abs=1e-9)


def test_what_the_product_leaves_room_for_can_learn() -> None:
    """Where A and B were both zero, no gradient would ever reach them."""
    before = random(4, 6)
    for whole in (torch.zeros(5, 6, dtype=torch.float64), random(5, 2) @ random(2, 6, seed=1)):
        found = factored(whole, before)
        torch.testing.assert_close(found.b @ found.a, whole)
        assert (found.a.norm(dim=1) > 1e-6).all()


def reply_of(factors: Tensors, start: Tensors, weight: float) -> Reply:
    class Trained:
        tensors, loss = factors, 1.0

    class Client:
        examples = weight

        def train(self, start: Tensors, turn: Turn, **options: Any) -> Any:
            return Trained

    return FedAvgProduct().work(Task(Turn(1, 0, 1), start), Client())  # type: ignore[arg-type]


def one_round(members: list[tuple[Tensors, float]], start: Tensors) -> tuple[Tensors, State]:
    strategy, sums = FedAvgProduct(), Sums()
    state = strategy.init(start)
    for factors, weight in members:
        reply = reply_of(factors, start, weight)
        assert strategy.declare().undeclared(reply) == []
        assert shapes(reply.summed) == strategy.layout(start)
        sums.add(reply)
    after = strategy.combine(state, Turn(1, 0, 1), sums, {})
    shared = strategy.shared(after)
    assert shared is not None
    return shared, after


def factors(rank: int = 2, seed: int = 0) -> Tensors:
    return {A: random(rank, 7, seed=seed).float(), B: random(5, rank, seed=seed + 1000).float()}


def test_the_average_of_equal_adapters_is_the_adapter() -> None:
    start, one = factors(seed=1), factors(seed=2)
    shared, state = one_round([(one, 3.0), (one, 5.0), (one, 1.0)], start)
    torch.testing.assert_close(product(shared), product(one), rtol=1e-5, atol=1e-5)
    assert state.facts["discarded"] == pytest.approx(0, abs=1e-9)


def test_beside_one_a_the_average_is_that_of_fedavg_on_b_alone() -> None:
    start = factors(seed=1)
    members = [({A: start[A], B: factors(seed=seed)[B]}, weight) for seed, weight in ((2, 3.0), (3, 1.0), (4, 2.0))]
    shared, state = one_round(members, start)
    mean = sum(weight * tensors[B].double() for tensors, weight in members) / 6
    torch.testing.assert_close(product(shared), mean @ start[A].double(), rtol=1e-5, atol=1e-5)
    assert state.facts["discarded"] == pytest.approx(0, abs=1e-9)


def test_adapters_that_differ_by_a_change_of_basis_are_one_adapter() -> None:
    """(B R)(R⁻¹ A) = B A: their factors' average is another adapter, that of their products is not."""
    start, one = factors(seed=1), factors(seed=2)
    turn = random(2, 2, seed=5)
    other = {A: (torch.linalg.inv(turn) @ one[A].double()).float(), B: (one[B].double() @ turn).float()}
    shared, _ = one_round([(one, 1.0), (other, 1.0)], start)
    torch.testing.assert_close(product(shared), product(one), rtol=1e-4, atol=1e-4)
    naive = {name: (one[name] + other[name]) / 2 for name in one}
    assert (product(naive) - product(one)).abs().max() > 0.1


def test_where_there_is_room_the_average_is_exact_and_else_what_is_lost_is_told() -> None:
    start = {A: random(4, 7).float(), B: torch.zeros(5, 4)}
    narrow = [
        (
            {
                A: torch.cat([factors(seed=s)[A], torch.zeros(2, 7)]),
                B: torch.cat([factors(seed=s)[B], torch.zeros(5, 2)], 1),
            },
            w,
        )
        for s, w in ((1, 2.0), (2, 6.0))
    ]
    mean = (2 * product(narrow[0][0]) + 6 * product(narrow[1][0])) / 8
    shared, state = one_round(narrow, start)  # two of rank 2 make rank 4
    torch.testing.assert_close(product(shared), mean, rtol=1e-4, atol=1e-5)
    assert state.facts["discarded"] == pytest.approx(0, abs=1e-9)
    full = [(factors(4, seed=s), 1.0) for s in (3, 4)]
    shared, state = one_round(full, start)
    mean = (product(full[0][0]) + product(full[1][0])) / 2
    lost = float((product(shared) - mean).square().sum() / mean.square().sum())
    assert state.facts["discarded"] == pytest.approx(lost, rel=1e-3)
    assert lost > 1e-4


def test_a_reply_alone_reveals_the_members_model() -> None:
    start, one = factors(seed=1), factors(seed=2)
    revealed = FedAvgProduct().revealed(Task(Turn(1, 0, 1), start), reply_of(one, start, 4.0))
    assert revealed is not None
    torch.testing.assert_close(product(revealed), product(one), rtol=1e-4, atol=1e-4)


def test_members_with_the_same_data_and_seed_are_one_member_in_what_their_model_says(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings_of: Train
) -> None:
    one = run(FedAvgProduct(), [make_member("a")], settings_of, rounds=1)
    three = run(FedAvgProduct(), [make_member(name, data="a") for name in "xyz"], settings_of, rounds=1)
    trainable = make_trainable()
    alone = MemberClient(make_member("a"), trainable, settings_of, trainable.state()).train(
        trainable.state(), Turn(1, 0, 1)
    )
    for outcome in (one, three):
        model = of_group("model", outcome.state.tensors)
        assert shapes(model) == shapes(alone.tensors)
        for name in model:
            if name.endswith("lora_A.weight"):
                twin = name.replace("lora_A", "lora_B")
                made, expected = model[twin] @ model[name], alone.tensors[twin] @ alone.tensors[name]
                torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6)
    tensors, facts = parse(dump(three.state.tensors, three.state.facts))
    assert tensors.keys() == three.state.tensors.keys()
    assert facts == three.state.facts


def test_it_goes_on_learning_round_after_round(
    run: Callable[..., Any], make_member: Callable[..., Any], settings_of: Train
) -> None:
    members = [make_member("a"), make_member("b")]
    states = [of_group("model", run(FedAvgProduct(), members, settings_of, rounds=n).state.tensors) for n in (1, 2, 3)]
    for before, after in pairwise(states):
        assert max((after[name] - before[name]).abs().max().item() for name in after) > 1e-4


def test_only_factors_have_products() -> None:
    with pytest.raises(ValueError, match="something else learns here"):
        FedAvgProduct().layout({"x": torch.zeros(3)})
    arm = Arm("a", Adapter(kind="full"), Train(), StrategyChoice(name="fedavg_product"), Privacy())
    with pytest.raises(ValueError, match=r"adapter\.kind must be 'lora'"):
        strategy_of(arm, seed=0)
    with pytest.raises(ValueError, match=r"learns = 'b'.*take fedavg"):
        strategy_of(replace(arm, adapter=Adapter(learns="b")), seed=0)
    with pytest.raises(ValueError, match="come in pairs, and layer has one"):
        FedAvgProduct().layout({B: torch.zeros(5, 2)})
    assert isinstance(strategy_of(Arm("a", Adapter(), Train(), arm.strategy, Privacy()), seed=0), FedAvg)


@pytest.fixture
def settings_of(settings: Train) -> Train:
    """Under another name: hypothesis has its own `settings`."""
    return settings


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_a_member_of_lower_rank_sends_the_exact_change_of_its_own_components(
    rank: int, make_member: Callable[..., Any], make_trainable: Callable[..., Any]
) -> None:
    trainable = make_trainable()
    start = {name: tensor + 0.1 for name, tensor in trainable.state().items()}
    client = MemberClient(replace(make_member("a"), rank=rank), trainable, Train(batch_size=2), start)
    reply = FedAvgProduct().work(Task(Turn(1, 0, 1), start), client)
    inside = trainable.state()  # what was trained, with nothing in the components beyond its rank
    for name, change in of_group("product", reply.summed).items():
        a, b = (inside[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
        before = start[f"{name}.lora_B.weight"][:, :rank].double() @ start[f"{name}.lora_A.weight"][:rank].double()
        expected = (b @ a - before) * client.examples
        torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-6)
        assert torch.linalg.matrix_rank(b @ a) <= rank
