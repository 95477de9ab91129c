"""Did it pay to learn together? The arms of a run on each member's own held-out records, from their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from allmend import intervals
from allmend.errors import UserError
from allmend.events import ArmStarted, Event, RoundDone
from allmend.federation.member import ASIDE, LEARNT
from allmend.federation.strategies import STRATEGIES
from allmend.federation.strategies.comigs import CoMiGS
from allmend.federation.strategies.local import Local
from allmend.learn.evaluate import Score
from allmend.learn.scores import read_scores
from allmend.prepare import checkpoints_of, read_frozen
from allmend.recipe import Arm, Recipe
from allmend.results import PersonalisedArm, PersonalisedMember, PersonalisedTable
from allmend.run import RunFolder
from allmend.strategy import State

TABLE = "personalised"

OwnScores = Mapping[str, Sequence[Score]]
"""Each member's own held-out records, those with a token, under its model in an arm."""


def write_personalised(run: RunFolder, recipe: Recipe) -> None:
    """Keep the comparison of a finished run's arms, where one of them has personal models.

    Raises:
        UserError: the operating system refused, or a file of the run cannot be read.
    """
    if any(not STRATEGIES[arm.strategy.name].shares for arm in recipe.arms().values()):
        table = compare_arms(run)
        if table.members:
            run.write_table(TABLE, table)


def compare_arms(run: RunFolder, against: str | None = None) -> PersonalisedTable:
    """The finished arms of a run on members' own held-out records.

    Args:
        run: finished or not.
        against: the arm that the others are compared with; the one in which members train alone when None.

    Raises:
        UserError: there is no such arm, it is not finished, or no arm is; no scores of members' own records are here.
    """
    recipe = read_frozen(run)
    arms = recipe.arms()
    if against is not None and against not in arms:
        raise UserError(f"the run has no arm {against!r}", where="--against", hint=f"It has {', '.join(arms)}.")
    scores = {name: own for name in arms if (own := own_scores(run, name))}
    if not scores or (against is not None and against not in scores):
        raise UserError(
            "no arm is finished yet, and the comparison is about scores on members' own held-out records"
            if not scores
            else f"arm {against!r} is not finished yet",
            where=run.path,
            hint=f"Go on with the run: `allmend tune --resume {run.path}`. In a run among organisations such scores "
            "stay with the members.",
        )
    events = run.history()
    finished = {name: _finished(run, recipe, arms[name], own, events) for name, own in scores.items()}
    return compare(
        finished,
        against or alone_among(finished),
        unfinished=[name for name in arms if name not in scores],
    )


@dataclass(frozen=True)
class FinishedArm:
    """An arm that has come to its models.

    Attributes:
        scores: of each member's own held-out records, the same ones in the same order in every arm.
        strategy: name.
        alone, simulated, sent, received, trainable, steps, passes: as in `PersonalisedArm`.
    """

    scores: OwnScores
    strategy: str
    alone: bool = False
    simulated: bool = False
    sent: float = 0.0
    received: float = 0.0
    trainable: int = 0
    steps: Mapping[str, int] = field(default_factory=dict)
    passes: Mapping[str, float] = field(default_factory=dict)


def compare(
    arms: Mapping[str, FinishedArm], against: str | None, *, unfinished: Sequence[str] = ()
) -> PersonalisedTable:
    """Arms side by side on the records of those members that have some, and a model in each.

    Args:
        arms: by name, in their order.
        against: the one that the others are compared with, if any.
        unfinished: names of others.
    """
    every = list(dict.fromkeys(name for arm in arms.values() for name in arm.scores))
    members = [name for name in every if all(arm.scores.get(name) for arm in arms.values())]
    rows = _member_rows(arms, members, against)
    return PersonalisedTable(
        against=against,
        arms=tuple(_arm_row(name, arms, rows, against) for name in arms if rows),
        members=tuple(rows),
        left_out=tuple(name for name in every if name not in members),
        unfinished=tuple(unfinished),
    )


def alone(arm: Arm) -> bool:
    """Whether an arm's members learn nothing from each other."""
    return arm.strategy.name == Local.name or (arm.strategy.name == CoMiGS.name and not arm.adapter.generalists)


