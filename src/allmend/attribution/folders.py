"""The influence of records on a model and an adapter that were made elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from allmend.attribution.settings import PASSES, Settings
from allmend.attribution.subject import Subject, read_subject
from allmend.errors import UserError
from allmend.events import Event, WorkPlanned, to_all
from allmend.influence.reliability import agreement, halves
from allmend.influence.scores import Scores, influence
from allmend.influence.table import ABOUT, ROWS, ClientInfluence, InfluenceTable, Row, write_scores
from allmend.intervals import mean, share
from allmend.meter import Meter
from allmend.recipe import Fields
from allmend.run import write_atomic
from allmend.versions import versions


@dataclass(frozen=True)
class Attributed:
    """What came of it.

    Attributes:
        rows: a row for each record and target.
        table: their figures.
        texts: of the records, by client and id.
    """

    rows: tuple[Row, ...]
    table: InfluenceTable
    texts: dict[tuple[str, str], str]


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
    subject = read_subject(model, adapter, train=train, target=target, fields=fields or Fields(), settings=settings)
    groups = _groups(subject)
    emit = to_all(listeners)
    of_train, of_target = subject.tokens
    phase, tokens = "attribute", PASSES[settings.method] * of_train + of_target
    emit(WorkPlanned(work={phase: tokens}))
    meter = Meter(emit, phase, tokens)
    with subject.sources(meter) as (source, aim):
        found = influence(source, aim, method, groups=halves(groups, seed=settings.seed))
    meter.done()
    names = sorted(set(groups))
    rows = _rows(found, names, subject)
    table = InfluenceTable(
        method=settings.method,
        damping=settings.damping,
        side=settings.side,
        modules=settings.modules,
        weights=subject.model.digest,
        adapter=subject.digest,
        records=len(subject.records),
        target_records=len(subject.asked),
        clients=tuple(_clients(rows, names, subject.clients)),
        reliability={name: one for name in names if (one := agreement(found.targets, found.values, name)) is not None},
        lambdas=dict(found.solved.damping),
        skipped=found.solved.skipped,
        notes=found.solved.notes,
        versions=versions(),
        seed=settings.seed,
    )
    if out is not None:
        write_scores(Path(out) / ROWS, rows)
        write_atomic(Path(out) / ABOUT, table.model_dump_json(indent=1).encode())
    texts = {
        (owner, record.id): " ".join(record.texts)
        for owner, record in zip(subject.owners, subject.records, strict=True)
    }
    return Attributed(tuple(rows), table, texts)


def _groups(subject: Subject) -> list[str]:
    match subject.settings.targets:
        case "each":
            return [record.id for record in subject.asked]
        case "kind":
            if not any(record.kind for record in subject.asked):
                raise UserError("the target records have no label to group them by", where="targets")
            return [record.kind or "(none)" for record in subject.asked]
    return ["mean"] * len(subject.asked)


def _rows(found: Scores, names: Sequence[str], subject: Subject) -> list[Row]:
    rows = []
    losses = per_token(found.losses, subject)
    for name in names:
        values = found.values[:, found.targets.index(name)]
        ranks = torch.empty(len(values), dtype=torch.int64)
        ranks[values.argsort(descending=True, stable=True)] = torch.arange(1, len(values) + 1)
        rows += [
            Row(record.id, owner, name, float(value), int(rank), float(loss), found.method)
            for record, owner, value, rank, loss in zip(
                subject.records, subject.owners, values, ranks, losses, strict=True
            )
        ]
    return rows


def per_token(losses: torch.Tensor, subject: Subject) -> torch.Tensor:
    """Losses of the training records over their targets (nats a token)."""
    return losses / torch.tensor([max(1, int(one.target.sum())) for one in subject.encoded], dtype=torch.float64)


def _clients(rows: Sequence[Row], names: Sequence[str], clients: Sequence[str]) -> Iterator[ClientInfluence]:
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
