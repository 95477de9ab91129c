"""Ditto: FedAvg's model as it is, and members' own beside it, against FedAvg, local training and a step by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from allmend.events import RoundDone
from allmend.federation.member import LEARNT, MemberClient
from allmend.federation.strategies.ditto import Ditto
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.models.tensors import Tensors
from allmend.recipe import Train
from allmend.strategy import State, Turn, of_group


@pytest.fixture
def members(make_member: Callable[..., Any]) -> list[Any]:
    return [make_member("a"), make_member("b", records=7)]


def own(outcome: Any, strategy: Any) -> dict[str, Tensors]:
    return {name: strategy.personal(State(), state) for name, state in outcome.states.items()}


@pytest.mark.parametrize("kept", ["reset", "persist"])
def test_without_the_term_members_models_are_those_of_local_training_bit_for_bit(
    kept: str, run: Callable[..., Any], members: list[Any], settings: Train
) -> None:
    settings = settings.model_copy(update={"optimizer_state": kept})
    found, local = (run(strategy, members, settings, rounds=3) for strategy in (Ditto(proximal=0.0), Local()))
    for name, tensors in own(local, Local()).items():
        assert all(torch.equal(own(found, Ditto())[name][key], tensor) for key, tensor in tensors.items()), name


@pytest.mark.parametrize("kept", ["reset", "persist"])
def test_the_common_model_is_fedavgs_bit_for_bit(
    kept: str, run: Callable[..., Any], members: list[Any], settings: Train
) -> None:
    settings = settings.model_copy(update={"optimizer_state": kept})
    found, plain = (run(strategy, members, settings, rounds=3) for strategy in (Ditto(proximal=5.0), FedAvg()))
    assert found.state.tensors.keys() == plain.state.tensors.keys()
    assert all(torch.equal(found.state.tensors[name], tensor) for name, tensor in plain.state.tensors.items())
    assert Ditto().shared(found.state) is None


def test_it_costs_twice_the_steps_and_no_more_bytes(
    run: Callable[..., Any], members: list[Any], settings: Train
) -> None:
    found, plain = (run(strategy, members, settings, rounds=2) for strategy in (Ditto(), FedAvg()))
    for name, state in plain.states.items():
        assert torch.equal(found.states[name].tensors[LEARNT], 2 * state.tensors[LEARNT])
        assert found.states[name].facts["steps"] == state.facts["steps"]
    traffic = [[(e.sent, e.received, e.loss) for e in one.events if isinstance(e, RoundDone)] for one in (found, plain)]
    assert traffic[0] == traffic[1]


def test_the_stronger_the_term_the_nearer_members_stay_to_the_common_model(
    run: Callable[..., Any], members: list[Any], settings: Train
) -> None:
    settings = settings.model_copy(update={"local_steps": 8, "clip_norm": float("inf")})
    common = of_group("model", run(FedAvg(), members, settings, rounds=2).state.tensors)  # as the third round begins

    def distance(proximal: float) -> float:
        models = own(run(Ditto(proximal=proximal), members, settings, rounds=3), Ditto())
        return sum(float((model[key] - common[key]).square().sum()) for model in models.values() for key in model)

    assert distance(0.0) > distance(1.0) > distance(30.0)


def test_a_step_is_pulled_towards_what_the_member_received(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    """v − η (∇f(v) + λ (v − w)): the term's part of a plain step is −ηλ (v − w)."""
    rate, proximal = 0.1, 3.0
    settings = settings.model_copy(
        update={"optimizer": "sgd", "local_steps": 1, "learning_rate": rate, "clip_norm": float("inf")}
    )
    trainable = make_trainable()
    v = trainable.state()
    w = {name: tensor + torch.full_like(tensor, 0.5) for name, tensor in v.items()}

    def step(**term: Any) -> Tensors:
        client = MemberClient(make_member("a"), trainable, settings, v)
        return client.train(v, Turn(1, 0, 1), **term).tensors

    free, pulled = step(), step(proximal=proximal, anchor=w)
    for name, tensor in free.items():
        torch.testing.assert_close(pulled[name] - tensor, -rate * proximal * (v[name] - w[name]), rtol=0, atol=1e-5)


def test_a_member_of_a_smaller_rank_learns_no_other_components(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    found = run(Ditto(proximal=0.5), [replace(make_member("a"), rank=1), make_member("b")], settings, rounds=2)
    start, model = make_trainable().state(), own(found, Ditto())["a"]
    for name, tensor in model.items():
        mine, others = (tensor[:1], tensor[1:]) if "lora_A" in name else (tensor[:, :1], tensor[:, 1:])
        before = start[name]
        assert torch.equal(others, before[1:] if "lora_A" in name else before[:, 1:]), name
        assert not torch.equal(mine, before[:1] if "lora_A" in name else before[:, :1]), name


def test_a_member_of_a_smaller_rank_is_pulled_in_its_components_alone(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    trainable = make_trainable()
    v = trainable.state()
    near = {name: torch.full_like(tensor, 0.1) for name, tensor in v.items()}
    far = {name: tensor.clone() for name, tensor in near.items()}
    for name, tensor in far.items():
        (tensor[1:] if "lora_A" in name else tensor[:, 1:]).fill_(9.0)

    def trained(anchor: Tensors) -> Tensors:
        client = MemberClient(replace(make_member("a"), rank=1), trainable, settings, v)
        return client.train(v, Turn(1, 0, 1), proximal=1.0, anchor=anchor).tensors

    found, other = trained(near), trained(far)
    assert all(torch.equal(tensor, other[name]) for name, tensor in found.items())


@pytest.mark.parametrize("proximal", [-0.1, float("nan"), float("inf")])
def test_impossible_terms_are_refused(proximal: float) -> None:
    with pytest.raises(ValueError, match="proximal must be 0 or more"):
        Ditto(proximal=proximal)
