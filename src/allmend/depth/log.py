"""What was measured, on disk: a row for each way to run the model, so that whoever is stopped goes on."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from allmend.depth.measure import Candidate, Measured, added, behind
from allmend.depth.plan import Step
from allmend.errors import UserError
from allmend.run import write_atomic

_FACTS = b"measured with"
"""Key of the file's metadata."""

_HINT = "Name another folder with --out."


class Log:
    """A Parquet file of candidates and their losses, which says what they were measured with.

    Args:
        path: of the Parquet file.
        facts: all that losses follow from, by name: model, text, length of windows.

    Raises:
        UserError: the file is of other facts, or damaged.
    """

    def __init__(self, path: Path, facts: Mapping[str, str | int]) -> None:
        self.path, self.facts = path, dict(facts)
        self._rows: dict[str, tuple[Candidate, Measured]] = {}
        self._losses: dict[str, tuple[list[np.ndarray], float]] = {}
        if not path.is_file():
            return
        try:
            table = pq.read_table(path, columns=["steps", "losses", "windows", "seconds"])
            before = json.loads((table.schema.metadata or {})[_FACTS])
            for row in table.to_pylist():
                windows = np.split(np.asarray(row["losses"], dtype=np.float32), row["windows"])
                self._losses[row["steps"]] = ([*windows] if row["windows"] else [], row["seconds"])
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(
                f"holds no measurements that can be gone on from: {error}", where=path, hint=_HINT
            ) from error
        for name, now in self.facts.items():
            if before.get(name) != now:
                raise UserError(
                    f"was measured with another {name.replace('_', ' ')} ({before.get(name)}, now {now})",
                    where=path,
                    hint=_HINT,
                )

    def known(self, candidates: Sequence[Candidate], layers: int) -> dict[Candidate, Measured]:
        """What was measured of these before, as far as it goes."""
        found = {}
        for one in candidates:
            steps = one.change.steps(layers)
            if (before := self._losses.get(_key(steps))) is not None:
                found[one] = Measured(steps, list(before[0]), before[1])
        return found

    def save(self, found: Mapping[Candidate, Measured], sequential: Measured) -> None:
        """Write all that was measured so far.

        Args:
            found: what is new, or has more windows.
            sequential: the model as it is, on the same windows.

        Raises:
            UserError: the operating system refused.
        """
        for one, measured in found.items():
            if measured.losses:
                self._rows[_key(measured.steps)] = (one, measured)
                self._losses[_key(measured.steps)] = (measured.losses, measured.seconds)
        rows = [_row(one, measured, sequential) for one, measured in self._rows.values()]
        table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
        data = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({_FACTS: json.dumps(self.facts)}), data)
        write_atomic(self.path, data.getvalue())


def _key(steps: Sequence[Step]) -> str:
    return json.dumps([[list(step.layers), step.together] for step in steps])


def _row(one: Candidate, measured: Measured, sequential: Measured) -> dict[str, object]:
    _, error = behind(measured, sequential)
    return {
        "kind": one.kind,
        "start": one.start,
        "end": one.end,
        "depth": measured.depth,
        "loss": measured.loss,
        "delta": added(measured, sequential).value,
        "error": error,
        "tokens": measured.tokens,
        "windows": len(measured.losses),
        "seconds": measured.seconds,
        "dropped": measured.dropped,
        "steps": _key(measured.steps),
        "losses": np.concatenate(measured.losses),
    }
