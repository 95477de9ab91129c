"""The tables that stages leave in a run's `results/` folder and that the report reads.

Every figure is an `Estimate`: a value with its sample size and, where one can be had, a 95 % interval.
A table is one JSON file (`results/<name>.json`), written as a whole.
"""

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

POOLED = "pooled"
"""Name of the held-out set that joins those of all clients."""

BASE = "base"
"""Name of the model before any tuning."""

MEMBERS = "members"
"""Name of the account of the guarantee for members, among those of clients' records."""


class Table(BaseModel):
    """Base of all tables: unknown keys are an error, values do not change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(Table):
    """A figure: `value`, its 95 % interval `[low, high]` (None when there is none) and sample size `n`."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int


class Utility(Table):
    """How well one model does on one held-out set.

    Attributes:
        model: `base` or the name of an arm (`fedavg`, `local`, …).
        member: whose personal model it is; None where the arm has one model for all.
        held_out: the client whose held-out records were asked, or `pooled`.
        perplexity: exp(mean negative log-likelihood per response token); n counts tokens.
        accuracy: share of multiple-choice questions answered right; n counts questions. None without any.
        by_kind: accuracy by kind of question.
        chance: accuracy of guessing; None without questions.
    """

    model: str
    member: str | None = None
    held_out: str
    perplexity: Estimate | None = None
    accuracy: Estimate | None = None
    by_kind: dict[str, Estimate] = {}
    chance: float | None = None


class Difference(Table):
    """`model` minus `other` on one held-out set, paired.

    Attributes:
        model, other, held_out: what is compared, on which records.
        accuracy: by question, as a share; None where no question is asked.
        log_perplexity: by record, in nats per token, less than 0 where `model` is better; None without a token to
            score, and in runs of earlier versions.
        other_is_member_mean: `other` stands for the mean over members' personal models.
    """

    model: str
    other: str
    held_out: str
    accuracy: Estimate | None = None
    log_perplexity: Estimate | None = None
    other_is_member_mean: bool = False


class UtilityTable(Table):
    """`results/utility.json`: every model on every held-out set, and paired differences."""

    rows: tuple[Utility, ...]
    differences: tuple[Difference, ...] = ()
    seed: int