def own_scores(run: RunFolder, arm: str) -> OwnScores:
    """Of the base or an arm; empty where it is not finished.

    Raises:
        UserError: the scores cannot be read.
    """
    if not run.scores(arm).exists():
        return {}
    models = {one.member: one for one in read_scores(run.scores(arm))}
    names = list(dict.fromkeys(name for one in models.values() for name in one.by_client))
    found = {}
    for name in names:
        model = models.get(name, models.get(None))
        found[name] = [score for score in model.by_client[name] if score.tokens] if model else []
    return found


def alone_among(arms: Mapping[str, FinishedArm]) -> str | None:
    """The arm called `local`, or else the first in which members train alone."""
    found = [name for name, arm in arms.items() if arm.alone]
    return Local.name if Local.name in found else next(iter(found), None)


def _differences(first: Sequence[Score], second: Sequence[Score]) -> tuple[list[float], list[int]]:
    """Of the losses of the same records, and their tokens."""
    return [a.nll - b.nll for a, b in zip(first, second, strict=True)], [score.tokens for score in first]


def _member_rows(
    arms: Mapping[str, FinishedArm], members: Sequence[str], against: str | None
) -> list[PersonalisedMember]:
    rows = []
    together = [name for name, arm in arms.items() if name != against and not arm.alone and not arm.simulated]
    for member in members:
        losses = {
            name: intervals.ratio(*zip(*((one.nll, one.tokens) for one in arm.scores[member]), strict=True))
            for name, arm in arms.items()
        }
        chosen = min(together, key=lambda name: losses[name].value, default=None)
        # the lowest of several falls low by chance, too: an interval for each of them would be too narrow (Bonferroni)
        confidence = 1 - (1 - intervals.CONFIDENCE) / max(1, len(together))
        rows.append(
            PersonalisedMember(
                member=member,
                losses=losses,
                best=min(losses, key=lambda name: losses[name].value),
                together=chosen,
                difference=None
                if chosen is None or against is None
                else intervals.ratio(
                    *_differences(arms[chosen].scores[member], arms[against].scores[member]), confidence=confidence
                ),
            )
        )
    return rows


def _arm_row(
    name: str, arms: Mapping[str, FinishedArm], rows: Sequence[PersonalisedMember], against: str | None
) -> PersonalisedArm:
    arm = arms[name]
    own = arm.scores
    regrets = {row.member: row.losses[name].value - row.losses[row.best].value for row in rows}
    most = max(regrets, key=lambda member: regrets[member])
    members = [row.member for row in rows]
    return PersonalisedArm(
        arm=name,
        strategy=arm.strategy,
        alone=arm.alone,
        simulated=arm.simulated,
        loss=intervals.mean_ratio([([s.nll for s in own[one]], [s.tokens for s in own[one]]) for one in members]),
        difference=None
        if against in (None, name)
        else intervals.mean_ratio([_differences(own[one], arms[str(against)].scores[one]) for one in members]),
        regret=regrets[most],
        regretting=most,
        sent=arm.sent,
        received=arm.received,
        trainable=arm.trainable,
        steps=arm.steps,
        passes=arm.passes,
    )


def _finished(run: RunFolder, recipe: Recipe, arm: Arm, scores: OwnScores, events: Sequence[Event]) -> FinishedArm:
    """With what the log and the checkpoint say of it; no steps and passes where the checkpoint is not here."""
    rounds = {event.round: event for event in events if isinstance(event, RoundDone) and event.arm == arm.name}
    parties = max(1, len({name for done in rounds.values() for name in done.sent}))
    work = {name: work_of(state) for name, state in checkpoints_of(run, arm.name).members((LEARNT,)).items()}
    return FinishedArm(
        scores,
        arm.strategy.name,
        alone=alone(arm),
        simulated=STRATEGIES[arm.strategy.name].pooled,
        sent=sum(sum(done.sent.values()) for done in rounds.values()) / parties,
        received=sum(sum(done.received.values()) for done in rounds.values()) / parties,
        trainable=next((e.trainable for e in events if isinstance(e, ArmStarted) and e.arm == arm.name), 0),
        steps={name: steps for name, (steps, _) in work.items()},
        passes={name: passes for name, (_, passes) in work.items() if passes is not None},
    )


def work_of(state: State) -> tuple[int, float | None]:
    """A party's optimiser steps, and its passes over its records, None where these were not counted."""
    learnt = state.tensors.get(LEARNT)
    aside = float(state.facts.get(ASIDE, 0.0))
    passes = None if learnt is None else (float(learnt[:, 0].sum()) + aside) / len(learnt)
    return int(state.facts.get("steps", 0)), passes
