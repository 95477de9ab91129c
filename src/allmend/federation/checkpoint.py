"""Checkpoints of a federation: the coordinator's and every member's state after a round, whole or not at all."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allmend.errors import UserError
from allmend.models.tensors import JSON, read_some, read_tensors, write_tensors
from allmend.run import folder_atomic, write_atomic
from allmend.strategy import State

_SERVER = "server.safetensors"
_BEGUN = "begun.json"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """States after `round`, and how many rounds each member has begun to train in."""

    round: int
    server: State
    members: dict[str, State]
    took_part: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one arm; only the newest is kept.

    Attributes:
        folder: of the arm.
        identity: of what the states belong to (the recipe's digest and the arm); a checkpoint of another is refused.
    """

    folder: Path
    identity: str

    def save(self, checkpoint: Checkpoint, *, announce: Callable[[], None] = lambda: None) -> None:
        """Write beside, rename, then delete the older ones.

        `announce` is called between writing and renaming: a kill later than that finds the announcement and the
        checkpoint, an earlier one finds neither, and one between them an announcement that a resumption makes void.

        Raises:
            UserError: the operating system refused (no space); the older checkpoint is untouched.
        """
        older = self._folders()
        with folder_atomic(self.folder / f"round-{checkpoint.round:06d}") as beside:
            names = sorted(checkpoint.members)
            about: dict[str, JSON] = {"round": checkpoint.round, "members": names, "took_part": checkpoint.took_part}
            self._write(beside / _SERVER, checkpoint.server, about)
            for name, state in checkpoint.members.items():
                self._write(_of_member(beside, name), state, {"round": checkpoint.round})
            announce()
        for folder in older:
            if folder.name != f"round-{checkpoint.round:06d}":
                shutil.rmtree(folder, ignore_errors=True)

    def begin(self, round: int, took_part: Mapping[str, int]) -> None:
        """Note that members begin to train in `round`, before they do: `begun` knows of it even if it is broken off.

        Raises:
            UserError: the operating system refused.
        """
        write_atomic(self.folder / _BEGUN, json.dumps({"round": round, "took_part": dict(took_part)}).encode())

    def begun(self, round: int) -> dict[str, int] | None:
        """How many rounds each member has begun to train in, if `round` was begun last and broken off.

        Raises:
            UserError: the note cannot be read.
        """
        path = self.folder / _BEGUN
        if not path.exists():
            return None
        try:
            note = json.loads(path.read_bytes())
            return dict(note["took_part"]) if note["round"] == round else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot be read: {error}", where=path, hint="Start a new run.") from error

    def newest_round(self) -> int:
        """The round of the newest checkpoint; 0 before the first. Nothing is read but names."""
        folders = self._folders()
        return int(folders[-1].name.removeprefix("round-")) if folders else 0

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None before the first round.

        Raises:
            UserError: it is damaged or belongs to another recipe.
        """
        folders = self._folders()
        if not folders:
            return None
        newest = folders[-1]
        server, metadata = self._read(newest / _SERVER)
        members = {name: self._read(_of_member(newest, name))[0] for name in metadata["members"]}
        return Checkpoint(metadata["round"], server, members, metadata["took_part"])

    def members(self, names: Collection[str]) -> dict[str, State]:
        """The members' states in the newest checkpoint, with no tensors but these; empty before the first round.

        What is read does not grow with what learns.

        Raises:
            UserError: one is damaged or belongs to another recipe.
        """
        found = {}
        for path in sorted((self._folders()[-1] / "members").glob(f"*{_SUFFIX}")) if self._folders() else ():
            tensors, metadata = read_some(path, names)
            self._check(path, metadata)
            found[path.name.removesuffix(_SUFFIX)] = State(tensors, metadata["facts"])
        return found

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("round-*") if path.is_dir())

    def _write(self, path: Path, state: State, metadata: Mapping[str, JSON]) -> None:
        write_tensors(path, state.tensors, {"identity": self.identity, "facts": state.facts, **metadata})

    def _read(self, path: Path) -> tuple[State, dict[str, Any]]:
        tensors, metadata = read_tensors(path)
        self._check(path, metadata)
        return State(tensors, metadata["facts"]), metadata

    def _check(self, path: Path, metadata: Mapping[str, Any]) -> None:
        if metadata.get("identity") != self.identity:
            raise UserError(
                "the checkpoint belongs to another recipe",
                where=path,
                hint="Resume with the recipe that the run was started with, or start a new run in another folder.",
            )


def _of_member(folder: Path, name: str) -> Path:
    return folder / "members" / f"{name}{_SUFFIX}"
