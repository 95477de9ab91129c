"""From scores to the utility table: every model on every held-out set, and paired differences between models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allmend.intervals import paired_difference, ratio
from allmend.learn.evaluate import Score, utility
from allmend.results import BASE, POOLED, Difference, UtilityTable


@dataclass(frozen=True)
class ModelScores:
    """One model's scores on all held-out records, by client.

    Attributes:
        model: `base` or an arm.
        member: whose personal model it is, or None.
        by_client: scores of each client's held-out records, in the same order for every model.
    """

    model: str
    member: str | None
    by_client: Mapping[str, Sequence[Score]]

    def on(self, held_out: str) -> list[Score]:
        """Scores on one client's held-out records, or on those of all."""
        names = sorted(self.by_client) if held_out == POOLED else [held_out]
        return [score for name in names for score in self.by_client[name]]


def utility_table(models: Sequence[ModelScores], *, main: str, seed: int) -> UtilityTable:
    """The table, with differences of `main` to the base model and every other arm, and of each arm to the base model.

    Where `main` makes personal models, the arms with one model for all are compared with it. Against an arm of
    personal models, the difference on a client's own records is to that client's model, and on the
    pooled records to the mean over the members' models.
    """
    rows = [
        utility(scores.on(held_out), model=scores.model, member=scores.member, held_out=held_out)
        for scores in models
        for held_out in (*sorted(scores.by_client), POOLED)
    ]
    shared = {scores.model: scores for scores in models if scores.member is None}
    personal: dict[str, dict[str, ModelScores]] = {}
    for scores in models:
        if scores.member is not None:
            personal.setdefault(scores.model, {})[scores.member] = scores
    differences: list[Difference] = []
    for name, first in shared.items():
        if name == BASE:
            continue
        others = [other for other in (*shared, *personal) if other != main] if name == main else [BASE]
        others += [main] if main in personal else []
        for other in others:
            if other in shared:
                differences += _against(first, [shared[other]])
            else:
                differences += _against_members(first, personal[other])
    return UtilityTable(rows=tuple(rows), differences=tuple(differences), seed=seed)


def _against(first: ModelScores, others: Sequence[ModelScores]) -> list[Difference]:
    found = (_difference(first, others, held_out) for held_out in (*sorted(first.by_client), POOLED))
    return [difference for difference in found if difference]


def _against_members(first: ModelScores, members: Mapping[str, ModelScores]) -> list[Difference]:
    found = [_difference(first, [members[name]], name) for name in sorted(members)]
    found.append(_difference(first, list(members.values()), POOLED))
    return [difference for difference in found if difference]


def _difference(first: ModelScores, others: Sequence[ModelScores], held_out: str) -> Difference | None:
    """Paired by record; `None` where there is none. The loss of several others is the mean of theirs."""
    mine = first.on(held_out)
    theirs = list(zip(*(other.on(held_out) for other in others), strict=True))
    asked = [place for place, score in enumerate(mine) if score.answer is not None]
    learnt = [place for place, score in enumerate(mine) if score.tokens]
    if not asked and not learnt:
        return None
    return Difference(
        model=first.model,
        other=others[0].model,
        held_out=held_out,
        accuracy=paired_difference(
            [float(mine[place].right) for place in asked],
            [sum(score.right for score in theirs[place]) / len(others) for place in asked],
        )
        if asked
        else None,
        log_perplexity=ratio(
            [mine[place].nll - sum(score.nll for score in theirs[place]) / len(others) for place in learnt],
            [mine[place].tokens for place in learnt],
        )
        if learnt
        else None,
        other_is_member_mean=len(others) > 1,
    )
