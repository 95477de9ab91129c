"""The influence of records on a model and an adapter that were made elsewhere."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch

from allmend.data.chat import Encoded, Encoder, choose_template
from allmend.data.files import read_records
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.events import Event, WorkPlanned, to_all
from allmend.influence.blocks import Side
from allmend.influence.gradients import OfRecords
from allmend.influence.inverses import INVERSES
from allmend.influence.methods import DAMPING, DataInf, Exact, Gfim, HessianFree, Lissa, Method
from allmend.influence.reliability import agreement, halves
from allmend.influence.scores import Scores, influence
from allmend.influence.table import ABOUT, ROWS, ClientInfluence, InfluenceTable, Row, write_rows
from allmend.intervals import mean, share
from allmend.meter import Meter
from allmend.models.adapters import Trainable, check_adapter, learning_adapter
from allmend.models.load import load_model
from allmend.recipe import Fields
from allmend.run import write_atomic
from allmend.versions import versions

MethodName: TypeAlias = Literal["gfim", "exact", "datainf", "lissa", "hessian_free"]

PASSES = {"gfim": 3, "exact": 4, "datainf": 4, "lissa": 30, "hessian_free": 2}
"""Passes over the training records, about; for the time left."""


@dataclass(frozen=True)
class Settings:
    """How influence is measured.

    Attributes:
        method: which.
        damping: c of λ = c times the mean eigenvalue.
        side: `wide` or `rank`, of `gfim`.
        inverse: a name in `INVERSES`, of `gfim`.
        modules: a regular expression for names of weights; all when None.
        targets: `mean` for one target, `each` for one a record, `kind` for one a label of the records.
        max_tokens: longest record.
        template: `auto`, `chat` or `plain`, as in training.
        tokens_per_pass: that go through the model at once.
        seed: of the splits by which reliability is measured.
    """

    method: MethodName = "gfim"
    damping: float = DAMPING
    side: Side = "wide"
    inverse: str = "cholesky"
    modules: str | None = None
    targets: Literal["mean", "each", "kind"] = "mean"
    max_tokens: int = 512
    template: Literal["auto", "chat", "plain"] = "auto"
    tokens_per_pass: int = 512
    seed: int = 0

    def build(self) -> Method:
        """The method.

        Raises:
            UserError: a name is not known, or the damping is none.
        """
        if self.method not in get_args(MethodName):
            raise UserError(f"there is no method {self.method!r}", hint=f"There are {', '.join(get_args(MethodName))}.")
        if self.inverse not in INVERSES:
            raise UserError(f"there is no inverse {self.inverse!r}", hint=f"There are {', '.join(INVERSES)}.")
        if not self.damping > 0:
            raise UserError(f"damping must be above 0, got {self.damping}")
        match self.method:
            case "gfim":
                return Gfim(self.damping, self.side, INVERSES[self.inverse])
            case "exact":
                return Exact(self.damping)
            case "datainf":
                return DataInf(self.damping)
            case "lissa":
                return Lissa(self.damping)
        return HessianFree()


@dataclass(frozen=True)
class Attributed:
    """What came of it: the rows, and the table with their figures."""

    rows: tuple[Row, ...]
    table: InfluenceTable


def attribute_folder(
    model: str,
    adapter: Path | str,
    *,
    train: Sequence[Path | str],
    target: Path | str,
    out: Path | str | None = None,
    fields: Fields | None = None,
    settings: Settings | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> Attributed:
    """Which records moved an adapter towards a target, or away from it.

    Args:
        model: the adapter's base, a source as in a recipe.
        adapter: a PEFT folder with a LoRA.
        train: files of training records, in a form that a recipe takes; each counts as a client, by its name.
        target: a file of records whose loss is what matters.
        out: a folder for `influence.parquet` and `influence.json`; nothing is written when None.
        fields: the names under which the files keep each part of a record.
        settings: how.
        listeners: told how far it is.

    Raises:
        UserError: a model, an adapter or a file cannot be used, or the method cannot be applied.
    """
    settings = settings or Settings()
    method = settings.build()
    check_adapter(Path(adapter))
    fields = fields or Fields()
    sources = {client_name(Path(path), train): _read(path, fields) for path in train}
    asked = _read(target, fields)
    loaded = load_model(model)
    encoder = Encoder(loaded.tokenizer, choose_template(settings.template, loaded.tokenizer), settings.max_tokens)
    owners = [client for client, records in sources.items() for _ in records]
    records = [record for some in sources.values() for record in some]
    encoded = [encoder.for_training(record) for record in records]
    aim = [encoder.for_training(record) for record in asked]
    groups = _groups(asked, settings)
    emit = to_all(listeners)
    phase = "attribute"
    tokens = float(PASSES[settings.method] * sum(map(len, encoded)) + sum(map(len, aim)))
    emit(WorkPlanned(work={phase: tokens}))
    meter = Meter(emit, phase, tokens)
    with learning_adapter(loaded.model, Path(adapter)) as trainable:
        found = influence(
            _source(trainable, encoded, settings, meter),
            _source(trainable, aim, settings, meter),
            method,
            groups=halves(groups, seed=settings.seed),
        )
    meter.done()
    names = sorted(set(groups))
    rows = _rows(found, names, records, owners, encoded)
    table = InfluenceTable(
        method=settings.method,
        damping=settings.damping,
        side=settings.side,
        modules=settings.modules,
        weights=loaded.digest,
        adapter=_digest(Path(adapter)),
        records=len(records),
        target_records=len(asked),
        clients=tuple(_clients(rows, names, sources)),
        reliability={name: one for name in names if (one := agreement(found.targets, found.values, name)) is not None},
        lambdas=dict(found.solved.damping),
        skipped=found.solved.skipped,
        notes=found.solved.notes,
        versions=versions(),
        seed=settings.seed,
    )
    if out is not None:
        write_rows(Path(out) / ROWS, rows)
        write_atomic(Path(out) / ABOUT, table.model_dump_json(indent=1).encode())
    return Attributed(tuple(rows), table)


def _source(trainable: Trainable, records: Sequence[Encoded], settings: Settings, meter: Meter) -> OfRecords:
    return OfRecords(trainable, records, settings.modules, settings.tokens_per_pass, meter.add)


def client_name(path: Path, all_paths: Sequence[Path | str]) -> str:
    """A file's name up to its first dot; where two files share it, the whole path."""
    name = path.name.partition(".")[0]
    shared = sum(Path(other).name.partition(".")[0] == name for other in all_paths)
    return name if shared == 1 else str(path)


