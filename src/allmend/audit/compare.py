"""Audited models side by side: what each keeps and what it can do, and each one's difference to the first.

Less memorisation at less utility is no achievement of a safeguard: the verdict says "reduces" only where the intervals
of utility overlap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from allmend.intervals import difference, paired_difference, ratio
from allmend.learn.compare import ModelScores
from allmend.probes import Probe
from allmend.results import (
    POOLED,
    AuditTable,
    ComparedModel,
    ComparedPair,
    Comparison,
    Estimate,
    Utility,
    UtilityTable,
    longest_prefix,
)


@dataclass(frozen=True)
class Audited:
    """One arm of an audited run.

    Attributes:
        label: how it is called in the comparison.
        model: the arm's name in its run's tables.
        audit, utility: the run's tables.
        probes: of this model.
        texts: of the canaries, by id; another run's canaries may have the same ids.
        scores: on held-out records; None where they are not there.
        accounted: the accountant's ε of one record; None without a guarantee.
    """

    label: str
    model: str
    audit: AuditTable
    utility: UtilityTable | None = None
    probes: Sequence[Probe] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    scores: ModelScores | None = None
    accounted: float | None = None


def compare(models: Sequence[Audited]) -> Comparison:
    """All models on the canaries that they have in common by number of copies, and each against the first.

    Raises:
        ValueError: there are no models.
    """
    if not models:
        raise ValueError("no models to compare")
    copies = _largest_common([{gap.copies for gap in one.audit.gaps if gap.model == one.model} for one in models])
    tried = [[row for row in one.audit.extraction if row.model == one.model] for one in models]
    common = set.intersection(*({row.prefix for row in rows} for rows in tried))
    prefix = longest_prefix(row for rows in tried for row in rows if row.prefix in common)
    rows = tuple(_row(one, copies, prefix) for one in models)
    pairs = tuple(_pair(one, models[0], row, rows[0], copies, prefix) for one, row in zip(models, rows, strict=True))
    return Comparison(models=rows, pairs=pairs[1:])


def _largest_common(sets: Sequence[set[int]]) -> int | None:
    return max(set.intersection(*sets), default=None)


def _row(one: Audited, copies: int | None, prefix: str | None) -> ComparedModel:
    utility = _pooled(one)
    exact = {
        row.inserted: row.exact
        for row in one.audit.extraction
        if (row.model, row.copies, row.prefix) == (one.model, copies, prefix)
    }
    gaps = [gap.gap for gap in one.audit.gaps if (gap.model, gap.copies) == (one.model, copies)]
    cell = (one.model, copies, True)
    exposure = [row.exposure for row in one.audit.exposure if (row.model, row.copies, row.inserted) == cell]
    member = (one.model, copies, "ratio")
    auc = [row.auc for row in one.audit.membership if (row.model, row.copies, row.score) == member]
    measured = {bound.copies: bound.epsilon for bound in one.audit.epsilon if bound.model == one.model}
    return ComparedModel(
        label=one.label,
        perplexity=utility.perplexity if utility else None,
        accuracy=utility.accuracy if utility else None,
        copies=copies,
        prefix=prefix,
        exact=exact.get(True),
        exact_controls=exact.get(False),
        gap=next(iter(gaps), None),
        exposure=_averaged(exposure),
        auc=next(iter(auc), None),
        accounted=one.accounted,
        measured=measured.get(1),
        measured_together=None if copies in (None, 1) else measured.get(copies),
    )


def _pooled(one: Audited) -> Utility | None:
    rows = one.utility.rows if one.utility else ()
    return next((row for row in rows if (row.model, row.held_out, row.member) == (one.model, POOLED, None)), None)


def _averaged(estimates: Sequence[Estimate]) -> Estimate | None:
    """The mean over slots; without an interval, since secrets of one canary are not independent."""
    if not estimates:
        return None
    if len(estimates) == 1:
        return estimates[0]
    return Estimate(value=sum(e.value for e in estimates) / len(estimates), n=sum(e.n for e in estimates))


def _pair(
    one: Audited, first: Audited, row: ComparedModel, base: ComparedModel, copies: int | None, prefix: str | None
) -> ComparedPair:
    exact, gap = _canary_differences(_by_canary(one, copies, prefix), _by_canary(first, copies, prefix))
    log_perplexity, accuracy = _held_out_differences(one.scores, first.scores)
    same = _overlap(row, base)
    return ComparedPair(
        label=one.label,
        other=first.label,
        log_perplexity=log_perplexity,
        accuracy=accuracy,
        exact=exact,
        gap=gap,
        paired=gap is not None,
        same_utility=same,
        words=_verdict(one.label, first.label, gap, same),
    )


_Canary: TypeAlias = tuple[str, bool]
"""Text, and whether it was inserted."""


def _by_canary(one: Audited, copies: int | None, prefix: str | None) -> Mapping[_Canary, Probe]:
    return {
        (one.texts.get(probe.canary, probe.canary), probe.inserted): probe
        for probe in one.probes
        if (probe.copies, probe.prefix) == (copies, prefix)
    }


def _canary_differences(
    mine: Mapping[_Canary, Probe], theirs: Mapping[_Canary, Probe]
) -> tuple[Estimate | None, Estimate | None]:
    """Exact extraction, and the likelihood gap, of one model minus another's on the canaries that both were asked."""
    # one may have been asked for fewer: those that its sampling never drew are left out
    both = [key for key in mine if key in theirs]
    inserted, controls = ([key for key in both if key[1] is group] for group in (True, False))
    if not inserted or not controls:
        return None, None
    exact = paired_difference(
        [float(mine[key].exact) for key in inserted], [float(theirs[key].exact) for key in inserted]
    )
    # what makes a canary easy for both models cancels before the groups are compared
    moved = {key: mine[key].log_likelihood - theirs[key].log_likelihood for key in both}
    return exact, difference([moved[key] for key in inserted], [moved[key] for key in controls])


