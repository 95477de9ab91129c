"""What the baselines of personal models have in common: they go on where they stopped, on any engine, for any names."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.federation.checkpoint import Checkpoints
from allmend.federation.engines import Answer
from allmend.federation.engines.hiding import HidingEngine
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.engines.workers import WorkerEngine
from allmend.federation.privacy.vectors import codes_of_legs, rounding
from allmend.federation.strategies import build_strategy
from allmend.models.tensors import Tensors, dump
from allmend.recipe import SecureAggregation, Train
from allmend.strategy import State, Strategy, Task

OPTIONS: dict[str, dict[str, Any]] = {
    "ditto": {},
    "finetuned": {"local_rounds": 0.5},
    "ifca": {"groups": 2},
    "grouped": {"groups": "a c, b", "others": "alone"},
    "clustered": {"common_rounds": 0.3, "min_group": 1},
}
NAMES = sorted(OPTIONS)


@pytest.fixture
def members(make_member: Callable[..., Any]) -> list[Any]:
    return [make_member("a"), make_member("b", records=7), make_member("c", records=3), make_member("d")]


@dataclass
class Breaks(InProcessEngine):
    """Dies in the round after some."""

    after: int = 0

    def work(self, strategy: Strategy, tasks: Mapping[str, Task]) -> Iterator[Answer]:
        if any(task.turn.round > self.after for task in tasks.values()):
            raise KeyboardInterrupt
        return super().work(strategy, tasks)


def states(outcome: Any) -> dict[str, bytes]:
    return {name: dump(state.tensors, state.facts) for name, state in outcome.states.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    name: str,
    run: Callable[..., Any],
    members: list[Any],
    make_trainable: Callable[..., Any],
    settings: Train,
    tmp_path: Path,
) -> None:
    strategy = build_strategy(name, OPTIONS[name], seed=2)
    whole = run(strategy, members, settings, rounds=4)
    for stop in (1, 2, 3):
        folder, trainable = tmp_path / str(stop), make_trainable()
        engine = Breaks(trainable, members, settings, lambda name, turn, step: None, stop)
        with pytest.raises(KeyboardInterrupt):
            run(strategy, members, settings, rounds=4, engine=engine, trainable=trainable, folder=folder)
        start = Checkpoints(folder, "identity").newest()
        assert start is not None
        assert start.round == stop
        found = run(strategy, members, settings, rounds=4, start=start, folder=folder)
        assert dump(found.state.tensors, found.state.facts) == dump(whole.state.tensors, whole.state.facts)
        assert states(found) == states(whole)


@pytest.mark.parametrize("name", NAMES)
def test_behind_masks_it_is_the_same(
    name: str, run: Callable[..., Any], members: list[Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    """Local rounds and the last leg, in which nothing is summed, included."""
    strategy = build_strategy(name, OPTIONS[name], seed=2)
    plain = run(strategy, members, settings, rounds=4)
    trainable = make_trainable()
    layer = SecureAggregation(clip=1.0, largest_weight=64)
    codes = codes_of_legs(strategy, trainable.state(), layer, len(members))
    inner = InProcessEngine(trainable, members, settings, lambda name, turn, step: None)
    engine = HidingEngine(inner, codes, lambda turn, name: rounding("seeded", 0, "arm", turn, name), layer.fewest)
    hidden = run(strategy, members, settings, rounds=4, engine=engine, trainable=trainable)
    for key, tensor in plain.state.tensors.items():
        torch.testing.assert_close(hidden.state.tensors[key], tensor, rtol=0, atol=1e-4)
    assert hidden.state.facts == plain.state.facts


@pytest.mark.parametrize("name", NAMES)
def test_worker_processes_make_the_same(
    name: str, run: Callable[..., Any], members: list[Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    strategy = build_strategy(name, OPTIONS[name], seed=2)
    here = run(strategy, members, settings, rounds=2)
    trainable = make_trainable()
    engine = WorkerEngine(trainable, members, settings, lambda name, turn, step: None, workers=1, threads=1)
    try:
        there = run(strategy, members, settings, rounds=2, engine=engine, trainable=trainable)
    finally:
        engine.close()
    assert dump(there.state.tensors, there.state.facts) == dump(here.state.tensors, here.state.facts)
    assert states(there) == states(here)


@pytest.mark.parametrize("name", NAMES)
def test_members_with_the_same_data_and_seed_have_the_same_model_and_other_names_change_nothing(
    name: str, run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    options = {"groups": "a b, c", "others": "refuse"} if name == "grouped" else OPTIONS[name]
    strategy = build_strategy(name, {**options, "groups": 1} if name == "ifca" else options, seed=2)
    alike = [make_member(member, data=data) for member, data in (("a", "x"), ("b", "x"), ("c", "y"))]
    found = personal(strategy, run(strategy, alike, settings, rounds=3))
    assert largest(found["a"], found["b"]) < 1e-6
    assert largest(found["a"], found["c"]) > 1e-4 or name in ("ifca", "clustered")  # which have one model here
    new = {"a": "z", "b": "m", "c": "k"}
    renamed = [replace(member, name=new[member.name]) for member in alike]
    if name == "grouped":
        strategy = build_strategy(name, options | {"groups": "z m, k"}, seed=2)
    again = personal(strategy, run(strategy, renamed[::-1], settings, rounds=3))
    assert all(largest(found[old], again[name]) < 1e-6 for old, name in new.items())


def personal(strategy: Strategy, outcome: Any) -> dict[str, Tensors]:
    found = {name: strategy.personal(State(), state) for name, state in outcome.states.items()}
    return {name: tensors for name, tensors in found.items() if tensors is not None}


def largest(first: Tensors, second: Tensors) -> float:
    return max(float((tensor - second[name]).abs().max()) for name, tensor in first.items())
