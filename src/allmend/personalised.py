"""Did it pay to learn together? The arms of a run on each member's own held-out records, from their scores."""

from collections.abc import Mapping, Sequence

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
    scores = {name: own for name in arms if (own := _own_scores(run, name))}
    if not scores or (against is not None and against not in scores):
        raise UserError(
            "no arm is finished yet, and the comparison is about scores on members' own held-out records"
            if not scores
            else f"arm {against!r} is not finished yet",
            where=run.path,
            hint=f"Go on with the run: `allmend tune --resume {run.path}`. In a run among organisations such scores "
            "stay with the members.",
        )
    against = against or _alone_among(arms, list(scores))
    every = list(dict.fromkeys(name for own in scores.values() for name in own))
    members = [name for name in every if all(own.get(name) for own in scores.values())]
    rows = _member_rows(scores, arms, members, against)
    events = run.history()
    return PersonalisedTable(
        against=against,
        arms=tuple(_arm_row(run, recipe, arms[name], scores, rows, against, events) for name in scores if rows),
        members=tuple(rows),
        left_out=tuple(name for name in every if name not in members),
        unfinished=tuple(name for name in arms if name not in scores),
    )


def alone(arm: Arm) -> bool:
    """Whether an arm's members learn nothing from each other."""
    return arm.strategy.name == Local.name or (arm.strategy.name == CoMiGS.name and not arm.adapter.generalists)


def _own_scores(run: RunFolder, arm: str) -> OwnScores:
    """Empty where the arm is not finished."""
    if not run.scores(arm).exists():
        return {}
    models = {one.member: one for one in read_scores(run.scores(arm))}
    names = list(dict.fromkeys(name for one in models.values() for name in one.by_client))
    found = {}
    for name in names:
        model = models.get(name, models.get(None))
        found[name] = [score for score in model.by_client[name] if score.tokens] if model else []
    return found


def _alone_among(arms: Mapping[str, Arm], finished: Sequence[str]) -> str | None:
    """The arm called `local`, or else the first in which members train alone."""
    found = [name for name in finished if alone(arms[name])]
    return Local.name if Local.name in found else next(iter(found), None)


def _differences(first: Sequence[Score], second: Sequence[Score]) -> tuple[list[float], list[int]]:
    """Of the losses of the same records, and their tokens."""
    return [a.nll - b.nll for a, b in zip(first, second, strict=True)], [score.tokens for score in first]


def _member_rows(
    scores: Mapping[str, OwnScores], arms: Mapping[str, Arm], members: Sequence[str], against: str | None
) -> list[PersonalisedMember]:
    rows = []
    together = [
        name
        for name in scores
        if name != against and not alone(arms[name]) and not STRATEGIES[arms[name].strategy.name].pooled
    ]
    for member in members:
        losses = {
            name: intervals.ratio([score.nll for score in own[member]], [score.tokens for score in own[member]])
            for name, own in scores.items()
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
                    *_differences(scores[chosen][member], scores[against][member]), confidence=confidence
                ),
            )
        )
    return rows


def _arm_row(
    run: RunFolder,
    recipe: Recipe,
    arm: Arm,
    scores: Mapping[str, OwnScores],
    rows: Sequence[PersonalisedMember],
    against: str | None,
    events: Sequence[Event],
) -> PersonalisedArm:
    own = scores[arm.name]
    regrets = {row.member: row.losses[arm.name].value - row.losses[row.best].value for row in rows}
    most = max(regrets, key=lambda name: regrets[name])
    members = [row.member for row in rows]
    rounds = {event.round: event for event in events if isinstance(event, RoundDone) and event.arm == arm.name}
    sent = sum(sum(done.sent.values()) for done in rounds.values())
    received = sum(sum(done.received.values()) for done in rounds.values())
    parties = max(1, len({name for done in rounds.values() for name in done.sent}))
    steps, passes = _work(run, recipe, arm)
    return PersonalisedArm(
        arm=arm.name,
        strategy=arm.strategy.name,
        alone=alone(arm),
        simulated=STRATEGIES[arm.strategy.name].pooled,
        loss=intervals.mean_ratio([([s.nll for s in own[name]], [s.tokens for s in own[name]]) for name in members]),
        difference=None
        if against in (None, arm.name)
        else intervals.mean_ratio([_differences(own[name], scores[str(against)][name]) for name in members]),
        regret=regrets[most],
        regretting=most,
        sent=sent / parties,
        received=received / parties,
        trainable=next((e.trainable for e in events if isinstance(e, ArmStarted) and e.arm == arm.name), 0),
        steps=steps,
        passes=passes,
    )


def _work(run: RunFolder, recipe: Recipe, arm: Arm) -> tuple[dict[str, int], dict[str, float]]:
    """Each party's optimiser steps, and its passes over its records; nothing where the checkpoint is not here."""
    states = checkpoints_of(run, recipe, arm.name).members((LEARNT,))
    steps: dict[str, int] = {}
    passes: dict[str, float] = {}
    for name, state in states.items():
        steps[name] = int(state.facts.get("steps", 0))
        if (learnt := state.tensors.get(LEARNT)) is not None:
            passes[name] = (float(learnt[:, 0].sum()) + float(state.facts.get(ASIDE, 0.0))) / len(learnt)
    return steps, passes
