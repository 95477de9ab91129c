"""The influence of records on a model and an adapter that were made elsewhere."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from allmend.attribution.pages import write_influence_page
from allmend.attribution.settings import Settings
from allmend.attribution.subject import Subject, read_subject
from allmend.errors import UserError
from allmend.events import Event, WorkPlanned, to_all
from allmend.influence.conditioning import cautions
from allmend.influence.damping_sweep import SWEEP, sweep
from allmend.influence.reliability import agreement, halves, rank_correlation
from allmend.influence.scores import Scores, influence
from allmend.influence.table import ABOUT, ROWS, ClientInfluence, InfluenceTable, Row, UnderDamping, write_scores
from allmend.intervals import mean, share
from allmend.meter import Meter
from allmend.recipe import Fields
from allmend.run import check_place, write_atomic
from allmend.versions import versions

UNTRAINED = "The adapter is untrained (all its factors B are 0): only the B side has gradients."


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
        out: a folder for `influence.parquet`, `influence.json` and `influence.html`; nothing is written when None.
        fields: the names under which the files keep each part of a record.
        settings: how.
        listeners: told how far it is.

    Raises:
        UserError: a model, an adapter or a file cannot be used, or the method cannot be applied.
    """
    settings = settings or Settings()
    method = settings.build()
    if out is not None:
        check_place(Path(out) / ROWS)
    subject = read_subject(model, adapter, train=train, target=target, fields=fields or Fields(), settings=settings)
    groups = _groups(subject)
    emit = to_all(listeners)
    of_train, of_target = subject.tokens
    dampings = sorted({*SWEEP, settings.damping}) if settings.sweep else [settings.damping]
    phase, tokens = "attribute", settings.passes(dampings=len(dampings)) * of_train + of_target
    emit(WorkPlanned(work={phase: tokens}))
    meter = Meter(emit, phase, tokens)
    split = halves(groups, seed=settings.seed)
    with subject.sources(meter) as (source, aim):
        if settings.method == "gfim":
            subject.check_room(source)
        untrained = (UNTRAINED,) if source.untrained else ()
        passes = subject.kept(source)
        if settings.sweep:
            swept = sweep(passes, aim, method, dampings, groups=split)
        else:
            swept = {settings.damping: influence(passes, aim, method, groups=split)}
    meter.done()
    found = swept[settings.damping]
    names = sorted(set(groups))
    careful = cautions(found.solved.figures, len(subject.records)) if settings.method != "hessian_free" else ()
    rows = _rows(found, names, subject, " ".join(careful))
    silent: dict[str, list[str]] = {}
    for owner, record in subject.silent:
        silent.setdefault(owner, []).append(record.id)
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
        inverse=settings.solver,
        silent={owner: tuple(ids) for owner, ids in silent.items()},
        skipped=found.solved.skipped,
        blocks=dict(found.solved.figures),
        sweep=tuple(_swept(swept, names, settings.damping)) if settings.sweep else (),
        cautions=careful,
        notes=(*subject.notes, *untrained, *found.solved.notes),
        versions=versions(),
        seed=settings.seed,
    )
    texts = texts_of(subject)
    if out is not None:
        write_scores(Path(out) / ROWS, rows)
        write_atomic(Path(out) / ABOUT, table.model_dump_json(indent=1).encode())
        write_influence_page(
            Path(out), rows, table, texts, model=model, adapter=Path(adapter), target=Path(target), settings=settings
        )
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


def _rows(found: Scores, names: Sequence[str], subject: Subject, caution: str) -> list[Row]:
    rows = []
    losses = per_token(found.losses, subject)
    for name in names:
        values = found.values[:, found.targets.index(name)]
        ranks = torch.empty(len(values), dtype=torch.int64)
        ranks[values.argsort(descending=True, stable=True)] = torch.arange(1, len(values) + 1)
        rows += [
            Row(record.id, owner, name, float(value), int(rank), float(loss), found.method, caution)
            for record, owner, value, rank, loss in zip(
                subject.records, subject.owners, values, ranks, losses, strict=True
            )
        ]
        rows += [
            Row(record.id, owner, name, None, rank, None, found.method, caution)
            for rank, (owner, record) in enumerate(subject.silent, start=len(values) + 1)
        ]
    return rows


def _swept(swept: Mapping[float, Scores], names: Sequence[str], default: float) -> Iterator[UnderDamping]:
    of_default = swept[default]
    for name in names:
        place = of_default.targets.index(name)
        for damping, scores in swept.items():
            yield UnderDamping(
                target=name,
                damping=damping,
                agreement=rank_correlation(scores.values[:, place], of_default.values[:, place]),
                reliability=agreement(scores.targets, scores.values, name),
            )


def texts_of(subject: Subject) -> dict[tuple[str, str], str]:
    """What is written in each training record, by client and id."""
    everyone = (*zip(subject.owners, subject.records, strict=True), *subject.silent)
    return {(owner, record.id): " ".join(record.texts) for owner, record in everyone}


def per_token(losses: torch.Tensor, subject: Subject) -> torch.Tensor:
    """Losses of the training records over their targets (nats a token)."""
    return losses / torch.tensor([max(1, int(one.target.sum())) for one in subject.encoded], dtype=torch.float64)


def _clients(rows: Sequence[Row], names: Sequence[str], clients: Sequence[str]) -> Iterator[ClientInfluence]:
    for name in names:
        for client in clients:
            of_client = (row.score for row in rows if (row.client, row.target) == (client, name))
            scores = [score for score in of_client if score is not None]
            if scores:
                yield ClientInfluence(
                    client=client,
                    target=name,
                    mean=mean(scores),
                    harmful=share(sum(score < 0 for score in scores), len(scores)),
                )
