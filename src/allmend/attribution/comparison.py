"""Methods of influence side by side: what they foretell of retraining, whether they agree, and what they cost."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from allmend.attribution.comparison_plan import TRACIN, Plan
from allmend.attribution.halves import Halves, metered, retraining_identity, training_work
from allmend.attribution.loss_folder import LossFolder
from allmend.attribution.method_figures import LOSS, MethodComparison, MethodFigures, Pair, RetrainingFigures
from allmend.attribution.retraining import checkpoint_rates, checkpoints
from allmend.attribution.scored import (
    AllScored,
    gradients_fit,
    score_by,
    score_checkpoints,
    scoring_work,
    target_tokens,
)
from allmend.attribution.settings import Settings
from allmend.attribution.subject import Subject, read_subject
from allmend.errors import UserError
from allmend.events import Event, Stopped, WorkPlanned, to_all
from allmend.influence.agreement import rank_agreement
from allmend.influence.damping_alone import DampingAlone
from allmend.influence.methods import HessianFree, Method
from allmend.influence.quality import chance_lds, linear_datamodeling_score
from allmend.meter import Meter
from allmend.models.adapters import learning_adapter
from allmend.recipe import Fields
from allmend.run import check_place, write_atomic
from allmend.versions import versions

FIGURES, TRAINED = "comparison.json", "trained"
"""In the folder: the table, and the adapter that was trained there, by checkpoint."""

CHECKPOINTS = {"half": 0.5, "whole": 1.0}
"""Of an adapter that is trained here: names, and the share of the steps that is done then."""

FIRST, SCORES, AGAIN = "first training", "scores", "retraining"
"""Phases."""


def compare_methods(
    model: str,
    adapter: Path | str,
    *,
    train: Sequence[Path | str],
    target: Path | str,
    plan: Plan,
    out: Path | str | None = None,
    fields: Fields | None = None,
    settings: Settings | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> MethodComparison:
    """Score records by several methods, and judge each by what retraining on halves of the records does.

    Args:
        model, adapter, train, target, fields, listeners: as of `attribute_folder`.
        plan: what is compared.
        out: a folder for `comparison.json`, for the losses after each retraining and for the adapter that is trained
            first; a comparison that was stopped goes on from there.
        settings: as of `attribute_folder`, but for the method and the targets: here each target record is one.

    Raises:
        UserError: as of `attribute_folder`; or the folder is of other records or settings, a training diverged, or no
            method can be applied.
    """
    settings = settings or Settings()
    methods = _built(plan, settings)
    retrains = plan.subsets > 0 or plan.train_first
    if out is None and retrains:
        raise UserError("retraining needs a folder for what it comes to", where="--out", hint="Name one.")
    if out is not None:
        check_place(Path(out) / FIGURES)
    whole = read_subject(model, adapter, train=train, target=target, fields=fields or Fields(), settings=settings)
    subject = _with_some_targets(whole, plan)
    if plan.subsets and len(subject.records) < 4:
        raise UserError(
            f"{len(subject.records)} training records have no halves to tell apart", where="train", hint="Name more."
        )
    folder = None
    if out is not None and retrains:
        folder = LossFolder.open(Path(out), retraining_identity(subject, plan.retraining), others=(FIGURES, TRAINED))
    emit = to_all(listeners)
    try:
        found = _compare(subject, plan, methods, folder, emit)
    except KeyboardInterrupt:
        emit(Stopped(cause="interrupted"))
        raise
    if out is not None:
        write_atomic(Path(out) / FIGURES, found.model_dump_json(indent=1).encode())
    return found


def _built(plan: Plan, settings: Settings) -> dict[str, Method]:
    """All but TracIn; beside DataInf both that it is to be compared with."""
    found: dict[str, Method] = {
        name: replace(settings, method=name).build()  # type: ignore[arg-type]  # checked by the plan
        for name in plan.methods
        if name != TRACIN
    }
    if "datainf" in found:
        found.setdefault("hessian_free", HessianFree())
        alone = DampingAlone(settings.damping)
        found[alone.name] = alone
    return found


def _with_some_targets(subject: Subject, plan: Plan) -> Subject:
    count = len(subject.aim)
    if count <= plan.most_targets:
        return subject
    chosen = sorted(random.Random(f"{plan.retraining.seed}/targets").sample(range(count), plan.most_targets))
    note = f"{plan.most_targets} of {count:,} target records were taken at random; see --most-targets."
    return replace(
        subject,
        asked=tuple(subject.asked[place] for place in chosen),
        aim=tuple(subject.aim[place] for place in chosen),
        notes=(*subject.notes, note),
    )


def _compare(
    subject: Subject,
    plan: Plan,
    methods: dict[str, Method],
    folder: LossFolder | None,
    emit: Callable[[Event], None],
) -> MethodComparison:
    """Perhaps train the adapter that is scored; score; train on halves."""
    scored, adapters, missing = subject, plan.checkpoints or (subject.adapter,), False
    if folder is not None and plan.train_first:
        adapters = tuple(folder.path / TRAINED / name for name in CHECKPOINTS)
        scored = replace(subject, adapter=adapters[-1])
        missing = not all(one.is_dir() for one in adapters)
    halves = Halves.of(plan.subsets, subject, plan.retraining, folder)
    keeping = gradients_fit(subject)
    several = len(adapters) if TRACIN in plan.methods else 0
    work = {
        FIRST: training_work(subject, range(len(subject.encoded)), plan.retraining) if missing else 0.0,
        SCORES: scoring_work(subject, list(methods), checkpoints=several, keeping=keeping),
        AGAIN: halves.work(),
    }
    emit(WorkPlanned(work={name: tokens for name, tokens in work.items() if tokens}))
    if missing:
        _train_first(subject, plan, adapters, Meter(emit, FIRST, work[FIRST]))
    meter = Meter(emit, SCORES, work[SCORES])
    found = score_by(scored, methods, meter, keeping=keeping)
    if TRACIN in plan.methods:
        rates: Sequence[float] | None = plan.rates or None
        if plan.train_first:
            rates = checkpoint_rates(len(subject.encoded), plan.retraining, tuple(CHECKPOINTS.values()))
        found.methods[TRACIN] = score_checkpoints(scored, adapters, rates, meter)
    meter.done()
    if work[AGAIN]:
        halves.train(Meter(emit, AGAIN, work[AGAIN]))
    return _table(scored, plan, found, halves)


def _train_first(subject: Subject, plan: Plan, adapters: Sequence[Path], meter: Meter) -> None:
    with learning_adapter(subject.model.model, subject.adapter) as trainable:
        found = checkpoints(
            trainable,
            subject.encoded,
            plan.retraining,
            seed=plan.retraining.seed,
            shares=tuple(CHECKPOINTS.values()),
            on_step=metered(meter),
        )
        for path, tensors in zip(adapters, found, strict=True):
            trainable.save(path, tensors, base=str(subject.model.folder))
    meter.done()


def _table(subject: Subject, plan: Plan, found: AllScored, halves: Halves) -> MethodComparison:
    retraining, seed, losses = plan.retraining, plan.retraining.seed, halves.array()
    order = [*plan.methods, *(name for name in found.methods if name not in (*plan.methods, LOSS)), LOSS]
    values = {name: one for name in order if (one := found.methods[name].values) is not None}
    if list(values) == [LOSS]:
        notes = "; ".join(note for one in found.methods.values() for note in one.notes)
        raise UserError(f"no method could be applied ({notes})", hint="Raise the damping, or name other methods.")
    judged = {
        name: linear_datamodeling_score(one, halves.places, losses, seed=seed)
        for name, one in values.items()
        if plan.subsets
    }
    return MethodComparison(
        methods=tuple(
            MethodFigures(method=name, lds=judged.get(name), passes=one.passes, seconds=one.seconds, notes=one.notes)
            for name in order
            for one in [found.methods[name]]
        ),
        pairs=tuple(
            Pair(first=first, second=second, spearman=one)
            for (first, second), one in rank_agreement(values, seed=seed).items()
        ),
        retraining=RetrainingFigures(
            subsets=plan.subsets,
            learning_rate=retraining.learning_rate,
            epochs=retraining.epochs,
            batch_size=retraining.batch_size,
            losses=tuple(losses.sum(1) / target_tokens(subject)),
            chance=chance_lds(len(subject.records), halves.places, losses, seed=seed),
        )
        if plan.subsets
        else None,
        records=len(subject.records),
        target_records=len(subject.aim),
        trained_here=plan.train_first,
        loss=found.loss,
        pass_seconds=found.pass_seconds,
        damping=subject.settings.damping,
        side=subject.settings.side,
        inverse=subject.settings.solver,
        modules=subject.settings.modules,
        weights=subject.model.digest,
        adapter=subject.digest,
        seed=seed,
        notes=(*subject.notes, *found.notes),
        versions=versions(),
    )
