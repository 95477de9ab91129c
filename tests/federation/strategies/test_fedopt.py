"""Optimisers at the coordinator against their formulas in scalars, and against another implementation."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from allmend.federation.strategies.fedopt import FedAdam, FedYogi
from allmend.strategy import State, Sums, Turn, of_group

OPTIONS = {"server_learning_rate": 0.3, "beta1": 0.8, "beta2": 0.9, "tau": 0.01}


def rounds(strategy: Any, clients: Sequence[Any], start: torch.Tensor, count: int) -> list[torch.Tensor]:
    state, found = strategy.init({"x": start}), []
    for number in range(1, count + 1):
        turn, sums = Turn(number, 0, count), Sums()
        tasks = strategy.plan(state, turn, [client.name for client in clients])
        for client in clients:
            sums.add(strategy.work(tasks[client.name], client))
        state = strategy.combine(state, turn, sums, {})
        shared = strategy.shared(state)
        assert shared is not None
        found.append(shared["x"])
    return found


@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_rounds_are_those_of_the_formula(kind: Any, make_toy: Callable[..., Any]) -> None:
    clients = [make_toy("a", 3), make_toy("b", 1)]
    start = torch.tensor([0.5, -1.0, 2.0])
    found = rounds(kind(**OPTIONS), clients, start, 4)
    eta, beta1, beta2, tau = OPTIONS.values()
    for place in range(3):
        x, m, v = float(start[place]), 0.0, tau**2
        change = (3 * float(clients[0].step[place]) + float(clients[1].step[place])) / 4
        for one in found:
            m = beta1 * m + (1 - beta1) * change
            square = change**2
            v = beta2 * v + (1 - beta2) * square
            if kind is FedYogi:
                before = (v - (1 - beta2) * square) / beta2
                v = before - (1 - beta2) * square * math.copysign(1.0, before - square)
            x += eta * m / (math.sqrt(v) + tau)
            assert float(one[place]) == pytest.approx(x, abs=1e-5)


def test_yogi_forgets_a_large_change_more_slowly() -> None:
    v, square = torch.tensor(4.0), torch.tensor(0.01)
    adam, yogi = FedAdam().second_moment(v, square), FedYogi().second_moment(v, square)
    assert adam < yogi < v


def test_without_adaptivity_and_memory_it_is_fedavg(make_toy: Callable[..., Any]) -> None:
    """τ far above all changes and no memory: x ← x + (η / τ) Δ."""
    clients, start = [make_toy("a", 2), make_toy("b", 5)], torch.zeros(3)
    tau = 1e6
    (found,) = rounds(FedAdam(server_learning_rate=tau, beta1=0.0, beta2=0.0, tau=tau), clients, start, 1)
    mean = (2 * clients[0].step + 5 * clients[1].step) / 7
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-6)


def test_moments_go_on_through_a_checkpoint_and_types_stay(make_toy: Callable[..., Any]) -> None:
    strategy = FedAdam()
    start = torch.ones(3, dtype=torch.bfloat16)
    state = strategy.init({"x": start})
    assert state.tensors["second/x"].eq(strategy.tau**2).all()
    client, turn = make_toy("a"), Turn(1, 0, 1)
    sums = Sums()
    sums.add(strategy.work(strategy.plan(state, turn, ["a"])["a"], client))
    after = strategy.combine(State(dict(state.tensors)), turn, sums, {})
    assert of_group("model", after.tensors)["x"].dtype == torch.bfloat16
    assert after.tensors["first/x"].abs().sum() > 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("server_learning_rate", 0.0),
        ("tau", 0.0),
        ("tau", math.inf),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("beta2", math.nan),
    ],
)
@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_impossible_options_are_refused(kind: Any, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        kind(**{option: value})
