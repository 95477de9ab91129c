"""Audited models beside one another."""

from allmend.results.figures import Estimate, Table


class ComparedModel(Table):
    """One audited model beside others: utility, what it memorised, and what was promised.

    Attributes:
        label: the name of the arm, `RUN/ARM` where there are several runs.
        perplexity, accuracy: on the pooled held-out records.
        copies: of the canaries that the following are about: the largest number that all models have.
        prefix: of `exact`: the longest that all have.
        exact, exact_controls: share of canaries extracted, inserted and controls.
        gap: log-likelihood of inserted canaries over controls (nats per token).
        exposure: bits, mean over secrets.
        auc: of membership by likelihood ratio.
        accounted: the accountant's ε of one record, the largest over clients.
        measured: the empirical lower bound on ε of one record: from the canaries that stand once.
        measured_together: the same of `copies` records together; None where that is one.
    """

    label: str
    perplexity: Estimate | None = None
    accuracy: Estimate | None = None
    copies: int | None = None
    prefix: str | None = None
    exact: Estimate | None = None
    exact_controls: Estimate | None = None
    gap: Estimate | None = None
    exposure: Estimate | None = None
    auc: Estimate | None = None
    accounted: float | None = None
    measured: float | None = None
    measured_together: float | None = None


class ComparedPair(Table):
    """One model against the first: differences, paired by canary and by held-out record where both met the same.

    Attributes:
        label, other: the two models; differences are `label` minus `other`.
        log_perplexity: nats per token; below 0 is better.
        accuracy: as a share.
        exact: share of inserted canaries extracted.
        gap: nats per token.
        paired: whether there are inserted canaries and controls that both were asked for; `gap.n` says how many.
        same_utility: whether the intervals of utility overlap; only then is less memorisation a reduction.
        words: the verdict.
    """

    label: str
    other: str
    log_perplexity: Estimate | None = None
    accuracy: Estimate | None = None
    exact: Estimate | None = None
    gap: Estimate | None = None
    paired: bool
    same_utility: bool | None
    words: str


class Comparison(Table):
    """What `allmend audit compare` shows."""

    models: tuple[ComparedModel, ...]
    pairs: tuple[ComparedPair, ...]
