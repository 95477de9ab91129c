"""What is weaker than it looks in a run that is about to begin: told before it starts, and kept in its log."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from allmend.check import audited
from allmend.data.canaries import canary_of
from allmend.federation.member import Member
from allmend.federation.privacy.layers import protected
from allmend.federation.privacy.ledger import open_ledger
from allmend.learn.schedule import steps_per_round
from allmend.optim.ramp import ramp_factor
from allmend.recipe import Arm
from allmend.results import MEMBERS

RAMP_STEPS = 20
"""Steps after which a momentum of 0.9 has grown to 0.88: 2 / (1 − β)."""

if TYPE_CHECKING:
    from allmend.prepare import Prepared


def caveats(prepared: "Prepared") -> Iterator[str]:
    """Sentences about the guarantees and the audit of each arm; opening the ledgers also shows that one round fits."""
    yield from _of_guarantees(prepared)
    for arm in prepared.recipe.arms().values():
        yield from _of_optimizer(prepared, arm)
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
