"""What audits of runs and of models made elsewhere have in common: one table, one file of probes, one origin."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allmend.audit.memorisation import Findings, no_prefix_fits
from allmend.data.canaries import Canary, read_canaries
from allmend.data.canary_kinds import KINDS
from allmend.data.chat import Encoder
from allmend.errors import UserError
from allmend.recipe import Audit
from allmend.results import AuditTable

PROBES = "audit.parquet"
"""The audit's rows, one a probe, in `results/`."""


def findings_table(
    findings: Sequence[Findings], canaries: Sequence[Canary], seed: int, *, left_out: Sequence[str] = (), **more: Any
) -> AuditTable:
    """The table of one audit; `left_out` are models without figures, `more` columns that only some audits have."""
    rows: dict[str, Any] = {
        name: tuple(row for found in findings for row in getattr(found, name))
        for name in ("extraction", "gaps", "discoverable", "exposure", "membership", "epsilon", "ranks", "refused")
    }
    rows["refused"] = tuple(dict.fromkeys((*left_out, *rows["refused"])))
    return AuditTable(
        **rows,
        canaries=sum(canary.inserted for canary in canaries),
        controls=sum(not canary.inserted for canary in canaries),
        # the same pairs in every model, fewer where training never drew some canaries
        skipped_prefixes=max((found.skipped for found in findings), default=0),
        identifiers={found.model: found.identifiers for found in findings},
        seed=seed,
        **more,
    )


def check_settings(canaries: Sequence[Canary], encoder: Encoder, settings: Audit) -> None:
    """Raise unless some prefix leaves something to bring out, and the canaries have the secrets that are named.

    Raises:
        UserError: so it is not.
    """
    known = {span.slot for canary in canaries if canary.kind in KINDS for span in canary.secret_spans}
    if unknown := sorted(set(settings.exposure or ()) - known):
        raise UserError(
            f"these canaries have no {', '.join(unknown)} whose exposure could be measured",
            where="exposure",
            hint=f"They have {', '.join(sorted(known))}." if known else "Measure none.",
        )
    if what := no_prefix_fits(canaries, encoder, settings):
        raise UserError(what, where="prefix", hint="Choose a shorter one.")


def check_same_canaries(given: Path, own: Path) -> None:
    """Whether two files hold the same canaries.

    Raises:
        UserError: they do not, or one cannot be read.
    """
    if read_canaries(given) != read_canaries(own):
        raise UserError(f"these are not the canaries of the run in {own.parent}", where=given, hint=f"Use {own}.")
