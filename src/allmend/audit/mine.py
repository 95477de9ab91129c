"""A member's own records: how far does a tuned model complete them, where the base model does not?"""

from collections.abc import Sequence

from allmend.audit.likelihood import Reading
from allmend.intervals import mean, paired_difference, share
from allmend.results import OwnRecord, OwnRecords

SHOWN = 0.5
"""Share of a record's response that the model is shown."""


def own_records(
    model: str, ids: Sequence[str], readings: Sequence[Reading], base: Sequence[Reading], *, suffix_tokens: int
) -> tuple[list[OwnRecord], OwnRecords | None]:
    """One row a record, and the summary; records whose response has fewer than two tokens are passed over.

    The model is shown the prompt and half of the response, and asked for the rest, or `suffix_tokens` tokens of it,
    by greedy decoding (which the teacher-forced reading tells without generating).

    Args:
        model: its name.
        ids: of the records.
        readings: of the records, their responses without an end mark, under the tuned model.
        base: the same under the base model: what it completes was guessed.
        suffix_tokens: most tokens to be brought out.
    """
    rows = []
    for id, reading, before in zip(ids, readings, base, strict=True):
        targets = len(reading.hit)
        start = max(1, round(SHOWN * targets))
        part = slice(start, min(targets, start + suffix_tokens))
        asked = part.stop - part.start
        if asked < 1:
            continue
        matched, guessed = (int(one.hit[part].long().cumprod(0).sum()) for one in (reading, before))
        likelihood, of_base = (one.log_likelihood.mean().item() for one in (reading, before))
        rows.append(
            OwnRecord(
                model=model,
                record=id,
                asked=asked,
                matched=matched,
                matched_by_base=guessed,
                log_likelihood=likelihood,
                log_likelihood_of_base=of_base,
            )
        )
    return rows, _summary(model, rows) if rows else None


def _summary(model: str, rows: Sequence[OwnRecord]) -> OwnRecords:
    complete = [row.matched == row.asked for row in rows]
    by_base = [row.matched_by_base == row.asked for row in rows]
    return OwnRecords(
        model=model,
        completed=share(sum(complete), len(rows)),
        completed_by_base=share(sum(by_base), len(rows)),
        only_by_model=[row.record for row, now, before in zip(rows, complete, by_base, strict=True) if now > before],
        matched=mean([row.matched / row.asked for row in rows], bounds=(0, 1)),
        matched_by_base=mean([row.matched_by_base / row.asked for row in rows], bounds=(0, 1)),
        likelihood_gain=paired_difference(
            [row.log_likelihood for row in rows], [row.log_likelihood_of_base for row in rows]
        ),
    )
