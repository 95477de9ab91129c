"""Rows of a data class as a Parquet file, for whoever wants to look closer."""

import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from allmend.errors import UserError
from allmend.run import write_atomic

RowT = TypeVar("RowT")


def write_rows(path: Path, kind: type[Any], rows: Sequence[Any]) -> None:
    """Write rows of a data class whose fields are plain values, the whole file or nothing."""
    names = [field.name for field in fields(kind)]
    table = pa.table({name: [getattr(row, name) for row in rows] for name in names})
    data = io.BytesIO()
    pq.write_table(table, data)
    write_atomic(path, data.getvalue())


def read_rows(path: Path, kind: type[RowT], *, what: str, hint: str) -> tuple[RowT, ...]:
    """The rows of a file that `write_rows` has written.

    Args:
        path: of the file.
        kind: the data class.
        what: such a file is, in words.
        hint: how to come by one.

    Raises:
        UserError: the file is missing or no such table.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not path.is_file():
        raise UserError("there is no such file", where=path, hint=hint)
    try:
        table = pq.read_table(path, columns=names)
        return tuple(map(kind, *(table.column(name).to_pylist() for name in names)))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"is not {what} of this version: {error}", where=path, hint=hint) from error