def _read(path: Path | str, fields: Fields) -> list[Record]:
    records, _ = read_records(str(path), fields=fields)
    return records


def _groups(records: Sequence[Record], settings: Settings) -> list[str]:
    match settings.targets:
        case "each":
            return [record.id for record in records]
        case "kind":
            if not any(record.kind for record in records):
                raise UserError("the target records have no label to group them by", where="targets")
            return [record.kind or "(none)" for record in records]
    return ["mean"] * len(records)


def _rows(
    found: Scores, names: Sequence[str], records: Sequence[Record], owners: Sequence[str], encoded: Sequence[Encoded]
) -> list[Row]:
    rows = []
    tokens = torch.tensor([max(1, int(one.target.sum())) for one in encoded], dtype=torch.float64)
    losses = found.losses / tokens
    for name in names:
        values = found.values[:, found.targets.index(name)]
        ranks = torch.empty(len(values), dtype=torch.int64)
        ranks[values.argsort(descending=True, stable=True)] = torch.arange(1, len(values) + 1)
        rows += [
            Row(record.id, owner, name, float(value), int(rank), float(loss), found.method)
            for record, owner, value, rank, loss in zip(records, owners, values, ranks, losses, strict=True)
        ]
    return rows


def _clients(
    rows: Sequence[Row], names: Sequence[str], clients: Sequence[str] | dict[str, list[Record]]
) -> Iterator[ClientInfluence]:
    for name in names:
        for client in clients:
            scores = [row.score for row in rows if (row.client, row.target) == (client, name)]
            if scores:
                yield ClientInfluence(
                    client=client,
                    target=name,
                    mean=mean(scores),
                    harmful=share(sum(score < 0 for score in scores), len(scores)),
                )


def _digest(adapter: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("adapter_model*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
