"""Gradients of records kept on disk: the model goes through the records once, whatever many passes a method takes.

A file holds a packed row's records. Whoever is stopped goes on with the rows that are not there yet; scores are the
same bits as without, since what is read back is what was formed.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from allmend.errors import UserError
from allmend.influence.gradients import Batch, OfRecords
from allmend.models.tensors import JSON, read_tensors, write_tensors
from allmend.strategy import grouped, of_group

ROOM = 1.05
"""Times the bytes of all gradients that must be free: for the files' heads, and for what else goes on."""


@dataclass(frozen=True)
class Cached:
    """A source whose gradients are in files once they were formed.

    Attributes:
        source: forms them.
        folder: of the files.
        identity: all that gradients follow from, by name: another one is refused.

    Raises:
        UserError: the disk has no room, or the folder holds gradients of another identity.
    """

    source: OfRecords
    folder: Path
    identity: Mapping[str, JSON]

    def __post_init__(self) -> None:
        there = sorted(self.folder.glob("*.safetensors"))
        for path in there[:1]:
            self._read(path)
        needed = ROOM * len(self.source) * self.source.nbytes - sum(path.stat().st_size for path in there)
        beside = next(one for one in (self.folder, *self.folder.absolute().parents) if one.is_dir())
        if (free := shutil.disk_usage(beside).free) < needed:
            raise UserError(
                f"{len(self.source):,} records × {self.source.nbytes / 1e6:.2f} MB of gradients need "
                f"{needed / 1e9:.2f} GB, and {free / 1e9:.2f} are free",
                where=self.folder,
                hint="Free some space, narrow --modules, or leave --cache out.",
            )

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Batch]:
        for number, row in enumerate(self.source.rows()):
            if (path := self._file(number)).is_file():
                batch = self._read(path)
            else:
                batch = self.source.batch(row)
                tensors = grouped("gradient", {name: g.contiguous() for name, g in batch.gradients.items()})
                facts: dict[str, JSON] = {"identity": self.identity, "places": list(batch.places)}
                write_tensors(path, tensors | {"losses": batch.losses}, facts)
            yield batch
            self.source.on_tokens(row.tokens)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"

    def _read(self, path: Path) -> Batch:
        tensors, facts = read_tensors(path)
        known = facts.get("identity")
        if not isinstance(known, dict) or not isinstance(facts.get("places"), list) or "losses" not in tensors:
            raise UserError("holds no gradients", where=path, hint="Name an empty folder with --cache.")
        for name, now in self.identity.items():
            if known.get(name) != now:
                raise UserError(
                    f"the gradients here are of another {name.replace('_', ' ')}: {known.get(name)}, now {now}",
                    where=self.folder,
                    hint="Name another folder with --cache, or go back to what they were made with.",
                )
        return Batch(tuple(facts["places"]), of_group("gradient", tensors), tensors["losses"])
