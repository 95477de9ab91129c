"""The table of influence: a row for each record and target as Parquet, and what it was made with as JSON beside it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from allmend.errors import UserError
from allmend.results import Estimate, Table
from allmend.run import write_atomic

ROWS, ABOUT = "influence.parquet", "influence.json"

SIGN = "above 0: training on the record lowers the target's loss"


@dataclass(frozen=True)
class Row:
    """One record and one target.

    Attributes:
        record_id, client: the record, and whose it is.
        target: the group of target records.
        score: above 0 where training on the record lowers the target's loss.
        rank: 1 for the most helpful of all records.
        loss: of the record, per token (nats).
        method: of influence.
    """

    record_id: str
    client: str
    target: str
    score: float
    rank: int
    loss: float
    method: str


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


class InfluenceTable(Table):
    """What a table of influence was made with, and its figures by client.

    Attributes:
        method, damping, side, modules: as asked for.
        sign: what a score above 0 means.
        weights: SHA-256 of the base model; `adapter` of the adapter's weights.
        records: scored; target_records: of all targets.
        clients: by client and target.
        reliability: by target: Spearman's correlation of the scores that two halves of the target records give, over
            splits; a target that is one record has none.
        lambdas: damping by module; `skipped` modules had no gradient.
        notes: what a reader should know.
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
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str]
    seed: int


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write as Parquet, the whole file or nothing."""
    names = [field.name for field in fields(Row)]
    table = pa.table({name: [getattr(row, name) for row in rows] for name in names})
    data = io.BytesIO()
    pq.write_table(table, data)
    write_atomic(path, data.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `write_rows` has written.

    Raises:
        UserError: the file is missing or no such table.
    """
    names = [field.name for field in fields(Row)]
    hint = "Make one with `allmend attribute`."
    if not path.is_file():
        raise UserError("there is no such file", where=path, hint=hint)
    try:
        table = pq.read_table(path, columns=names)
        return list(map(Row, *(table.column(name).to_pylist() for name in names)))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"is not a table of influence: {error}", where=path, hint=hint) from error
