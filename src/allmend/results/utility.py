"""How well models do on held-out records."""

from pydantic import Field

from allmend.results.figures import Estimate, Table


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
    by_kind: dict[str, Estimate] = Field(default_factory=dict)
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
