"""A member's own records under the models that it helped to tune."""

from pydantic import Field

from allmend.results.figures import Estimate, Table


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
    missing: list[str] = Field(default_factory=list)
