"""How much training looked at each canary: what was never learnt from cannot have been memorised."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from allmend.data.canaries import Canary, canary_of
from allmend.errors import UserError
from allmend.events import RoundDone
from allmend.federation.arm import Training
from allmend.federation.privacy.layers import RECORD_LAYERS
from allmend.prepare import Prepared
from allmend.results import Learnt
from allmend.run import RunFolder, write_atomic

_LEARNT = "learnt.json"


class NeverLearntError(UserError):
    """That a canary is not in the model would prove nothing: training never looked at it."""


def write_learnt(run: RunFolder, arm: str, canaries: Sequence[Canary], training: Training) -> None:
    """Keep how much training looked at each canary: steps that saw a copy, and its tokens under the loss."""
    counts = {canary.id: [0, 0] for canary in canaries if canary.inserted}
    for record, (steps, tokens) in training.learnt.items():
        if (canary := canary_of(record)) in counts:
            counts[canary][0] += steps
            counts[canary][1] += tokens
    content = {"canaries": counts, "layers": training.layers}
    write_atomic(run.arm(arm) / _LEARNT, json.dumps(content, indent=1).encode())


def read_learnt(run: RunFolder, arm: str) -> dict[str, tuple[int, int]]:
    """Steps and tokens by canary; empty for a run that kept no count.

    Raises:
        UserError: the file cannot be read.
    """
    return {name: (steps, tokens) for name, (steps, tokens) in _read_learnt(run, arm)["canaries"].items()}


def read_layers(run: RunFolder, arm: str) -> tuple[str, ...]:
    """What the layers of protection did in an arm, in words."""
    return tuple(_read_learnt(run, arm)["layers"])


def _read_learnt(run: RunFolder, arm: str) -> dict[str, Any]:
    path = run.arm(arm) / _LEARNT
    if not path.exists():
        return {"canaries": {}, "layers": []}
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=path, hint="Start a new run.") from error
    return found


def never_learnt(
    run: RunFolder, prepared: Prepared, arm: str, canaries: Sequence[Canary], counts: Mapping[str, tuple[int, int]]
) -> set[str]:
    """Ids of inserted canaries that Poisson sampling never drew.

    Raises:
        NeverLearntError: a canary was not learnt from for another reason.
    """
    if not counts:
        return set()
    nothing = {canary.id for canary in canaries if canary.inserted and not counts.get(canary.id, (0, 0))[1]}
    never_drawn = nothing & _left_to_chance(run, prepared, arm) if nothing else set()
    unseen = nothing - never_drawn
    if not unseen:
        return never_drawn
    privacy = prepared.recipe.arms()[arm].privacy
    layers = [layer.key for layer in RECORD_LAYERS if getattr(privacy, layer.key) is not None]
    reasons = ["their client took part in no round", "training was too short to reach them"]
    reasons += [f"privacy.{' or privacy.'.join(layers)} left out what there was to learn"] if layers else []
    verb = "was" if len(unseen) == 1 else "were"
    raise NeverLearntError(
        f"{len(unseen)} of the planted canaries {verb} never learnt from in arm {arm!r} "
        f"({', '.join(sorted(unseen)[:3])}"
        f"{' …' if len(unseen) > 3 else ''}), so that the audit would call them not memorised without a reason: "
        f"{', '.join(reasons[:-1])} or {reasons[-1]}",
        where="audit",
        hint="Train for a whole pass over the records (train.local_epochs, strategy.rounds, participation), or leave "
        "the canaries' client out of canaries.clients, in a new run. The tuned models are kept.",
    )


def _left_to_chance(run: RunFolder, prepared: Prepared, arm: str) -> set[str]:
    """Ids of canaries that Poisson sampling could have drawn: of clients that trained, with something left to learn."""
    settings = prepared.recipe.arms()[arm]
    if settings.privacy.record is None or settings.privacy.record.sampling != "poisson":
        return set()
    rounds = (event for event in run.history() if isinstance(event, RoundDone) and event.arm == arm)
    trained = {client for event in rounds for client in event.clients}
    parties, _ = prepared.protected(settings)
    records = [record for party in parties if party.name in trained for record in party.records if record.learns]
    return {canary for record in records if (canary := canary_of(record.id)) is not None}


def learnt_rows(arm: str, canaries: Sequence[Canary], counts: Mapping[str, tuple[int, int]]) -> list[Learnt]:
    """The counts of an arm's canaries, one row for each number of copies."""
    rows = []
    for copies in sorted({canary.copies for canary in canaries}):
        found = [counts[canary.id] for canary in canaries if canary.copies == copies and canary.id in counts]
        if found:
            steps, tokens = ([one[place] for one in found] for place in (0, 1))
            rows.append(
                Learnt(
                    model=arm,
                    copies=copies,
                    canaries=len(found),
                    tokens=sum(tokens) / len(found),
                    steps=sum(steps) / len(found),
                    least_tokens=min(tokens),
                )
            )
    return rows
