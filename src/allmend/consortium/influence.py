"""Whose data helped, among organisations: members' blocks are summed behind masks, their scores stay with them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from allmend.attribution.legs import codes_of, play, scored, strategy_of
from allmend.attribution.own import keep_own
from allmend.attribution.runs import FOLDER, Aim, arm_influence, measured_arms
from allmend.check import influenced
from allmend.consortium.offer import Offer
from allmend.consortium.totals import Total, Totals
from allmend.events import Event
from allmend.federation.arm import at_member, trainable_of
from allmend.federation.engines.flower.engine import FlowerEngine
from allmend.federation.engines.flower.exchange import Exchange
from allmend.federation.engines.flower.hidden import Hiding
from allmend.federation.engines.flower.site import ArmAtMember
from allmend.federation.member import Member
from allmend.influence.federated import FederatedInfluence
from allmend.models.adapters import learning_adapter
from allmend.models.load import LoadedModel
from allmend.models.tensors import Tensors
from allmend.prepare import EncodedClient
from allmend.recipe import Arm, Recipe, SecureAggregation
from allmend.results import ArmInfluence, InfluenceByMember
from allmend.run import RunFolder
from allmend.strategy import State, Turn, whole_layout

PREFIX = "_influence."
"""Before an arm's name: no arm of a recipe begins so."""


def measured(name: str) -> str | None:
    """The arm whose influence is asked for under a name; None where the name is an arm's own."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def influenced_here(recipe: Recipe) -> list[str]:
    """Arms whose influence a member has agreed to measure."""
    return influenced(recipe) if recipe.influence is not None else []


def layer_of(arm: Arm) -> SecureAggregation:
    """How sums are formed: behind masks, also where the arm's own are not. Blocks show what members' records are."""
    return arm.privacy.secure_aggregation or SecureAggregation()


def strategy_for(recipe: Recipe) -> FederatedInfluence:
    """Of the recipe's `[influence]`."""
    assert recipe.influence is not None
    return strategy_of(recipe.influence, hidden=True)


def hiding_influence(offer: Offer, recipe: Recipe, arm: Arm, initial: Tensors) -> Hiding:
    """What is agreed on about the sums; the same at both sides."""
    codes = codes_of(strategy_for(recipe), initial, len(recipe.clients))
    return Hiding(offer.digest, PREFIX + arm.name, offer.keys, codes, layer_of(arm))


def measure(
    run: RunFolder,
    recipe: Recipe,
    offer: Offer,
    model: LoadedModel,
    aim: Aim,
    exchange: Exchange,
    names: Sequence[str],
    *,
    seconds: float,
    fewest: int,
    emit: Callable[[Event], None],
    again: bool = False,
) -> InfluenceByMember:
    """Measure the arms that the recipe names, with members that have joined.

    Args:
        run: of the coordinator.
        recipe, offer: what members have agreed to.
        model: the base model.
        aim: the target.
        exchange: carries questions and answers.
        names: of the members.
        seconds: that a leg may take.
        fewest: members that must answer.
        emit: writes events.
        again: whether a sum may be formed over other members, or other of their records, than one before.

    Raises:
        UserError: too few members are there, a sum is none, or it would show somebody's part beside one before.
    """
    settings, strategy = recipe.influence, strategy_for(recipe)
    assert settings is not None
    found: list[ArmInfluence] = []
    for name in measured_arms(run, recipe):
        arm, opening = recipe.arms()[name], run.arm(name) / "influence-opening.json"
        totals = Totals(run.arm(name) / "influence-totals.json", name, again)
        with learning_adapter(model.model, run.arm(name) / "adapter") as trainable:
            initial = trainable.state()
            asked = [_total(strategy, leg, initial, names) for leg in range(strategy.legs)]
            for total in asked:
                totals.check(total)  # before anybody works for it
            hiding = hiding_influence(offer, recipe, arm, initial)
            engine = FlowerEngine(
                exchange,
                names,
                PREFIX + name,
                run=offer.digest,
                seconds=seconds,
                fewest=max(fewest, hiding.layer.fewest),
                emit=emit,
                layout=whole_layout(strategy, initial),
                frozen=trainable.frozen_digest,
                opening=opening,
                may_open=partial(_keep, totals, asked),
                hiding=hiding,
            )
            legs = play(strategy, engine, initial, aim.gradients(trainable, settings))
        opening.unlink(missing_ok=True)  # other questions have other sums in the same turns
        found.append(arm_influence(run, name, settings, aim, strategy, legs, sorted(names)))
    return InfluenceByMember(arms=tuple(found))


def _total(strategy: FederatedInfluence, leg: int, initial: Tensors, names: Sequence[str]) -> Total:
    groups = {name.partition("/")[0] for name in strategy.layout(initial, leg)}
    return Total(tuple(sorted(groups)), tuple(sorted(names)), strategy.clip, strategy.min_records)


def _keep(totals: Totals, asked: Sequence[Total], turn: Turn, survivors: Sequence[str]) -> None:
    totals.keep(replace(asked[turn.leg], members=tuple(sorted(survivors))))


@contextlib.contextmanager
def open_influence(recipe: Recipe, model: LoadedModel, client: EncodedClient, name: str) -> Iterator[ArmAtMember]:
    """A member's part: its records as the arm trained on them, and what of them may leave."""
    arm = recipe.arms()[name]
    with trainable_of(model, arm.adapter, seed=recipe.seed) as trainable:
        yield ArmAtMember(strategy_for(recipe), trainable, own_records(client, arm), arm.train, hides=True, rounds=1)


def own_records(client: EncodedClient, arm: Arm) -> Member:
    """A member with the records that get a score in an arm."""
    return scored(at_member(client.member, arm)[0])


def keep_scores(folder: Path, client: EncodedClient, arm: Arm, state: State, *, method: str) -> Path | None:
    """Write the member's own scores and page into its folder; None where it has none yet."""
    if "influence/scores" not in state.tensors:
        return None
    texts = {record.id: " ".join(record.texts) for record in client.train}
    place = folder / "arms" / arm.name / FOLDER
    return keep_own(place, own_records(client, arm), state, texts, arm=arm.name, method=method)
