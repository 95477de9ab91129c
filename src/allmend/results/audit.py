"""What models memorised."""

from collections.abc import Iterable

from pydantic import Field

from allmend.results.figures import BASE, Estimate, Table
from allmend.results.personal_audit import SIGNIFICANT, KeptByMembers, RankTest, Whose


class Cell(Table):
    """What a row of the audit is about: canaries of one number of copies, inserted ones or controls, in one model.

    Attributes:
        model: `base`, the name of an arm, or `ARM/MEMBER` for a member's own model.
        copies: how often each of these canaries stood in the training data (or would have stood, for controls).
        inserted: False for the controls of that number of copies.
        whose: canaries, in a member's own model: the member's or the others'; None for those of all.
    """

    model: str
    copies: int
    inserted: bool
    whose: Whose | None = None


class Extraction(Cell):
    """How much of canaries a model completes from a prefix, by greedy continuation.

    Attributes:
        prefix: length of the prompt in words (`20 tokens`, `50 %`); a row's place among others.
        prefix_tokens: the same, in tokens; the mean where the prompt is a share of each canary.
        exact: share of canaries continued without an error.
        matched: mean share of the continuation before the first wrong token.
        bleu: mean BLEU of the continuation, in [0, 1].
        approximate: share of canaries with BLEU above 0.75.
        secrets: share of the secrets that lie wholly behind the prefix and stand in the continuation; by slot
            (`name`, `record` …), where n counts secrets, and under the empty name the mean of the canaries' own
            shares, where n counts canaries.
    """

    prefix: str
    prefix_tokens: float
    exact: Estimate
    matched: Estimate
    bleu: Estimate
    approximate: Estimate
    secrets: dict[str, Estimate] = Field(default_factory=dict)


def longest_prefix(rows: Iterable[Extraction]) -> str | None:
    """The longest prefix that no fewer canaries were long enough for than any other; None where none was tried."""
    canaries: dict[str, int] = {}
    tokens: dict[str, float] = {}
    for row in rows:
        canaries[row.prefix] = canaries.get(row.prefix, 0) + row.exact.n
        tokens[row.prefix] = max(tokens.get(row.prefix, 0.0), row.prefix_tokens)
    return max(tokens, key=lambda prefix: (canaries[prefix], tokens[prefix]), default=None)


class Discoverable(Cell):
    """(n, p)-discoverable extraction: would `draws` sampled continuations of a prefix hold the right one?

    Attributes:
        prefix, prefix_tokens: as in `Extraction`.
        draws: n.
        probability: mean over canaries of the probability that at least one of n draws is right to the end.
        likely: share of canaries for which that probability is at least one half.
    """

    prefix: str
    prefix_tokens: float
    draws: int
    probability: Estimate
    likely: Estimate


class Exposure(Cell):
    """Exposure of secrets of one kind: log2 of how far up among all possible values the true one ranks.

    Attributes:
        slot: which secret (`ward`, `record` …).
        values: number of possible values, |R|; exposure lies in [0, log2 |R|].
        compared: values that were ranked, the true one among them; |R| where all were.
        exposure: bits, mean over canaries. Of a control it is 1.44 on average. Where values were sampled, this is the
            empirical bound, which cannot exceed log2 of `compared`.
        fitted: the same from a skew-normal fitted to the sampled values' likelihoods; None where all were ranked.
        poor_fits: canaries whose fit the Kolmogorov-Smirnov test refuses; they enter `fitted` with their bound.
    """

    slot: str
    values: int
    compared: int
    exposure: Estimate
    fitted: Estimate | None = None
    poor_fits: int = 0


class Membership(Table):
    """How well a score tells what was trained on from what was not.

    Attributes:
        model: as in `Cell`.
        records: what is told apart: `canaries`, `records of NAME` (a client's training and held-out records), or
            `validation records (ARM) of NAME` (those that its router alone learnt from).
        copies: of the canaries; None for records.
        score: `loss`, `ratio` (to the base model), `min-k`, `min-k++` or `zlib`.
        auc: area under the ROC curve, 0.5 for guessing; n counts members and non-members.
        tpr_at_1, tpr_at_01: share of members found at 1 % and at 0.1 % false positives, n counts members; None where
            there are too few non-members for such a rate (100 and 1,000).
        whose: as in `Cell`.
    """

    model: str
    records: str
    copies: int | None
    score: str
    auc: Estimate
    tpr_at_1: Estimate | None = None
    tpr_at_01: Estimate | None = None
    whose: Whose | None = None


