"""Records to look at: which of a model's training records may be wrong, by influence and by simpler measures."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from allmend.attribution.folders import per_token, texts_of
from allmend.attribution.pages import write_review_page
from allmend.attribution.settings import Settings
from allmend.attribution.subject import read_subject
from allmend.errors import UserError
from allmend.events import Event, WorkPlanned, to_all
from allmend.influence.inverses import INVERSES
from allmend.influence.quality import Detection, detection, difference
from allmend.influence.scores import influence, self_influence
from allmend.meter import Meter
from allmend.recipe import Fields
from allmend.run import check_place, write_atomic

MEASURES = ("influence", "loss", "self_influence")
"""How suspicious a record is: its influence the other way round, its loss per token, and its influence on itself."""

WRONG = {"true", "1", "yes", "noisy", "wrong"}
"""What a field may hold that says that a record is wrong."""


@dataclass(frozen=True)
class Suspect:
    """A training record, the more suspicious the higher each measure.

    Attributes:
        record_id, client: which.
        influence: on the target, the other way round: above 0 where training on it raises the target's loss.
        loss: per token (nats).
        self_influence: on its own loss.
        rank: by influence; 1 is the first to look at.
        wrong: whether its label says so; None without labels.
    """

    record_id: str
    client: str
    influence: float
    loss: float
    self_influence: float
    rank: int
    wrong: bool | None = None


@dataclass(frozen=True)
class Review:
    """The list and, where labels say what is wrong, how well each measure finds it.

    Attributes:
        suspects: in the order in which to look at them.
        found: by measure.
        notes: what a reader should know of the records.
        verdict: whether influence finds more than the simpler measures.
    """

    suspects: tuple[Suspect, ...]
    found: dict[str, Detection]
    verdict: str
    notes: tuple[str, ...] = ()


def review(
    model: str,
    adapter: Path | str,
    *,
    train: Sequence[Path | str],
    target: Path | str,
    noisy: str = "",
    out: Path | str | None = None,
    settings: Settings | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> Review:
    """Rank training records by how likely they are wrong.

    Args:
        model: the adapter's base, a source as in a recipe.
        adapter: a PEFT folder with a LoRA.
        train: files of training records; each counts as a client.
        target: a file of records that are known to be right.
        noisy: a field of the training records that says which are wrong, to see what each measure is worth.
        out: a JSON Lines file for the list; a page with the records beside it has the same name and `.html`.
        settings: how.
        listeners: told how far it is.

    Raises:
        UserError: as of `attribute_folder`; labels say that all records are wrong, or none; or `out` is called as its
            page.
    """
    settings = settings or Settings()
    method = settings.build()
    if out is not None:
        check_place(Path(out))
        check_place(page_of(out))
    fields = Fields(kind=noisy) if noisy else Fields()
    subject = read_subject(model, adapter, train=train, target=target, fields=fields, settings=settings)
    labels = [record.kind.lower() in WRONG for record in subject.records] if noisy else None
    if labels is not None and len(set(labels)) < 2:
        raise UserError(
            f"the field {noisy!r} says that {'all' if labels[0] else 'no'} records are wrong: nothing could be found",
            where="--noisy",
        )
    emit = to_all(listeners)
    of_train, of_target = subject.tokens
    phase, tokens = "attribute", settings.passes(more=2) * of_train + of_target
    emit(WorkPlanned(work={phase: tokens}))
    meter = Meter(emit, phase, tokens)
    with subject.sources(meter) as (source, aim):
        subject.check_room(source)
        passes = subject.kept(source)
        scores = influence(passes, aim, method)
        own = self_influence(passes, damping=settings.damping, side=settings.side, inverse=INVERSES[settings.solver])
    meter.done()
    measures = {
        "influence": (-scores.values[:, 0]).tolist(),
        "loss": per_token(scores.losses, subject).tolist(),
        "self_influence": own.tolist(),
    }
    order = sorted(range(len(subject.records)), key=lambda place: -measures["influence"][place])
    suspects = tuple(
        Suspect(
            subject.records[place].id,
            subject.owners[place],
            influence=measures["influence"][place],
            loss=measures["loss"][place],
            self_influence=measures["self_influence"][place],
            rank=rank,
            wrong=None if labels is None else labels[place],
        )
        for rank, place in enumerate(order, start=1)
    )
    found = {} if labels is None else {name: detection(measures[name], labels) for name in MEASURES}
    notes = (*subject.notes, *scores.solved.notes)
    made = Review(suspects, found, _verdict(measures, labels), notes)
    if out is not None:
        text = io.StringIO()
        for one in suspects:
            text.write(json.dumps(asdict(one)) + "\n")
        write_atomic(Path(out), text.getvalue().encode())
        write_review_page(
            page_of(out),
            made,
            texts_of(subject),
            model=model,
            adapter=Path(adapter),
            target=Path(target),
            noisy=noisy,
            settings=settings,
        )
    return made


def page_of(out: Path | str) -> Path:
    """The page beside a list.

    Raises:
        UserError: the list itself would have that name.
    """
    path = Path(out).with_suffix(".html")
    if path == Path(out):
        raise UserError(
            "is the name of the page beside the list",
            where=out,
            hint=f"Name the list otherwise, such as {path.with_suffix('.jsonl')}.",
        )
    return path


def _verdict(measures: dict[str, list[float]], labels: list[bool] | None) -> str:
    if labels is None:
        return (
            "No label says what is wrong, so nothing here shows that influence finds more than a high loss does; look "
            "at the head of both lists."
        )
    gaps = {name: difference(measures["influence"], measures[name], labels) for name in MEASURES[1:]}
    better = [name for name, gap in gaps.items() if gap.low is not None and gap.low > 0]
    worse = [name for name, gap in gaps.items() if gap.high is not None and gap.high < 0]
    if len(better) == len(gaps):
        return "Influence finds more than the loss and than self-influence."
    if worse:
        return f"Influence finds less than {' and '.join(name.replace('_', '-') for name in worse)}: sort by that."
    return "The simple measures are as good: what the loss finds, influence does not find better, as far as this shows."
