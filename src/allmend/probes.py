"""Probes: one row for each question that an audit put to a model, kept as Parquet for whoever wants to look closer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allmend.parquet import read_rows, write_rows


@dataclass(frozen=True)
class Probe:
    """One canary, one model, one prefix.

    Attributes:
        model: `base` or the name of an arm.
        canary, kind, client, copies, inserted: of the canary.
        prefix: its length in words (`20 tokens`, `50 %`).
        prefix_tokens: the same, in tokens.
        exact: every further token is right.
        matched: share of the further tokens before the first wrong one.
        bleu: of the continuation, in [0, 1].
        secrets_out: secrets behind the prefix that stand in the continuation, out of `secrets`.
        log_discovered: log p of (n, p)-discoverable extraction: of one sampled continuation that is right (nats).
        log_likelihood: of the whole canary, mean over its tokens (nats).
    """

    model: str
    canary: str
    kind: str
    client: str
    copies: int
    inserted: bool
    prefix: str
    prefix_tokens: int
    exact: bool
    matched: float
    bleu: float
    secrets_out: int
    secrets: int
    log_discovered: float
    log_likelihood: float


def write_probes(path: Path, probes: Sequence[Probe]) -> None:
    """Write the rows as Parquet, the whole file or nothing."""
    write_rows(path, Probe, probes)


def read_probes(path: Path) -> tuple[Probe, ...]:
    """The rows of a file that `write_probes` has written.

    Raises:
        UserError: the file is missing or no such table.
    """
    return read_rows(path, Probe, what="a table of probes", hint="Audit the run again: `allmend audit RUN`.")