class Cell(Table):
    """What a row of the audit is about: canaries of one number of copies, inserted ones or controls, in one model.

    Attributes:
        model: `base` or the name of an arm.
        copies: how often each of these canaries stood in the training data (or would have stood, for controls).
        inserted: False for the controls of that number of copies.
    """

    model: str
    copies: int
    inserted: bool


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
    secrets: dict[str, Estimate] = {}


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
        model: `base` or the name of an arm.
        records: what is told apart: `canaries`, or `records of NAME` (a client's training and held-out records).
        copies: of the canaries; None for records.
        score: `loss`, `ratio` (to the base model), `min-k`, `min-k++` or `zlib`.
        auc: area under the ROC curve, 0.5 for guessing; n counts members and non-members.
        tpr_at_1, tpr_at_01: share of members found at 1 % and at 0.1 % false positives, n counts members; None where
            there are too few non-members for such a rate (100 and 1,000).
    """

    model: str
    records: str
    copies: int | None
    score: str
    auc: Estimate
    tpr_at_1: Estimate | None = None
    tpr_at_01: Estimate | None = None


class LikelihoodGap(Table):
    """Counterfactual memorisation: mean log-likelihood per token (nats), inserted minus control canaries."""

    model: str
    copies: int
    inserted: Estimate
    control: Estimate
    gap: Estimate


class EpsilonBound(Table):
    """An empirical lower bound on ε from the canaries' coins and scores (one-run auditing).

    Attributes:
        model: `base` or the name of an arm.
        copies: of the canaries; None where all were used. With c copies the bound is on what c records together cost.
        epsilon: the largest ε that is rejected at `confidence`; 0 where none is.
        delta: at which it holds.
        confidence: of the bound.
        guesses: coins guessed.
        right: guesses that were right.
        canaries: coins in all.
        accounted: the accountant's ε for one record at the same δ, where the arm has one.
        score: what the guesses were made from.
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
    identifiers: dict[str, dict[str, int]] = {}
    seed: int


class Budget(Table):
    """What one unit of protection has cost.

    Attributes:
        unit: `record` or `member`.
        client: whose records; None for the unit `member`.
        epsilon: at `delta`, after all rounds.
        delta: of the guarantee.
        noise_multiplier: standard deviation of the noise over the clip.
        clip: the largest norm; the first one where it adapts.
        sampling: `poisson` with its rate in words, or why no amplification is counted.
        steps: noisy releases.
        by_round: ε after each round.
        simulated: whether the noise came from the recipe's seed: the guarantee is that of a run with secret noise.
        stopped: the round after which the budget ended training; None where it did not.
    """

    unit: str
    client: str | None
    epsilon: float | None
    delta: float
    noise_multiplier: float
    clip: float
    sampling: str
    steps: int
    by_round: tuple[float | None, ...] = ()
    simulated: bool = True
    stopped: int | None = None


class PrivacyTable(Table):
    """`results/privacy.json`: by arm, the layers in words and what the guarantees came to."""

    layers: dict[str, tuple[str, ...]]
    budgets: dict[str, tuple[Budget, ...]] = {}


class LegTraffic(Table):
    """A leg of federated influence: who took part, and bytes to and from the member with the most."""

    name: str
    members: tuple[str, ...]
    sent: int
    received: int


class MemberInfluence(Table):
    """What a member's records did for a target, as far as the member tells.

    Attributes:
        client, target: which.
        mean: mean score of its records; n counts them.
        below: share of them with a score below 0.
        size: mean of their absolute values.
        balance: sum of all scores over the sum of their absolute values. Near 0 they cancel, as they do where training
            has come to rest; then a negative mean says "less than the others", not "harmful".
    """

    client: str
    target: str
    mean: Estimate
    below: Estimate
    size: float
    balance: float


def in_typical_scores(found: Sequence[MemberInfluence]) -> list[MemberInfluence]:
    """Figures for one target, the most helpful first, with means in units of the mean absolute score of all these
    records: scores have no unit of their own."""
    total = sum(one.size * one.mean.n for one in found)
    unit = total / sum(one.mean.n for one in found) if total else 1.0
    scaled = [
        one.model_copy(
            update={
                "mean": Estimate(
                    value=one.mean.value / unit,
                    low=None if one.mean.low is None else one.mean.low / unit,
                    high=None if one.mean.high is None else one.mean.high / unit,
                    n=one.mean.n,
                )
            }
        )
        for one in found
    ]
    return sorted(scaled, key=lambda one: -one.mean.value)


class ArmInfluence(Table):
    """Whose data helped in an arm.

    Attributes:
        arm: name.
        weights: SHA-256 of the adapter at which influence was measured.
        target: `held_out`, or the file's name; `target_records` of it, in `targets` groups.
        records: training records in the blocks of curvature.
        damping, modules, min_records, reveal: as asked for.
        members: by member and target; empty where nothing is revealed.
        silent: members that told nothing, since they have too few records.
        legs: what travelled.
        hidden: whether sums were formed out of sight; `error` is what rounding for that does to the directions, over
            their length.
        skipped: modules without a gradient.
    """

    arm: str
    weights: str
    target: str
    target_records: int
    targets: tuple[str, ...]
    records: int
    damping: float
    modules: str | None
    min_records: int
    reveal: str
    members: tuple[MemberInfluence, ...]
    silent: tuple[str, ...] = ()
    legs: tuple[LegTraffic, ...]
    hidden: bool
    error: float | None = None
    skipped: tuple[str, ...] = ()

    def told(self, target: str) -> list[MemberInfluence]:
        """Members' figures for a target, as `in_typical_scores` gives them."""
        return in_typical_scores([one for one in self.members if one.target == target])


class InfluenceByMember(Table):
    """`results/influence.json`: whose data helped, in each arm that was measured."""

    arms: tuple[ArmInfluence, ...]


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


class OwnRecord(Table):
    """One of a member's own records under a tuned model.

    Attributes:
        model: name of the arm.
        record: its id.
        asked: tokens that the model was asked for, behind the prompt and the first half of the response.
        matched, matched_by_base: of these, right before the first error, by the tuned and by the base model.
        log_likelihood, log_likelihood_of_base: mean over the response's tokens (nats).
    """

    model: str
    record: str
    asked: int
    matched: int
    matched_by_base: int
    log_likelihood: float
    log_likelihood_of_base: float


class OwnRecords(Table):
    """A member's own records under a tuned model, together; n counts records.

    Attributes:
        model: name of the arm.
        completed, completed_by_base: share of records completed without an error.
        only_by_model: records that the tuned model completes and the base model does not.
        matched, matched_by_base: mean share of the tokens asked for that came before the first error.
        likelihood_gain: mean log-likelihood per token over the base model's (nats). It is above 0 for records that
            were never trained on, too: compare with `controls`.
    """

    model: str
    completed: Estimate
    completed_by_base: Estimate
    only_by_model: list[str]
    matched: Estimate
    matched_by_base: Estimate
    likelihood_gain: Estimate


class OwnTable(Table):
    """What `allmend audit mine` leaves with the member.

    Attributes:
        records: each model on the member's records.
        controls: the same on records that nobody trained on; empty without any.
        rows: by record.
        suffix_tokens: most tokens that a model was asked for.
        passed_over: records whose response is too short to be divided, the same in every model.
        missing: arms that were not there.
    """

    records: tuple[OwnRecords, ...]
    controls: tuple[OwnRecords, ...] = ()
    rows: tuple[OwnRecord, ...] = ()
    suffix_tokens: int = 50
    passed_over: int = 0
    missing: list[str] = []
