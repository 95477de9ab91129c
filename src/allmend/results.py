"""The tables that stages leave in a run's `results/` folder and that the report reads.

Every figure is an `Estimate`: a value with its sample size and, where one can be had, a 95 % interval.
A table is one JSON file (`results/<name>.json`), written as a whole.
"""

from pydantic import BaseModel, ConfigDict

POOLED = "pooled"
"""Name of the held-out set that joins those of all clients."""

BASE = "base"
"""Name of the model before any tuning."""


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
    """Accuracy of `model` minus that of `other`, paired by question, on one held-out set (as a share, not points).

    `other` may stand for the mean over members' personal models (`other_is_member_mean`).
    """

    model: str
    other: str
    held_out: str
    accuracy: Estimate
    other_is_member_mean: bool = False


class UtilityTable(Table):
    """`results/utility.json`: every model on every held-out set, and paired differences of accuracy."""

    rows: tuple[Utility, ...]
    differences: tuple[Difference, ...] = ()
    seed: int


class Extraction(Table):
    """How much of canaries a model completes from a prefix: greedy continuation to the canary's end.

    Attributes:
        model: `base` or the name of an arm.
        copies: how often each of these canaries stood in the training data (the cell, for controls).
        inserted: False for the controls of that cell.
        prefix_tokens: length of the prompt, in tokens.
        exact: share of canaries continued without an error.
        matched: mean share of the continuation before the first wrong token.
        bleu: mean BLEU of the continuation, in [0, 1].
        approximate: share of canaries with BLEU above 0.75.
    """

    model: str
    copies: int
    inserted: bool
    prefix_tokens: int
    exact: Estimate
    matched: Estimate
    bleu: Estimate
    approximate: Estimate


class LikelihoodGap(Table):
    """Counterfactual memorisation: mean log-likelihood per token (nats), inserted minus control canaries."""

    model: str
    copies: int
    inserted: Estimate
    control: Estimate
    gap: Estimate


class AuditTable(Table):
    """`results/audit.json`: extraction by prefix length and copies, and the likelihood gap by copies."""

    extraction: tuple[Extraction, ...]
    gaps: tuple[LikelihoodGap, ...]
    canaries: int
    controls: int
    skipped_prefixes: int = 0
    seed: int
