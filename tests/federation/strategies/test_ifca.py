"""IFCA: members take the model of lowest loss, its mean is over them alone, and who took which does not show."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from allmend.federation.member import ASIDE, MemberClient
from allmend.federation.privacy.vectors import VectorCode, rounding
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.ifca import IFCA
from allmend.federation.strategies.several import RETURN, TRAIN
from allmend.models.tensors import Tensors
from allmend.recipe import Train
from allmend.strategy import Reply, State, Sums, Task, Turn, grouped, of_group


def two_models() -> State:
    return State(grouped("model-0", {"x": torch.full((3,), 2.0)}) | grouped("model-1", {"x": torch.full((3,), -2.0)}))


def test_with_one_model_it_is_fedavg_bit_for_bit(
    run: Callable[..., Any], make_member: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a"), make_member("b", records=7)]
    found, plain = (run(strategy, members, settings, rounds=2) for strategy in (IFCA(groups=1), FedAvg()))
    shared = of_group("model", plain.state.tensors)
    assert all(torch.equal(found.state.tensors[f"model-0/{name}"], tensor) for name, tensor in shared.items())
    for state in found.states.values():
        own = IFCA(groups=1).personal(State(), state)
        assert own is not None
        assert all(torch.equal(own[name], tensor) for name, tensor in shared.items())


def test_the_first_groups_are_drawn_evenly_and_seeds_draw_differently(make_toy: Callable[..., Any]) -> None:
    names = [f"m{number}" for number in range(8)]

    def drawn(seed: int) -> list[object]:
        strategy = IFCA(groups=3, seed=seed)
        state = strategy.init({"x": torch.zeros(3)})
        tasks = strategy.plan(state, Turn(1, TRAIN, 4), names)
        assert strategy.plan(state, Turn(1, TRAIN, 4), names[::-1]).keys() == tasks.keys()
        return [task.facts["model"] for task in tasks.values()]

    assert sorted(Counter(drawn(0)).values()) == [2, 3, 3]
    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 2


def test_a_member_trains_the_model_of_lowest_loss_and_its_mean_is_over_those_who_did(
    make_toy: Callable[..., Any],
) -> None:
    strategy, state, turn = IFCA(groups=3), two_models(), Turn(2, TRAIN, 3)
    state.tensors["model-2/x"] = torch.full((3,), 1e6)  # nobody's
    up, high, down = (make_toy(name, count) for name, count in (("up", 1), ("high", 3), ("down", 2)))
    up.step, high.step, down.step = torch.full((3,), 1.0), torch.full((3,), 5.0), torch.full((3,), -3.0)
    sums = Sums()
    for client in (up, high, down):
        task = strategy.plan(state, turn, ["up", "high", "down"])[client.name]
        sums.add(strategy.work(task, client))
    found = strategy.combine(state, turn, sums, {})
    torch.testing.assert_close(found.tensors["model-0/x"], torch.full((3,), 2.0 + (1 * 1 + 3 * 5) / 4))
    torch.testing.assert_close(found.tensors["model-1/x"], torch.full((3,), -5.0))
    assert torch.equal(found.tensors["model-2/x"], state.tensors["model-2/x"])
    assert [client.state.facts["model"] for client in (up, high, down)] == [0, 0, 1]


def test_behind_masks_a_reply_does_not_show_which_model_it_is_for(make_toy: Callable[..., Any]) -> None:
    """Same names of numbers, and what is left out is encoded as zeros are."""
    strategy, turn = IFCA(groups=2), Turn(2, TRAIN, 3)
    up, down = make_toy("up"), make_toy("down")
    up.step, down.step = torch.ones(3), -torch.ones(3)
    replies = [strategy.work(strategy.plan(two_models(), turn, ["a"])["a"], client) for client in (up, down)]
    assert not set(replies[0].summed) & set(replies[1].summed)
    assert replies[0].summed_facts.keys() == replies[1].summed_facts.keys()
    layout = strategy.layout({"x": torch.zeros(3)}, TRAIN)
    code = VectorCode(layout, sorted(replies[0].summed_facts), 100.0, 3)
    for reply in replies:
        whole = {name: reply.summed.get(name, torch.zeros(shape)) for name, shape in layout.items()}
        vectors = [
            code.encode(one, rounding("seeded", 0, "arm", turn, "a"))[0]
            for one in (reply, Reply(whole, reply.summed_facts))
        ]
        assert np.array_equal(*vectors)
        assert strategy.declare().undeclared(reply) == []
    torch.testing.assert_close(
        strategy.revealed(Task(turn, two_models().tensors), replies[0]), {"x": torch.full((3,), 3.0)}
    )


def test_in_the_last_round_members_choose_among_the_models_as_they_ended(
    run: Callable[..., Any], make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train
) -> None:
    members = [make_member(name, data=data) for name, data in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "y"))]
    strategy = IFCA(groups=2, seed=1)
    found = run(strategy, members, settings, rounds=3)
    models = [of_group(f"model-{group}", found.state.tensors) for group in range(2)]
    for member in members:
        trainable = make_trainable()
        client = MemberClient(member, trainable, settings, trainable.state())
        losses = [client.loss(model, Turn(3, RETURN, 3)) for model in models]
        own = strategy.personal(State(), found.states[member.name])
        assert own is not None
        best = models[losses.index(min(losses))]
        assert all(torch.equal(own[name], tensor) for name, tensor in best.items())
    # two forward passes a round over four records but in the first, where groups are drawn, and two at the end
    assert found.states["a"].facts[ASIDE] == pytest.approx(2 * 2 * 4 / 3 + 2 * 4 / 3)


def test_the_loss_is_that_of_the_members_training_records(
    make_member: Callable[..., Any], make_trainable: Callable[..., Any], settings: Train, log_probs: Callable[..., Any]
) -> None:
    member, trainable = make_member("a", records=5), make_trainable()
    at: Tensors = {name: tensor + 0.05 for name, tensor in trainable.state().items()}
    client = MemberClient(member, trainable, settings, trainable.state())
    found = client.loss(at, Turn(1, 0, 1))
    trainable.load(at)
    with torch.inference_mode():
        known = torch.cat([log_probs(trainable.model, record.ids) for record in member.records])
    assert found == pytest.approx(-float(known.double().mean()), abs=1e-5)
    # a draw of records is another estimate, the same for every model of a round
    few = [client.loss(at, Turn(number, 0, 9), records=2) for number in (1, 1, 2)]
    assert few[0] == few[1] != few[2]


@pytest.mark.parametrize(("option", "value"), [("groups", 0), ("probe_records", -1), ("participation", 0.0)])
def test_impossible_options_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        IFCA(**{option: value})
