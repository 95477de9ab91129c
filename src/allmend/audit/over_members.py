"""What the personal models of an arm keep of canaries, over its members: means with intervals, and the range."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from allmend.audit.memorisation import Findings
from allmend.intervals import mean
from allmend.results import Extraction, KeptByMembers, OverMembers, Whose, longest_prefix

WHOSE: tuple[Whose, ...] = ("own", "others")


def kept_by_members(arm: str, models: Sequence[Findings]) -> list[KeptByMembers]:
    """The arm's rows: own canaries, then the others', by number of copies.

    Models weigh alike. What they show of the others' canaries is not independent, since two members are shown canaries
    of a third: the interval is about members, and `RankTest` tells of each model whether it is above chance.

    Args:
        arm: its name.
        models: what was found in the models of its members.
    """
    every = sorted({gap.copies for model in models for gap in model.gaps})
    prefix = longest_prefix(row for model in models for row in model.extraction)
    return [
        row for whose in WHOSE for copies in every if (row := _row(arm, models, whose, copies, prefix)).gap is not None
    ]


def _row(arm: str, models: Sequence[Findings], whose: Whose, copies: int, prefix: str | None) -> KeptByMembers:
    cell = (whose, copies)
    gaps = [gap.gap.value for model in models for gap in model.gaps if (gap.whose, gap.copies) == cell]
    exact: dict[bool, list[Extraction]] = {True: [], False: []}
    for row in (row for model in models for row in model.extraction):
        if (row.whose, row.copies, row.prefix) == (*cell, prefix):
            exact[row.inserted].append(row)
    exposed = [
        [row.exposure.value for row in model.exposure if (row.whose, row.copies, row.inserted) == (*cell, True)]
        for model in models
    ]
    auc = [
        row.auc.value
        for model in models
        for row in model.membership
        if (row.whose, row.copies, row.score) == (*cell, "ratio")
    ]
    return KeptByMembers(
        arm=arm,
        whose=whose,
        copies=copies,
        gap=_over(gaps),
        exact=_over((row.exact.value for row in exact[True]), bounds=(0, 1)),
        exact_controls=_over((row.exact.value for row in exact[False]), bounds=(0, 1)),
        exposure=_over(fmean(bits) for bits in exposed if bits),
        auc=_over(auc, bounds=(0, 1)),
    )


def _over(
    values: Iterable[float], *, bounds: tuple[float, float] = (-float("inf"), float("inf"))
) -> OverMembers | None:
    known = list(values)
    return OverMembers(mean=mean(known, bounds=bounds), least=min(known), most=max(known)) if known else None
