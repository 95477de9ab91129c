"""What is weaker than it looks in a run that is about to begin: told before it starts, and kept in its log."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from allmend.check import audited
from allmend.data.canaries import canary_of
from allmend.federation.arm import strategy_of
from allmend.federation.member import Member
from allmend.federation.privacy.layers import protected
from allmend.federation.privacy.ledger import open_ledger
from allmend.federation.strategies.cobo import CoBo
from allmend.federation.strategies.comigs import CoMiGS
from allmend.federation.strategies.ifca import IFCA
from allmend.learn.schedule import steps_per_round
from allmend.optim.ramp import ramp_factor
from allmend.recipe import Arm
from allmend.results import MEMBERS

RAMP_STEPS = 20
"""Steps after which a momentum of 0.9 has grown to 0.88: 2 / (1 − β)."""

FEW_VISITS = 5.0
"""Comparisons of each pair of members below which a graph says little."""

FEW_VALIDATED = 64
"""Records below which a router may learn them by heart."""

if TYPE_CHECKING:
    from allmend.prepare import Prepared


def caveats(prepared: "Prepared") -> Iterator[str]:
    """Sentences about the guarantees and the audit of each arm; opening the ledgers also shows that one round fits."""
    yield from _of_guarantees(prepared)
    aiming = [member.name for member in prepared.members if member.target]
    if aiming and all(arm.adapter.kind != "mixture" for arm in prepared.recipe.arms().values()):
        yield (
            f"{', '.join(aiming)} with a target, and no arm has routers to learn from it: it is not looked at. Remove "
            "clients.target, or add an arm with comigs."
        )
    for arm in prepared.recipe.arms().values():
        yield from _of_optimizer(prepared, arm)
        yield from _of_graph(prepared, arm)
        yield from _of_choices(prepared, arm)
        yield from _of_experts(prepared, arm)
    if prepared.canaries:
        for name in audited(prepared.recipe):
            yield from _of_canaries(prepared, prepared.recipe.arms()[name])


def _of_guarantees(prepared: "Prepared") -> Iterator[str]:
    for arm in prepared.recipe.arms().values():
        parties, arm = prepared.protected(arm)
        for name, account in open_ledger(arm, parties).accounts.items():
            units = len(parties) if name == MEMBERS else len(next(p for p in parties if p.name == name).records)
            whose = "members" if name == MEMBERS else f"records of client {name!r}"
            if account.settings.delta >= 1 / units:
                yield (
                    f"arm {arm.name!r}: δ = {account.settings.delta:g} is not below 1/{units} ({units} {whose}): a "
                    "mechanism that publishes one of them whole could satisfy the guarantee. Lower delta."
                )
            if account.release.noise_multiplier and not math.isfinite(account.whole):
                yield (
                    f"arm {arm.name!r}: a noise multiplier of {account.release.noise_multiplier:g} is too little for "
                    f"any guarantee ({whose})"
                )
        layer = arm.privacy.deduplicate
        if arm.privacy.record and layer and layer.similarity < 1:
            # one record more can push out several similar ones, and let those come back that they pushed out
            yield (
                f"arm {arm.name!r}: the guarantee is for the records that deduplication leaves, since one record "
                "decides about others that are similar to it. With similarity = 1 it is for all."
            )
        if arm.privacy.record and arm.privacy.record.noise_multiplier == 0:
            yield f"arm {arm.name!r}: records' gradients are clipped without noise, which guarantees nothing"
        if arm.privacy.member and arm.privacy.member.noise_multiplier == 0:
            yield f"arm {arm.name!r}: members' updates are clipped without noise, which guarantees nothing"


def _of_optimizer(prepared: "Prepared", arm: Arm) -> Iterator[str]:
    """What an optimiser does not do here."""
    if arm.train.optimizer == "lionar" and arm.adapter.kind == "lora":
        yield (
            f"arm {arm.name!r}: lionar turns whole weights, and LoRA's factors are none: it steps as liona does. Take "
            "liona, or full fine-tuning"
        )
    members, arm = prepared.parties(arm)
    fewest = min(steps_per_round(len(member.records), arm.train) for member in members)
    if arm.train.optimizer_state == "ramp" and fewest < RAMP_STEPS:
        share = sum(ramp_factor("mean", 0.9, step) for step in range(1, fewest + 1)) / fewest
        yield (
            f"arm {arm.name!r}: rounds of {fewest} steps end before a ramp does: steps have {share:.0%} of their "
            "length on average. A higher learning rate makes up for it"
        )


def _of_graph(prepared: "Prepared", arm: Arm) -> Iterator[str]:
    """Whether members that look for each other are compared often enough."""
    if arm.strategy.name != CoBo.name:
        return
    n = len(prepared.members)
    if n < 2:
        yield f"arm {arm.name!r}: one client alone has nobody to work with, and cobo is local training"
        return
    strategy = strategy_of(arm, seed=0)
    assert isinstance(strategy, CoBo)
    rounds = arm.strategy.rounds - strategy.rounds_together(arm.strategy.rounds)
    visits = rounds * strategy.probes_of_a_pair(n)
    if 0 < visits < FEW_VISITS:
        fewer = (
            "" if strategy.neighbours or strategy.graph else ", or let clients look among few with strategy.neighbours"
        )
        yield (
            f"arm {arm.name!r}: each pair of the {n} clients is compared {visits:.2g} times on average, and "
            f"{math.exp(-visits):.0%} of the pairs never: that says little about who works with whom. Raise "
            f"strategy.rounds or strategy.pairs_per_member{fewer}."
        )


def _of_choices(prepared: "Prepared", arm: Arm) -> Iterator[str]:
    """Whose change a sum for one of several models may be."""
    if arm.strategy.name != IFCA.name:
        return
    models, n = arm.strategy.options.get("groups", IFCA.groups), len(prepared.members)
    if n < 2 * models:
        yield f"arm {arm.name!r}: {models} models for {n} clients leave some of them alone, or a model without a client"
    if arm.privacy.secure_aggregation is not None:
        yield (
            f"arm {arm.name!r}: what is summed behind masks is summed for each model, and clients choose theirs: the "
            "sum for a model that one client alone has chosen is that client's change, though not whose it is"
        )


def _of_experts(prepared: "Prepared", arm: Arm) -> Iterator[str]:
    """What a mixture of experts comes to with these members."""
    if arm.strategy.name != CoMiGS.name:
        return
    most = arm.adapter.specialists
    own = {member.name: most if member.specialists is None else member.specialists for member in prepared.members}
    if not any(own.values()):
        but = " with routers of each client's own" if arm.adapter.generalists > 1 else ""
        yield f"arm {arm.name!r}: no client has a specialist, and comigs is fedavg{but}"
        return
    if not arm.adapter.generalists:
        yield f"arm {arm.name!r}: there is no generalist, and comigs is local training"
    elif alone := [name for name, count in own.items() if not count]:
        yield (
            f"arm {arm.name!r}: {', '.join(alone)} without a specialist: a generalist that was trained among "
            "specialists does not stand well alone. One specialist of rank 1 or 2 helps."
        )
    options = arm.strategy.options
    if not options.get("router_steps", CoMiGS.router_steps) or options.get("router", CoMiGS.router) == "train":
        return
    share = options.get("validation", CoMiGS.validation)
    apart = {
        member.name: len(member.target) or max(1, round(share * len(member.records))) for member in prepared.members
    }
    if few := [name for name, count in apart.items() if count < FEW_VALIDATED and own[name]]:
        yield (
            f"arm {arm.name!r}: routers learn from fewer than {FEW_VALIDATED} records at {', '.join(few)}, and can "
            "learn these by heart. Raise strategy.validation, or give them a target with more."
        )


def _of_canaries(prepared: "Prepared", arm: Arm) -> Iterator[str]:
    """What stands in the way of learning from every planted canary, without which there is no audit of the arm."""
    given, arm = prepared.parties(arm)
    left, _ = protected(given, arm.privacy)
    planted, there = _canaries_among(given), _canaries_among(left)
    if gone := planted - there:
        yield (
            f"arm {arm.name!r}: its layers of privacy leave nothing to learn of {len(gone)} of {len(planted)} planted "
            "canaries, and an audit refuses an arm that never learnt from one"
        )
    if arm.privacy.record is not None and arm.privacy.record.sampling == "poisson":
        return  # what is never drawn is no fault there
    for member in left:
        whole = math.ceil(sum(record.learns for record in member.records) / arm.train.batch_size)
        steps = arm.strategy.rounds * steps_per_round(len(member.records), arm.train)
        if steps < whole and _canaries_among([member]):
            yield (
                f"arm {arm.name!r}: client {member.name!r} takes {steps:,} steps in all, and a pass over its records "
                f"takes {whole:,}: it may never learn from some planted canaries, and an audit refuses an arm that "
                "did not. Raise strategy.rounds, train.local_epochs or train.local_steps."
            )


def _canaries_among(members: Sequence[Member]) -> set[str]:
    records = (record for member in members for record in member.records if record.learns)
    return {canary for record in records if (canary := canary_of(record.id)) is not None}
