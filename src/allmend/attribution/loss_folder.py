"""What retrainings came to, kept on disk one by one, so that a comparison that was stopped goes on where it stopped."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.models.tensors import JSON
from allmend.run import fault, write_atomic

Identity = Mapping[str, JSON]
"""Everything that the losses follow from, by name."""


@dataclass(frozen=True)
class LossFolder:
    """Losses of the target after each retraining, in `FOLDER/retrained/000.json` and so on.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def open(cls, path: Path, identity: Identity, *, others: Collection[str] = ()) -> "LossFolder":
        """The folder, which is made where there is none.

        Args:
            path: of the folder.
            identity: what the losses follow from.
            others: names that may stand beside them.

        Raises:
            UserError: what it holds was made with another identity, or it cannot be read or written.
        """
        facts = path / "retraining.json"
        try:
            if facts.is_file():
                _check_same(_read(facts), identity, path)
                return cls(path)
            known = {*others, "retrained"}
            if path.is_dir() and any(
                one.name not in known and not one.name.endswith(".partial") for one in path.iterdir()
            ):
                raise UserError(
                    "this folder is not empty and holds no comparison", where=path, hint="Choose another with --out."
                )
        except OSError as error:
            raise fault(error, path) from error
        write_atomic(facts, json.dumps(identity, indent=1).encode())
        return cls(path)

    def read(self, index: int, records: Sequence[str], targets: int) -> list[float] | None:
        """Losses of the target under a model, summed over each record's tokens (nats); None where it is to be trained.

        Args:
            index: of the half.
            records: names of its records.
            targets: number of target records.

        Raises:
            UserError: the file is damaged.
        """
        path = self._file(index)
        if not path.is_file():
            return None
        found = _read(path)
        try:
            losses = [float(one) for one in found["losses"]]
            if found["records"] != list(records) or len(losses) != targets:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError("holds no losses of this half of the records", where=path, hint=_DELETE) from None
        return losses

    def write(self, index: int, records: Sequence[str], losses: Sequence[float]) -> None:
        """Keep what a retraining came to.

        Raises:
            UserError: the operating system refused.
        """
        content = {"records": list(records), "losses": list(losses)}
        write_atomic(self._file(index), json.dumps(content).encode())

    def _file(self, index: int) -> Path:
        return self.path / "retrained" / f"{index:03}.json"


_DELETE = "Delete it, and it is made again."


def digest(records: Sequence[Encoded], owners: Sequence[str] = ()) -> str:
    """SHA-256 of records as the model reads them: tokens, which of them are targets, and whose they are."""
    found = hashlib.sha256()
    for place, record in enumerate(records):
        owner = owners[place] if owners else ""
        found.update(json.dumps([owner, record.id, record.ids.tolist(), record.target.tolist()]).encode())
    return found.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise UserError("is damaged", where=path, hint=_DELETE)


def _check_same(kept: Identity, identity: Identity, path: Path) -> None:
    wanted = json.loads(json.dumps(identity))  # what JSON makes of tuples
    for name in sorted(kept.keys() | wanted.keys()):
        if kept.get(name) != wanted.get(name):
            was, now = (_short(one.get(name)) for one in (kept, wanted))
            raise UserError(
                f"retrainings here were made with another {name.replace('_', ' ')}: {was}, now {now}",
                where=path,
                hint="Choose another folder with --out, or go back to what they were made with.",
            )


def _short(value: JSON) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