def _held_out_differences(
    mine: ModelScores | None, theirs: ModelScores | None
) -> tuple[Estimate | None, Estimate | None]:
    """Log-perplexity, and accuracy, of one model minus another's, record by record."""
    if mine is None or theirs is None:
        return None, None
    ours, others = mine.on(POOLED), theirs.on(POOLED)
    if [(s.id, s.tokens) for s in ours] != [(s.id, s.tokens) for s in others]:
        return None, None
    scored = [(a, b) for a, b in zip(ours, others, strict=True) if a.tokens]
    # a token of a long record weighs as much as one of a short record, as it does in the perplexities themselves
    log_perplexity = ratio([a.nll - b.nll for a, b in scored], [a.tokens for a, _ in scored]) if scored else None
    asked = [(a, b) for a, b in zip(ours, others, strict=True) if a.answer is not None]
    if not asked:
        return log_perplexity, None
    return log_perplexity, paired_difference([float(a.right) for a, _ in asked], [float(b.right) for _, b in asked])


def _overlap(one: ComparedModel, other: ComparedModel) -> bool | None:
    """Whether both measures of utility have intervals that overlap; None where neither has any."""
    pairs = [(one.perplexity, other.perplexity), (one.accuracy, other.accuracy)]
    known = [(a, b) for a, b in pairs if a and b and None not in (a.low, a.high, b.low, b.high)]
    if not known:
        return None
    return all(_bounds(a)[0] <= _bounds(b)[1] and _bounds(b)[0] <= _bounds(a)[1] for a, b in known)


def _bounds(estimate: Estimate) -> tuple[float, float]:
    low = -math.inf if estimate.low is None else estimate.low
    return low, math.inf if estimate.high is None else estimate.high


def _verdict(label: str, other: str, gap: Estimate | None, same_utility: bool | None) -> str:
    if gap is None:
        return f"No difference can be given: {label} and {other} were not asked for the same canaries"
    low, high = _bounds(gap)
    if low <= 0 <= high:
        return f"No difference in memorisation shown between {label} and {other}"
    less = high < 0
    if same_utility is None:
        return f"{label} memorises {'less' if less else 'more'} than {other}; their utility was not measured"
    if not same_utility:
        words = "keeps less of the canaries" if less else "keeps more of the canaries"
        return f"{label} {words} than {other}, but their utility differs too: compare at equal utility"
    return f"{label} {'reduces' if less else 'increases'} memorisation against {other}, at utility that overlaps"
