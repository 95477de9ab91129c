"""CoMiGS over members with a mixture on a tiny model: what is shared is equal, what is not does not leave."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines.hiding import HidingEngine
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.engines.workers import WorkerEngine
from allmend.federation.member import LEARNT, Member, MemberClient
from allmend.federation.privacy.vectors import codes_of_legs, rounding
from allmend.federation.strategies import build_strategy
from allmend.federation.strategies.comigs import RETURN, TRAIN, CoMiGS, generalists_of
from allmend.models.mixture import PRESENT, Mixture, MixtureConfig, apply_mixture, role
from allmend.models.tensors import dump
from allmend.recipe import SecureAggregation, Train
from allmend.strategy import State, Task, Turn, grouped, of_group, shapes

MakeMixture = Callable[..., Mixture]

ALL = CoMiGS(router_every=2, router_steps=1, router_lr=0.05, validation=0.25)
SETTINGS = Train(learning_rate=0.02, batch_size=2, schedule="constant", tokens_per_pass=32, local_steps=4)


@pytest.fixture(scope="module")
def make_mixture(make_tiny_model: Callable[..., Any]) -> MakeMixture:
    def make(**config: Any) -> Mixture:
        return apply_mixture(
            make_tiny_model(), MixtureConfig(**({"rank": 2} | config)), seed=0, specialist_seed=0, digest="base"
        )

    return make


@pytest.fixture
def members(make_member: Callable[..., Member]) -> list[Member]:
    return [make_member(name, records=8) for name in ("east", "north", "south")]


def generalists(states: Mapping[str, State]) -> list[bytes]:
    return [dump(of_group("generalist", state.tensors), {}) for state in states.values()]


def test_after_a_round_all_have_the_same_generalists_and_nothing_else(
    run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member]
) -> None:
    found = run(ALL, members, SETTINGS, rounds=2, trainable=make_mixture())

    shared = dump(of_group("model", found.state.tensors), {})
    assert generalists(found.states) == [shared] * 3
    own = [of_group("own", state.tensors) for state in found.states.values()]
    assert {role(name) for name in own[0]} == {"specialist", "router", PRESENT}
    for name, tensor in own[0].items():
        if name != PRESENT:
            assert not torch.equal(tensor, own[1][name]), name


def test_the_generalists_are_the_mean_of_what_members_made_of_them(
    run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member], make_member: Callable[..., Member]
) -> None:
    members = [*members[:2], make_member("west", records=16)]
    for weighting, weights in (("examples", (8, 8, 16)), ("equal", (1, 1, 1))):
        strategy = replace(ALL, weighting=weighting)
        mixture = make_mixture()
        found = run(strategy, members, SETTINGS, rounds=1, trainable=mixture)
        start = generalists_of(make_mixture().state())
        trained = []
        for member in members:
            client = MemberClient(member, make_mixture(), SETTINGS, make_mixture().state())
            reply = strategy.work(Task(Turn(1, TRAIN, 1), start), client)
            weight = reply.summed_facts["weight"]
            trained.append({name: start[name] + reply.summed[f"update/{name}"] / weight for name in start})
        for name in start:
            expected = sum(w * one[name] for w, one in zip(weights, trained, strict=True)) / sum(weights)
            assert torch.allclose(found.state.tensors[f"model/{name}"], expected, atol=1e-6), name


def test_no_message_holds_a_router_a_specialist_or_what_is_present(
    make_mixture: MakeMixture, members: list[Member]
) -> None:
    initial = make_mixture().state()
    client = MemberClient(members[0], make_mixture(), SETTINGS, initial)
    state = ALL.init(initial)
    sent = list(state.tensors)
    for leg in (TRAIN, RETURN):
        task = ALL.plan(state, Turn(1, leg, 2), ["east"])["east"]
        reply = ALL.work(task, client)
        assert ALL.declare().undeclared(reply) == []
        assert not reply.seen
        sent += [*task.tensors, *reply.summed]
    assert sent
    assert all(role(name) == "generalist" for name in sent)
    assert ALL.layout(initial) == shapes(grouped("update", generalists_of(initial)))


def test_one_member_alone_keeps_what_it_made(
    run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member]
) -> None:
    """Its generalists come back as it sent them, up to the rounding of a difference."""
    mixture = make_mixture()
    found = run(ALL, members[:1], SETTINGS, rounds=1, trainable=mixture)

    personal = ALL.personal(found.state, found.states["east"])
    assert personal is not None
    for name, tensor in mixture.state().items():
        assert torch.allclose(personal[name], tensor, atol=1e-7), name
    assert ALL.personal(State(), found.states["east"]) is not None
    assert ALL.shared(found.state) is None


def test_a_member_without_specialists_needs_no_router_and_no_validation(
    run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member]
) -> None:
    members = [replace(members[0], specialists=0), replace(members[1], specialists=2, rank=1), members[2]]
    found = run(ALL, members, SETTINGS, rounds=2, trainable=make_mixture(specialists=3))

    present = {name: of_group("own", state.tensors)[PRESENT].tolist() for name, state in found.states.items()}
    assert present == {"east": [1, 0, 0, 0], "north": [1, 1, 1, 0], "south": [1, 1, 1, 1]}
    poor = of_group("own", found.states["east"].tensors)
    assert not any(tensor.any() for name, tensor in poor.items() if role(name) == "specialist")
    assert not any(tensor[1:].any() for name, tensor in poor.items() if role(name) == "router")
    # all of its records are learnt from by its expert; a member with a router sets two of eight apart
    learnt = {name: state.tensors[LEARNT] for name, state in found.states.items()}
    assert int((learnt["east"][:, 0] > 0).sum()) == 8
    assert not of_group("routers", found.states["east"].tensors)
    assert of_group("routers", found.states["south"].tensors)
    # expert 1 of north has one component of two
    thin = of_group("own", found.states["north"].tensors)
    for name, tensor in thin.items():
        if name.endswith("specialist_A"):
            assert tensor[0].any()
            assert not tensor[1].any()


def test_routers_and_experts_learn_from_different_records(make_mixture: MakeMixture, members: list[Member]) -> None:
    client = MemberClient(members[0], make_mixture(), SETTINGS, make_mixture().state())
    apart = client._apart(0.25)

    assert len(apart) == 2
    assert apart == client._apart(0.25)
    assert client._apart(1e-9) == client._apart(1e-9)
    assert len(client._apart(1e-9)) == 1
    assert len(client._apart(0.999)) == 7


def test_routers_may_learn_from_the_experts_records_for_comparison(
    run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member]
) -> None:
    """What is set apart teaches nobody then: other records in its place change no bit."""
    strategy = replace(ALL, router="train")
    apart = MemberClient(members[0], make_mixture(), SETTINGS, make_mixture().state())._apart(0.25)
    other = list(members[0].records)
    for place in apart:
        other[place] = replace(other[place], ids=other[place].ids.flip(0))

    def final(strategy: CoMiGS, records: Any) -> State:
        member = replace(members[0], records=records)
        return run(strategy, [member], SETTINGS, rounds=2, trainable=make_mixture()).states["east"]

    found, changed = final(strategy, members[0].records), final(strategy, other)
    assert dump(found.tensors, {}) == dump(changed.tensors, {})
    assert of_group("routers", found.tensors)
    assert not found.tensors[LEARNT][apart].any()
    # in each of two rounds four steps of the experts and two of the routers, of two records each
    assert found.tensors[LEARNT][:, 0].sum() == 2 * (4 + 2) * 2
    # what is set apart does teach the routers that learn from it
    assert dump(final(ALL, members[0].records).tensors, {}) != dump(final(ALL, other).tensors, {})


def test_without_router_steps_the_gates_stay_as_they_were(
    run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member]
) -> None:
    found = run(replace(ALL, router_steps=0), members[:1], SETTINGS, rounds=2, trainable=make_mixture()).states["east"]
    start = MemberClient(members[0], make_mixture(), SETTINGS, make_mixture().state()).experts()
    routers = {name: tensor for name, tensor in of_group("own", found.tensors).items() if role(name) == "router"}
    assert routers
    assert all(torch.equal(tensor, start[name]) for name, tensor in routers.items())


@pytest.mark.parametrize(("generalists_there", "specialists"), [(2, 0), (0, 2)])
def test_all_experts_shared_and_none(
    generalists_there: int, specialists: int, run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member]
) -> None:
    """With generalists alone all members have the same experts; with none nothing is summed, and each is by itself."""
    mixture = make_mixture(generalists=generalists_there, specialists=specialists)
    found = run(ALL, members, SETTINGS, rounds=2, trainable=mixture)
    models = [ALL.personal(found.state, state) for state in found.states.values()]
    assert all(models)
    for name in models[0]:  # type: ignore[union-attr]
        if role(name) in ("generalist", "specialist"):
            same = torch.equal(models[0][name], models[1][name])  # type: ignore[index]
            assert same == (role(name) == "generalist") or not models[0][name].any(), name  # type: ignore[index]
    if not generalists_there:
        assert not ALL.layout(mixture.state(), TRAIN)
        alone = make_mixture(generalists=0, specialists=2)
        one = run(ALL, members[:1], SETTINGS, rounds=2, trainable=alone).states["east"]
        assert dump(one.tensors, {}) == dump(found.states["east"].tensors, {})


def test_a_run_that_was_stopped_goes_on_with_its_experts(
    run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member], tmp_path: Path
) -> None:
    whole = run(ALL, members, SETTINGS, rounds=4, trainable=make_mixture(), folder=tmp_path / "whole")
    run(ALL, members, SETTINGS, rounds=2, trainable=make_mixture(), folder=tmp_path / "half")
    start = Checkpoints(tmp_path / "half", "identity").newest()
    assert isinstance(start, Checkpoint)

    found = run(ALL, members, SETTINGS, rounds=4, start=start, trainable=make_mixture(), folder=tmp_path / "half")

    assert dump(found.state.tensors, {}) == dump(whole.state.tensors, {})
    for name, state in whole.states.items():
        assert dump(found.states[name].tensors, {}) == dump(state.tensors, {}), name


def test_who_sat_out_keeps_its_own_and_gets_the_new_generalists(
    run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member], tmp_path: Path
) -> None:
    strategy = replace(ALL, participation=0.4, seed=1)  # one of three
    first = run(strategy, members, SETTINGS, rounds=1, trainable=make_mixture(), folder=tmp_path / "run")
    start = Checkpoints(tmp_path / "run", "identity").newest()
    (drawn,) = (name for name, state in first.states.items() if of_group("own", state.tensors))
    second = run(strategy, members, SETTINGS, rounds=2, start=start, trainable=make_mixture(), folder=tmp_path / "run")
    trained = set(strategy.plan(first.state, Turn(2, TRAIN, 2), list(first.states)))

    shared = dump(of_group("model", second.state.tensors), {})
    assert generalists(second.states) == [shared] * 3
    if drawn not in trained:
        before, after = (dump(of_group("own", some.states[drawn].tensors), {}) for some in (first, second))
        assert before == after


def test_behind_masks_it_is_the_same(run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member]) -> None:
    plain = run(ALL, members, SETTINGS, rounds=2, trainable=make_mixture())
    mixture = make_mixture()
    inner = InProcessEngine(mixture, members, SETTINGS, lambda name, turn, step: None)
    layer = SecureAggregation(clip=1.0, largest_weight=64)
    codes = codes_of_legs(ALL, mixture.state(), layer, 3)
    engine = HidingEngine(inner, codes, lambda turn, name: rounding("seeded", 0, "arm", turn, name), layer.fewest)

    hidden = run(ALL, members, SETTINGS, rounds=2, engine=engine, trainable=mixture)

    for name, tensor in plain.state.tensors.items():
        assert torch.allclose(hidden.state.tensors[name], tensor, atol=1e-4), name
    # the second leg sums nothing, and little is sent for it
    assert codes[RETURN].length < 10 < codes[TRAIN].length


def test_worker_processes_make_the_same(
    run: Callable[..., Any], make_mixture: MakeMixture, members: list[Member]
) -> None:
    here = run(ALL, members[:2], SETTINGS, rounds=1, trainable=make_mixture())
    mixture = make_mixture()
    engine = WorkerEngine(mixture, members[:2], SETTINGS, lambda name, turn, step: None, workers=1, threads=1)
    try:
        there = run(ALL, members[:2], SETTINGS, rounds=1, engine=engine, trainable=mixture)
    finally:
        engine.close()

    assert dump(there.state.tensors, {}) == dump(here.state.tensors, {})
    for name, state in here.states.items():
        assert dump(there.states[name].tensors, {}) == dump(state.tensors, {}), name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("validation", 0.0),
        ("validation", 1.0),
        ("router_every", 0),
        ("router_steps", -1),
        ("router_lr", 0.0),
        ("balance", math.nan),
        ("weighting", "none"),
        ("router", "held_out"),
        ("participation", 0.0),
    ],
)
def test_impossible_options_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        build_strategy("comigs", {option: value}, seed=0)