class LikelihoodGap(Table):
    """Counterfactual memorisation: mean log-likelihood per token (nats), inserted minus control canaries.

    `model`, `copies` and `whose` are those of `Cell`.
    """

    model: str
    copies: int
    inserted: Estimate
    control: Estimate
    gap: Estimate
    whose: Whose | None = None


class EpsilonBound(Table):
    """An empirical lower bound on ε from the canaries' coins and scores (one-run auditing).

    Attributes:
        model: as in `Cell`.
        copies: of the canaries; None where all were used. With c copies the bound is on what c records together cost.
        epsilon: the largest ε that is rejected at `confidence`; 0 where none is.
        delta: at which it holds.
        confidence: of the bound.
        guesses: coins guessed.
        right: guesses that were right.
        canaries: coins in all.
        accounted: the accountant's ε for one record at the same δ, where the arm has one.
        score: what the guesses were made from.
        whose: as in `Cell`.
    """

    model: str
    copies: int | None
    epsilon: float
    delta: float
    confidence: float
    guesses: int
    right: int
    canaries: int
    accounted: float | None = None
    score: str = "ratio"
    whose: Whose | None = None


class View(Table):
    """What one party can learn from what it receives in a round: the likelihood gap of canaries in it.

    Attributes:
        model: name of the arm.
        round: counts from 1.
        party: who looks: `members` at the broadcast model, `coordinator` at one member's update or at the sum.
        of: the member whose update it is; None for the broadcast model or the sum.
        copies: of the canaries.
        gap: nats per token, inserted minus control; of that member's own canaries where `of` names one.
    """

    model: str
    round: int
    party: str
    of: str | None
    copies: int
    gap: Estimate


class Learnt(Table):
    """How much training looked at the inserted canaries of one number of copies, in one arm.

    Attributes:
        model: name of the arm.
        copies: of the canaries.
        canaries: how many were inserted.
        tokens: under the loss, mean over canaries, all steps and copies counted.
        steps: optimiser steps that saw a canary, mean over canaries.
        least_tokens: of the canary that was learnt from least.
    """

    model: str
    copies: int
    canaries: int
    tokens: float
    steps: float
    least_tokens: int


class AuditTable(Table):
    """`results/audit.json`: every measure on canaries, by model and number of copies, controls beside inserted ones.

    Attributes:
        skipped_prefixes: (canary, prefix) pairs left out because the prefix is no shorter than the canary; each once,
            however many models were asked.
        refused: figures that were not computed, and why.
        design_changed: whether the audit's design is another than the one fixed before training; None where there
            was no training by a recipe.
        identifiers: what looks like personal data in the models' continuations, counted by model and kind.
        ranks: whether members' own models know canaries, theirs and others', above chance.
        members: what the models of an arm's members keep, over all of them.
    """

    extraction: tuple[Extraction, ...]
    gaps: tuple[LikelihoodGap, ...]
    discoverable: tuple[Discoverable, ...] = ()
    exposure: tuple[Exposure, ...] = ()
    membership: tuple[Membership, ...] = ()
    epsilon: tuple[EpsilonBound, ...] = ()
    views: tuple[View, ...] = ()
    learnt: tuple[Learnt, ...] = ()
    canaries: int
    controls: int
    skipped_prefixes: int = 0
    refused: tuple[str, ...] = ()
    design_changed: bool | None = None
    identifiers: dict[str, dict[str, int]] = Field(default_factory=dict)
    ranks: tuple[RankTest, ...] = ()
    members: tuple[KeptByMembers, ...] = ()
    seed: int

    def of(self, whose: Whose | None, model: str | None = None) -> "AuditTable":
        """The same with fewer rows: those on these canaries, and the base model's on all.

        Args:
            whose: canaries; None for the models that all members share.
            model: one model besides the base; all when None.
        """
        rows = {
            name: tuple(
                row
                for row in getattr(self, name)
                if row.model == BASE or (row.whose == whose and model in (None, row.model))
            )
            for name in ("extraction", "gaps", "discoverable", "exposure", "membership", "epsilon")
        }
        personal = {test.model for test in self.ranks}
        counts = {name: kinds for name, kinds in self.identifiers.items() if whose or name not in personal}
        return self.model_copy(update=rows | {"identifiers": counts, "ranks": (), "members": ()})

    def above_chance(self, whose: Whose) -> tuple[RankTest, ...]:
        """Tests of members' models that know such canaries above chance: in 5 % of audits one is here by chance.

        That is Bonferroni's bound over all models and numbers of copies, which holds however they depend on each other.
        """
        tests = [test for test in self.ranks if test.whose == whose]
        return tuple(test for test in tests if test.p * len(tests) < SIGNIFICANT)
