"""Checkpoints of a federation: the coordinator's and every member's state after a round, whole or not at all."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from allmend.errors import UserError
from allmend.models.tensors import read_tensors, write_tensors
from allmend.run import folder_atomic
from allmend.strategy import State

_SERVER = "server.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """States after `round`."""

    round: int
    server: State
    members: dict[str, State]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one arm; only the newest is kept.

    Attributes:
        folder: of the arm.
        identity: of what the states belong to (the recipe's digest and the arm); a checkpoint of another is refused.
    """

    folder: Path
    identity: str

    def save(self, checkpoint: Checkpoint) -> None:
        """Write beside, rename, then delete the older ones.

        Raises:
            UserError: the operating system refused (no space); the older checkpoint is untouched.
        """
        older = self._folders()
        with folder_atomic(self.folder / f"round-{checkpoint.round:06d}") as beside:
            self._write(beside / _SERVER, checkpoint.server, checkpoint.round)
            for name, state in checkpoint.members.items():
                self._write(beside / "members" / f"{name}.safetensors", state, checkpoint.round)
        for folder in older:
            if folder.name != f"round-{checkpoint.round:06d}":
                shutil.rmtree(folder, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None before the first round.

        Raises:
            UserError: it is damaged or belongs to another recipe.
        """
        folders = self._folders()
        if not folders:
            return None
        newest = folders[-1]
        server, round = self._read(newest / _SERVER)
        members = {path.stem: self._read(path)[0] for path in sorted(newest.glob("members/*.safetensors"))}
        return Checkpoint(round, server, members)

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("round-*") if path.is_dir())

    def _write(self, path: Path, state: State, round: int) -> None:
        write_tensors(path, state.tensors, {"identity": self.identity, "round": round, "facts": state.facts})

    def _read(self, path: Path) -> tuple[State, int]:
        tensors, metadata = read_tensors(path)
        if metadata.get("identity") != self.identity:
            raise UserError(
                "the checkpoint belongs to another recipe",
                where=path,
                hint="Resume with the recipe that the run was started with, or start a new run in another folder.",
            )
        return State(tensors, metadata["facts"]), int(metadata["round"])
