"""The table of influence: a row for each record and target as Parquet, and what it was made with as JSON beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allmend.influence.conditioning import BlockFigures
from allmend.parquet import read_rows, write_rows
from allmend.results import Estimate, Table

ROWS, ABOUT = "influence.parquet", "influence.json"

SIGN = "above 0: training on the record lowers the target's loss"


@dataclass(frozen=True)
class Row:
    """One record and one target.

    Attributes:
        record_id, client: the record, and whose it is.
        target: the group of target records.
        score: above 0 where training on the record lowers the target's loss; None for a record without a token to
            learn from, which training passes over.
        rank: 1 for the most helpful of all records; those without a score come last.
        loss: of the record, per token (nats); None without a score.
        method: of influence.
        caution: why the score is to be taken with care; the same for all of a table.
    """

    record_id: str
    client: str
    target: str
    score: float | None
    rank: int
    loss: float | None
    method: str
    caution: str = ""


class ClientInfluence(Table):
    """What a client's records did for a target.

    Attributes:
        client, target: which.
        mean: mean score of its records; n counts them.
        harmful: share of its records with a score below 0.
    """

    client: str
    target: str
    mean: Estimate
    harmful: Estimate


class UnderDamping(Table):
    """What another damping makes of a target's scores.

    Attributes:
        target: which.
        damping: c.
        agreement: Spearman's correlation of the scores with those of the damping that was asked for; None where all
            scores are equal.
        reliability: as of `InfluenceTable`, under this damping; None for a target that is one record.
    """

    target: str
    damping: float
    agreement: float | None
    reliability: Estimate | None


class InfluenceTable(Table):
    """What a table of influence was made with, and its figures by client.

    Attributes:
        method, damping, side, modules: as asked for.
        sign: what a score above 0 means.
        weights: SHA-256 of the base model; `adapter` of the adapter's weights.
        inverse: that solved the blocks, of `gfim`.
        records: scored; target_records: of all targets.
        silent: records without a token to learn from, which have no score, by client.
        clients: by client and target.
        reliability: by target: Spearman's correlation of the scores that two halves of the target records give, over
            splits; a target that is one record has none.
        lambdas: damping by module; `skipped` modules had no gradient.
        blocks: by module, of methods with blocks: how well it is conditioned and solved.
        sweep: of other dampings, where that was asked for.
        cautions: why no score is to be relied on by itself; they stand beside every one.
        notes: what else a reader should know.
        versions: of Python and packages.
        seed: of the splits.
    """

    method: str
    damping: float
    side: str
    modules: str | None
    sign: str = SIGN
    weights: str
    adapter: str
    records: int
    target_records: int
    clients: tuple[ClientInfluence, ...]
    reliability: dict[str, Estimate]
    lambdas: dict[str, float]
    inverse: str = "cholesky"
    silent: dict[str, tuple[str, ...]]
    skipped: tuple[str, ...] = ()
    blocks: dict[str, BlockFigures]
    sweep: tuple[UnderDamping, ...] = ()
    cautions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str]
    seed: int


def write_scores(path: Path, rows: Sequence[Row]) -> None:
    """Write as Parquet, the whole file or nothing."""
    write_rows(path, Row, rows)


def read_scores(path: Path) -> tuple[Row, ...]:
    """The rows of a file that `write_scores` has written.

    Raises:
        UserError: the file is missing or no such table.
    """
    return read_rows(path, Row, what="a table of influence", hint="Make one with `allmend attribute`.")
