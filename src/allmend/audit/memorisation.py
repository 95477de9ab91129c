"""The audit of one model: every measure on every canary, controls beside inserted ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from allmend.audit.extraction import continuations, extraction_rows
from allmend.audit.likelihood import likelihood_gaps, read_texts
from allmend.data.canaries import Canary
from allmend.data.chat import Encoder
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.results import Extraction, LikelihoodGap


@dataclass(frozen=True)
class Findings:
    """What the audit found in one model; `skipped` counts (canary, prefix) pairs whose prefix is no shorter than the
    canary."""

    extraction: tuple[Extraction, ...]
    gaps: tuple[LikelihoodGap, ...]
    skipped: int


def audit_model(
    name: str,
    model: Any,
    encoder: Encoder,
    canaries: Sequence[Canary],
    *,
    prefix_tokens: Sequence[int],
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Findings:
    """Measure extraction and the likelihood gap.

    Args:
        name: of the model, for the tables.
        model: a causal language model in evaluation mode.
        encoder: as in training.
        canaries: inserted ones and controls.
        prefix_tokens: lengths of the prompts.
        on_tokens: told the tokens read or generated.

    Raises:
        UserError: there are no inserted canaries or no controls, so that no figure would have its null.
    """
    if not any(canary.inserted for canary in canaries) or all(canary.inserted for canary in canaries):
        raise UserError("an audit needs inserted canaries and controls; one of the two is missing", where="canaries")
    encoded = [encoder.for_evaluation(Record(id=canary.id, text=canary.text)) for canary in canaries]
    readings = read_texts(model, encoded, on_tokens=on_tokens)
    rows: list[Extraction] = []
    skipped = 0
    for prefix in sorted(set(prefix_tokens)):
        long = [index for index, reading in enumerate(readings) if len(reading.ids) > prefix]
        skipped += len(readings) - len(long)
        if long:
            found = continuations(
                model,
                [readings[index] for index in long],
                prefix,
                end_token=encoder.tokenizer.eos_token_id,
                on_tokens=on_tokens,
            )
            rows += extraction_rows(name, [canaries[index] for index in long], found, prefix)
    return Findings(tuple(rows), tuple(likelihood_gaps(name, canaries, readings)), skipped)
