"""Weights that are done, one file each, so that whoever is stopped goes on at the next."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from allmend.errors import UserError
from allmend.models.packing import Packed
from allmend.run import write_atomic

FACTS = "parts.json"


@dataclass(frozen=True)
class Row:
    """What became of a weight.

    Attributes:
        layer: its name.
        rows, columns: its shape.
        format: of its values; bfloat16 where it has none.
        pattern: of its zeros; empty where it has none.
        method: that was taken.
        damping: of its sweep; not a number without one.
        bytes: that it takes.
        zeros: share of its weights.
        seen, held_out: error of the output, as shares of its size, on windows that a sweep has learnt from and others;
            not numbers without calibration.
        dead: inputs that no token of the calibration has.
        seconds: that it took.
    """

    layer: str
    rows: int
    columns: int
    format: str
    pattern: str
    method: str
    damping: float
    bytes: int
    zeros: float
    seen: float
    held_out: float
    dead: int
    seconds: float


class Parts:
    """A folder of weights that are done, which says what they were made of.

    Args:
        folder: is made where it is not there.
        facts: all that weights follow from, by name: model, plan, text.

    Raises:
        UserError: the folder is of other facts, or damaged; or the operating system refused.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str]) -> None:
        self.folder = folder
        path = folder / FACTS
        if not path.is_file():
            write_atomic(path, json.dumps(dict(facts), indent=2, sort_keys=True).encode())
            return
        try:
            before = json.loads(path.read_bytes())
            other = next((name for name, now in facts.items() if before[name] != now), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot be gone on from: {error}", where=path, hint=_HINT) from error
        if other is not None:
            raise UserError(
                f"was begun with another {other} ({before[other]}, now {facts[other]})", where=path, hint=_HINT
            )

    def __contains__(self, layer: str) -> bool:
        return self._path(layer).is_file()

    def put(self, row: Row, packed: Packed) -> None:
        """Keep a weight, the whole of it or nothing.

        Raises:
            UserError: the operating system refused.
        """
        facts = {"row": json.dumps(asdict(row)), "dtype": str(packed.dtype).removeprefix("torch.")}
        tensors = {name: tensor.contiguous() for name, tensor in packed.tensors.items()}
        write_atomic(self._path(row.layer), save(tensors, metadata=facts))

    def get(self, layer: str) -> tuple[Row, Packed]:
        """A weight that is done.

        Raises:
            UserError: its file is damaged.
        """
        path = self._path(layer)
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                row = Row(**json.loads(facts["row"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
                return row, Packed(tensors, (row.rows, row.columns), getattr(torch, facts["dtype"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"is damaged: {error}", where=path, hint="Remove it, and run the command again.") from error

    def all(self, layers: list[str]) -> Iterator[tuple[Row, Packed]]:
        """Those of these layers, in their order."""
        return map(self.get, layers)

    def _path(self, layer: str) -> Path:
        return self.folder / f"{layer}.safetensors"


_HINT = "Name another folder with --out, or remove this one."
