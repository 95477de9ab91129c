"""What a choice of records is worth: training on it, on as many random ones and on everything, at equal steps."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from allmend import intervals
from allmend.attribution.retraining import Retraining, retrain, target_losses
from allmend.attribution.selection import Selected
from allmend.attribution.settings import Settings
from allmend.attribution.subject import Subject, read_subject
from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.events import Event, WorkPlanned, to_all
from allmend.meter import Meter
from allmend.models.adapters import learning_adapter
from allmend.recipe import Fields
from allmend.results import Estimate, Table

EVERYTHING, CHOSEN, RANDOM = "everything", "chosen", "random"

STEP_COST = 2.7
"""What a training token costs, in tokens read; used for times only."""


class Trial(Table):
    """Losses on records that no score has seen, after training on each.

    Attributes:
        losses: mean over the unseen records (nats a token), by what was trained on; n counts seeds, over which the
            interval is.
        against_random, against_everything: of what was chosen, minus the other's, paired by unseen record, means over
            seeds; n counts records. Below 0 the choice is better.
        steps: of each training. records: in the choice, of all.
        unseen: records.
    """

    losses: dict[str, Estimate]
    against_random: Estimate
    against_everything: Estimate
    steps: int
    chosen: int
    records: int
    unseen: int

    @property
    def verdict(self) -> str:
        """What the interval of the difference to random records allows to say."""
        low, high = self.against_random.low, self.against_random.high
        if high is not None and high < 0:
            return "The choice is better than chance."
        if low is not None and low > 0:
            return "The choice is worse than chance: its target may be unlike these records."
        return "No difference to random records is shown."


def try_selection(
    model: str,
    adapter: Path | str,
    selected: Sequence[Selected],
    *,
    train: Sequence[Path | str],
    unseen: Path | str,
    retraining: Retraining | None = None,
    seeds: int = 3,
    settings: Settings | None = None,
    fields: Fields | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> Trial:
    """Train an adapter's shape anew on the choice, on random records and on everything, and compare.

    All take the steps that `retraining` takes over everything. Random records are as many of each client as were
    chosen, others for each seed.

    Args:
        model: the adapter's base.
        adapter: a PEFT folder whose shape is trained anew.
        selected: what `select` wrote.
        train: the files that were chosen from.
        unseen: records that are neither trained on nor were the target of the scores.
        retraining: how.
        seeds: trainings of each.
        settings: of reading.
        fields: the names under which the files keep each part of a record.
        listeners: told how far it is.

    Raises:
        UserError: a file cannot be used, unseen records are training records, or training diverged.
    """
    if seeds < 1:
        raise UserError(f"must be 1 or more, got {seeds}", where="--seeds")
    retraining = retraining or Retraining()
    subject = read_subject(
        model, adapter, train=train, target=unseen, fields=fields or Fields(), settings=settings or Settings()
    )
    chosen = _places(subject, selected)
    steps = retraining.steps(len(subject.encoded))
    emit = to_all(listeners)
    mean_tokens = sum(map(len, subject.encoded)) / len(subject.encoded)
    trained = STEP_COST * steps * min(retraining.batch_size, len(subject.encoded)) * mean_tokens
    asked = float(sum(map(len, subject.aim)))
    work = 3 * seeds * (trained + asked)
    emit(WorkPlanned(work={"train on each": work}))
    meter = Meter(emit, "train on each", work)
    found: dict[str, list[list[float]]] = {EVERYTHING: [], CHOSEN: [], RANDOM: []}
    tokens = [max(1, int(one.target.sum())) for one in subject.aim]
    with learning_adapter(subject.model.model, subject.adapter) as trainable:
        for seed in range(seeds):
            by_name = {EVERYTHING: list(range(len(subject.encoded))), CHOSEN: chosen}
            by_name[RANDOM] = _by_chance(subject, chosen, seed)
            for name, places in by_name.items():
                some: list[Encoded] = [subject.encoded[place] for place in places]
                retrain(
                    trainable,
                    some,
                    retraining,
                    seed=seed,
                    steps=steps,
                    on_step=lambda step: meter.add(round(STEP_COST * step.tokens)),
                )
                losses = target_losses(trainable, subject.aim, retraining.tokens_per_pass, on_tokens=meter.add)
                found[name].append([loss / count for loss, count in zip(losses, tokens, strict=True)])
    meter.done()
    by_record = {name: [sum(seen) / seeds for seen in zip(*runs, strict=True)] for name, runs in found.items()}
    return Trial(
        losses={name: intervals.mean([sum(losses) / len(losses) for losses in runs]) for name, runs in found.items()},
        against_random=intervals.paired_difference(by_record[CHOSEN], by_record[RANDOM]),
        against_everything=intervals.paired_difference(by_record[CHOSEN], by_record[EVERYTHING]),
        steps=steps,
        chosen=len(chosen),
        records=len(subject.encoded),
        unseen=len(subject.aim),
    )


def _places(subject: Subject, selected: Sequence[Selected]) -> list[int]:
    """Of the chosen records, among all that have a token to learn from."""
    ids = {
        (one.client, str(json.loads(line)["id"]))
        for one in selected
        for line in one.chosen.read_text(encoding="utf-8").splitlines()
    }
    pairs = zip(subject.owners, subject.records, strict=True)
    return [place for place, (owner, record) in enumerate(pairs) if (owner, record.id) in ids]


def _by_chance(subject: Subject, chosen: Sequence[int], seed: int) -> list[int]:
    """As many of each client, in order."""
    found: list[int] = []
    for client in subject.clients:
        own = [place for place, owner in enumerate(subject.owners) if owner == client]
        count = sum(subject.owners[place] == client for place in chosen)
        found += random.Random(f"{seed}/{client}").sample(own, count)
    return sorted(found)
