"""Strategies by name: only what exists, with options that fit; and the protocol that all of them keep."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from allmend.federation.strategies import STRATEGIES, build_strategy, options_of
from allmend.models.tensors import dump, parse
from allmend.strategy import Seen, State, Sums, Turn, shapes


def test_an_unknown_strategy_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match=r"'fedsgd'.*centralised, .*fedavg,.*local"):
        build_strategy("fedsgd", {}, seed=0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fedavg", {"fraction": 0.5}, "no option fraction .*participation"),
        ("centralised", {"participation": 0.5}, "has no options"),
        ("fedavg", {"seed": 3}, "no option seed"),
        ("fedavg", {"participation": 0.0}, "participation"),
        ("fedavg", {"participation": 1.5}, "1.5"),
        ("fedavg", {"participation": float("nan")}, "nan"),
        ("fedavg", {"participation": "half"}, "a number, got 'half'"),
        ("fedavg", {"participation": True}, "a number, got True"),
        ("fedavg", {"participation": {"a": 1}}, "a number"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_strategy(name, options, seed=0)


def test_the_recipes_seed_reaches_the_strategies_that_have_one() -> None:
    assert build_strategy("fedavg", {"participation": 1}, seed=5).seed == 5  # type: ignore[attr-defined]
    assert options_of("fedavg") == {"participation": 1.0}


TOYS = sorted(set(STRATEGIES) - {"fedavg_product", "clustered", "cobo", "comigs"})
"""Strategies that do not mind what learns; the others have their own tests of the same."""

LEAVES_OUT = {"finetuned"}
"""Strategies in some of whose rounds nothing leaves."""


@pytest.mark.parametrize("name", TOYS)
def test_every_strategy_keeps_the_protocol(name: str, make_toy: Callable[..., Any]) -> None:
    """Its replies are declared, its messages are tensors and JSON, and plans name members only."""
    strategy = build_strategy(name, {"groups": "a b, e d c"} if name == "grouped" else {}, seed=0)
    clients = {n: make_toy(n, 3) for n in (["all"] if strategy.pooled else ["b", "a", "e", "d", "c"])}
    state = strategy.init({"x": torch.ones(3)})
    for round in (1, 2):
        for leg in range(strategy.legs):
            turn = Turn(round, leg, 2)
            tasks = strategy.plan(state, turn, list(clients))
            assert set(tasks) <= set(clients)
            sums, seen = Sums(), {}
            for member, task in tasks.items():
                dump(task.tensors, task.facts)
                reply = strategy.work(task, clients[member])
                assert strategy.declare().undeclared(reply) == []
                layout = strategy.layout(clients[member].initial, leg)
                assert shapes(reply.summed).items() <= layout.items()
                assert reply.summed or name in LEAVES_OUT or not layout
                sums.add(reply)
                seen[member] = Seen(reply.seen, reply.seen_facts)
            state = strategy.combine(state, turn, sums, seen)
        tensors, facts = parse(dump(state.tensors, state.facts))
        assert tensors.keys() == state.tensors.keys()
        state = State(tensors, facts)
        for client in clients.values():
            client.state = State(*parse(dump(client.state.tensors, client.state.facts)))
    outcomes = [strategy.shared(state)] + [strategy.personal(state, client.state) for client in clients.values()]
    assert any(outcomes)
    assert all(set(tensors) == {"x"} for tensors in outcomes if tensors is not None)
    assert (outcomes[0] is None) == all(tensors is not None for tensors in outcomes[1:])
