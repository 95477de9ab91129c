"""An arm: what it tells, what it saves, and that it leaves the base model as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from allmend.events import ArmStarted, Event, PhaseDone, RoundDone, StepDone, WorkDone
from allmend.federation.arm import save_outcomes, strategy_of, tokens_per_round, train_arm, trainable_of
from allmend.federation.checkpoint import Checkpoints
from allmend.models.load import LoadedModel
from allmend.recipe import Adapter, Arm, Engine, StrategyChoice, Train


def make_arm(strategy: str, train: Train, **adapter: Any) -> Arm:
    return Arm("arm", Adapter(rank=2, **adapter), train, StrategyChoice(name=strategy, rounds=2))


@pytest.fixture
def loaded(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> LoadedModel:
    return LoadedModel(make_tiny_model(), tiny_tokenizer, "tiny", tmp_path / "tiny", "digest")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_base_is_as_it_was_whatever_happened(kind: Any, loaded: LoadedModel, settings: Train) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}

    def breaks() -> None:
        with trainable_of(loaded, Adapter(kind=kind, rank=2), seed=0) as trainable:
            assert trainable.kind == kind
            with torch.no_grad():
                for parameter in trainable.parameters().values():
                    parameter += 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    after = loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_seed_and_options_reach_the_strategy(settings: Train) -> None:
    arm = Arm("a", Adapter(), settings, StrategyChoice.model_validate({"name": "fedavg", "participation": 0.5}))
    strategy = strategy_of(arm, seed=9)
    assert (strategy.name, strategy.participation, strategy.seed) == ("fedavg", 0.5, 9)  # type: ignore[attr-defined]


@pytest.mark.parametrize("strategy", ["fedavg", "local"])
def test_an_arm_tells_every_step_and_round_and_saves_its_outcomes(
    strategy: str, loaded: LoadedModel, make_member: Callable[..., Any], settings: Train, tmp_path: Path
) -> None:
    arm, events = make_arm(strategy, settings), list[Event]()
    members = [make_member("a", records=3), make_member("b", records=5)]
    checkpoints = Checkpoints(tmp_path, "id")
    with trainable_of(loaded, arm.adapter, seed=0) as trainable:
        outcomes = train_arm(
            arm, trainable, members, seed=0, engine=Engine(), checkpoints=checkpoints, emit=events.append
        )
        save_outcomes(tmp_path, outcomes, trainable, "tiny")
    assert events[0] == ArmStarted(arm="arm", strategy=strategy, round=1, rounds=2, trainable=trainable.count)
    assert isinstance(events[-1], PhaseDone)
    steps = [event for event in events if isinstance(event, StepDone)]
    rounds = [event for event in events if isinstance(event, RoundDone)]
    assert [(e.client, e.round, e.step) for e in steps] == [
        *(("a", 1, 1), ("a", 1, 2), ("b", 1, 1), ("b", 1, 2), ("b", 1, 3)),
        *(("a", 2, 3), ("a", 2, 4), ("b", 2, 4), ("b", 2, 5), ("b", 2, 6)),
    ]
    for event in rounds:
        own = [step for step in steps if step.round == event.round]
        assert event.tokens == sum(step.tokens for step in own)
        assert event.loss is not None
        assert min(step.loss for step in own) <= event.loss <= max(step.loss for step in own)
    # all records once a round, for whole epochs
    everything = sum(len(record) for member in members for record in member.records)
    assert [event.tokens for event in rounds] == [everything, everything]
    shares = [event.share for event in events if isinstance(event, WorkDone)]
    assert shares == sorted(shares)
    assert tokens_per_round(arm, members) == pytest.approx(everything, rel=0.4)  # an estimate, for the time left
    names = {None: "adapter"} if strategy == "fedavg" else {name: f"members/{name}/adapter" for name in ("a", "b")}
    assert outcomes.keys() == names.keys()
    for name, folder in names.items():
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        tensors = outcomes[name]
        assert tensors is not None
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[key], tensors[key]) for key in saved)


def test_a_trained_arm_trains_no_more(
    loaded: LoadedModel, make_member: Callable[..., Any], settings: Train, tmp_path: Path
) -> None:
    arm, members, found = make_arm("fedavg", settings), [make_member("a")], []
    for _ in range(2):
        events: list[Event] = []
        with trainable_of(loaded, arm.adapter, seed=0) as trainable:
            outcomes = train_arm(
                arm,
                trainable,
                members,
                seed=0,
                engine=Engine(),
                checkpoints=Checkpoints(tmp_path, "id"),
                emit=events.append,
            )
        found.append((outcomes[None], events))
    (first, _), (second, events) = found
    assert first is not None
    assert second is not None
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(isinstance(event, StepDone | RoundDone) for event in events)
    assert isinstance(events[0], ArmStarted)
    assert events[0].round == 3
