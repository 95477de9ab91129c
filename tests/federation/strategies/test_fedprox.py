"""FedProx: the pull towards the start, against closed forms and against FedAvg."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from allmend.federation.member import MemberClient
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.fedprox import FedProx
from allmend.recipe import Train
from allmend.strategy import State, Turn, of_group


def test_without_the_term_it_is_fedavg_bit_for_bit(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a"), make_member("b", records=7)]
    plain, prox = (run(strategy, members, settings, rounds=2) for strategy in (FedAvg(), FedProx(proximal=0.0)))
    assert plain.state.tensors.keys() == prox.state.tensors.keys()
    for name, tensor in plain.state.tensors.items():
        assert torch.equal(tensor, prox.state.tensors[name])


def test_the_stronger_the_term_the_nearer_members_stay(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    trainable = make_trainable()
    initial = trainable.state()
    turn, settings = Turn(1, 0, 1), settings.model_copy(update={"local_steps": 20, "clip_norm": float("inf")})

    def moved(proximal: float) -> float:
        client = MemberClient(make_member("a"), trainable, settings, initial)
        tensors = client.train(initial, turn, proximal=proximal).tensors
        return sum((tensors[name] - initial[name]).square().sum().item() for name in initial) ** 0.5

    far, near, nearest = moved(0.0), moved(1.0), moved(100.0)
    assert far > near > nearest


def test_the_first_step_is_not_pulled(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    """At the start the term has no gradient."""
    one = settings.model_copy(update={"local_steps": 1})
    models = []
    for proximal in (0.0, 50.0):
        trainable = make_trainable()
        client = MemberClient(make_member("a"), trainable, one, trainable.state())
        models.append(client.train(trainable.state(), Turn(1, 0, 1), proximal=proximal).tensors)
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name])


def test_the_pull_is_towards_the_start_of_the_round_and_not_of_the_run(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    member, strategy = make_member("a"), FedProx(proximal=10.0)
    first, second = (
        of_group("model", run(strategy, [member], settings, rounds=rounds).state.tensors) for rounds in (1, 2)
    )
    trainable = make_trainable()
    client = MemberClient(member, trainable, settings, trainable.state(), State(facts={"steps": 2}))
    expected = client.train(first, Turn(2, 0, 2), proximal=10.0).tensors
    for name, tensor in second.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("proximal", [-0.1, float("nan"), float("inf")])
def test_impossible_terms_are_refused(proximal: float) -> None:
    with pytest.raises(ValueError, match="proximal must be 0 or more"):
        FedProx(proximal=proximal)
