"""Who sees what: the likelihood gap in the model that one party holds after a round."""

from collections.abc import Sequence
from typing import Any

from allmend.audit.likelihood import likelihood_gaps, read_texts
from allmend.data.canaries import Canary
from allmend.data.chat import Encoder
from allmend.data.records import Record
from allmend.results import View


def view_rows(
    arm: str, round: int, member: str | None, model: Any, encoder: Encoder, canaries: Sequence[Canary]
) -> list[View]:
    """Rows for what is seen of one round.

    Args:
        arm: its name.
        round: counts from 1.
        member: whose update `model` shows to a coordinator that sees it alone, without secure aggregation; None for
            the model that is sent to all after the round, which is also all that a coordinator sees of a sum.
        model: what is seen, as a causal language model in evaluation mode.
        encoder: as in training.
        canaries: inserted ones and controls; of one member's update, that member's own count.
    """
    own = [canary for canary in canaries if member in (None, canary.client)]
    readings = read_texts(model, [encoder.for_evaluation(Record(one.id, text=one.text)) for one in own])
    return [
        View(
            model=arm,
            round=round,
            party="members" if member is None else "coordinator",
            of=member,
            copies=gap.copies,
            gap=gap.gap,
        )
        for gap in likelihood_gaps(arm, own, readings)
    ]
