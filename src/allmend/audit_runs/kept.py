"""What an audit has found so far: one that is interrupted goes on with the next model when it is started again."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import allmend
from allmend.audit.likelihood import Reading
from allmend.audit.memorisation import Findings
from allmend.errors import UserError
from allmend.models.tensors import JSON, Tensors, read_tensors, write_tensors
from allmend.probes import read_probes, write_probes
from allmend.results import Discoverable, EpsilonBound, Exposure, Extraction, LikelihoodGap, Membership, RankTest, Table

READING = tuple(field.name for field in fields(Reading))


class _Rows(Table):
    """All of `Findings` but probes and readings."""

    model: str
    extraction: tuple[Extraction, ...]
    discoverable: tuple[Discoverable, ...]
    gaps: tuple[LikelihoodGap, ...]
    exposure: tuple[Exposure, ...]
    membership: tuple[Membership, ...]
    epsilon: tuple[EpsilonBound, ...]
    skipped: int
    refused: tuple[str, ...]
    identifiers: dict[str, int]
    ranks: tuple[RankTest, ...]


@dataclass(frozen=True)
class KeptFindings:
    """Findings by model in a folder that is there until the audit is whole.

    Attributes:
        folder: where; made when the first model is done.
        depends_on: all that the figures of a model depend on, by model. Findings under anything else do not count.
    """

    folder: Path
    depends_on: Mapping[str, Any]

    def read(self, model: str) -> Findings | None:
        """What was found in a model; None where nothing was kept that holds here and now."""
        path = self.folder / f"{model}.safetensors"
        if not path.exists():
            return None
        try:
            tensors, facts = read_tensors(path)
            if facts.get("key") != self._key(model):
                return None
            rows = _Rows.model_validate(facts["rows"], strict=False)
            probes = read_probes(self.folder / f"{model}.parquet")
            readings = [_reading(tensors, f"canaries/{place}") for place in range(facts["canaries"])]
            groups = {
                label: [_reading(tensors, f"groups/{label}/{place}") for place in range(size)]
                for label, size in facts["groups"].items()
            }
        except (UserError, ValidationError, KeyError, TypeError):  # of another version, or torn: found again
            return None
        return Findings(
            **{name: getattr(rows, name) for name in _Rows.model_fields},
            probes=probes,
            readings=readings,
            group_readings=groups,
        )

    def write(self, found: Findings) -> None:
        """Keep what was found in a model.

        Raises:
            UserError: the operating system refused.
        """
        rows = _Rows(**{name: getattr(found, name) for name in _Rows.model_fields})
        tensors: Tensors = {}
        for place, reading in enumerate(found.readings):
            tensors |= {f"canaries/{place}/{name}": getattr(reading, name) for name in READING}
        for label, readings in found.group_readings.items():
            for place, reading in enumerate(readings):
                tensors |= {f"groups/{label}/{place}/{name}": getattr(reading, name) for name in READING}
        write_probes(self.folder / f"{found.model}.parquet", found.probes)
        facts: dict[str, JSON] = {
            "key": self._key(found.model),
            "rows": rows.model_dump(mode="json"),
            "canaries": len(found.readings),
            "groups": {label: len(readings) for label, readings in found.group_readings.items()},
        }
        write_tensors(self.folder / f"{found.model}.safetensors", tensors, facts)  # last: without it nothing is kept

    def clear(self) -> None:
        """The audit is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _key(self, model: str) -> str:
        content = json.dumps([allmend.__version__, self.depends_on[model]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _reading(tensors: Mapping[str, torch.Tensor], name: str) -> Reading:
    return Reading(**{field: tensors[f"{name}/{field}"] for field in READING})


def stamp(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of a folder: another model in its place has others."""
    found = []
    for path in sorted(folder.glob("*/*")):
        of = path.stat()
        found.append((str(path.relative_to(folder)), of.st_size, of.st_mtime_ns))
    return found
