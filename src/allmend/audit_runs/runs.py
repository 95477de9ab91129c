"""The audit of a run: its base model, what all members share of every arm, and their own models of arms it names."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from allmend.audit.memorisation import Findings, audit_model, tokens_to_read
from allmend.audit.over_members import kept_by_members
from allmend.audit.views import view_rows
from allmend.audit_runs.guarantees import accounted_epsilon, largest_delta, privacy_table
from allmend.audit_runs.kept import KeptFindings, stamp
from allmend.audit_runs.learnt import learnt_rows, never_learnt, read_learnt
from allmend.audit_runs.subjects import Subject, records_of, subjects_of
from allmend.audit_runs.tables import PROBES, check_same_canaries, check_settings, findings_table
from allmend.check import audited, unknown_models
from allmend.data.canaries import Canary, read_canaries
from allmend.data.icd10cm import SPECIALTIES
from allmend.errors import UserError
from allmend.events import WorkPlanned
from allmend.federation.arm import FOLDERS, trainable_of
from allmend.meter import Meter
from allmend.models.load import LoadedModel
from allmend.models.tensors import read_tensors
from allmend.outcomes import members_with_outcome, outcome, place_of, with_outcome
from allmend.prepare import Prepared, differs, prepare, read_frozen, threads
from allmend.probes import write_probes
from allmend.recipe import Audit, Recipe
from allmend.report.card import memorisation_card, write_card
from allmend.report.page import write_report
from allmend.results import BASE, AuditTable, Learnt, PrivacyTable, member_of
from allmend.run import EventLog, RunFolder

UNFINISHED = "audit.unfinished"
"""Folder of what an audit found in the models that it is through with, in `results/`; gone when all are done."""

VIEWS = "views"
"""Folder of what each party saw of an arm's rounds, in the arm's folder."""


def design_digest(settings: Audit, canaries: Sequence[Canary]) -> str:
    """SHA-256 of all that an audit's figures depend on beside the model: measures, cells, texts and coins."""
    content = [settings.model_dump(), [asdict(canary) for canary in canaries]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def planned_work(
    prepared: Prepared, models: Sequence[str], settings: Audit, run: RunFolder | None = None
) -> dict[str, float]:
    """The phases of an audit still to do in a run, and what each reads and generates, about, in tokens.

    Args:
        prepared: of the run.
        models: `base` and arms; those of an arm's members are one phase.
        settings: the audit's design.
        run: where it is; None before it begins.
    """
    canaries, encoder = prepared.canaries, prepared.encoder
    subjects = subjects_of(prepared, models, settings)
    kept = None if run is None else _kept(run, prepared, subjects, settings)
    groups = records_of(prepared, settings, subjects)
    tokens = {name: tokens_to_read(canaries, encoder, settings, some) for name, some in groups.items()}
    work: dict[str, float] = {}
    for subject in subjects:
        if kept is None or kept.read(subject.name) is None:
            work[subject.phase] = work.get(subject.phase, 0.0) + tokens[subject.name]
    return work


def _kept(run: RunFolder, prepared: Prepared, subjects: Sequence[Subject], settings: Audit) -> KeptFindings:
    """What an audit that was broken off has found."""
    design = [design_digest(settings, prepared.canaries), prepared.model.digest, prepared.recipe.digest()]
    folder = run.path / "results" / UNFINISHED
    return KeptFindings(folder, {one.name: [*design, stamp(place_of(run, one.arm, one.member))] for one in subjects})


def audit_run(
    out: Path | str,
    *,
    canaries: Path | str | None = None,
    changes: Mapping[str, Any] | None = None,
    model: LoadedModel | None = None,
    listeners: Sequence[Any] = (),
) -> AuditTable:
    """Audit a run's models again, from the artefacts on disk, and write its audit table and report.

    Args:
        out: a run whose recipe has canaries.
        canaries: the run's own canaries, where the caller wants to be sure that they are.
        changes: keys of the recipe's `[audit]` and their values for this audit (`{"prefix_tokens": [20, 50]}`).
        model: the recipe's model, where the caller has it in memory already.
        listeners: told every event.

    Raises:
        UserError: there is no run, it is in use, has no canaries or no tuned model yet, or `canaries` are others.
    """
    run = RunFolder.open(Path(out))
    if canaries is not None and run.canaries.exists():
        check_same_canaries(Path(canaries), run.canaries)
    with run.lock():
        recipe = read_frozen(run)
        settings = _changed(recipe, changes or {})
        prepared = prepare(recipe, Path(str(run.facts["base"])), model=model)
        if prepared.model.digest != run.facts.get("model"):
            raise differs("the base model", run)
        with threads(recipe), run.log(listeners) as log:
            table = audit_arms(run, prepared, log, settings)
        write_cards(run, recipe)
        write_report(run.path)
    return table


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Audit:
    try:
        settings = Audit.model_validate(recipe.audit.model_dump() | dict(changes))
    except ValidationError as error:
        raise UserError(f"not an audit that can be made: {error.errors()[0]['msg']}", where="audit") from None
    clients = [client.name for client in recipe.clients] or list(SPECIALTIES)
    if unknown := list(unknown_models(recipe.model_copy(update={"audit": settings}), clients)):
        hint = f"Arms: {', '.join(recipe.arms())}; members' own models: ARM/MEMBER."
        raise UserError("; ".join(unknown), where="audit.models", hint=hint)
    return settings


def audit_arms(run: RunFolder, prepared: Prepared, log: EventLog, settings: Audit) -> AuditTable:
    """Audit the base model and the outcomes of arms, as they lie on disk, and write table and probes.

    An outcome is what all members share, or each member's own model where the settings name such an arm.

    What an audit with the same design has found in models that have not changed since, before it was broken off,
    is not looked for again.

    Raises:
        UserError: the run has no canaries, no tuned model or no fitting prefix, or a canary was never learnt from.
    """
    if not run.canaries.exists():
        raise UserError(
            "the run has no canaries, so there is nothing to audit",
            where=run.path,
            hint="Add [canaries] to the recipe and start a new run.",
        )
    recipe, canaries = prepared.recipe, read_canaries(run.canaries)
    check_settings(canaries, prepared.encoder, settings)
    arms, untrained = with_outcome(run, audited(recipe.model_copy(update={"audit": settings})))
    unseen: dict[str, set[str]] = {BASE: set()}
    learnt: list[Learnt] = []
    for name in arms:  # all of them before the first model is asked, which takes long
        counts = read_learnt(run, name)
        unseen[name] = never_learnt(run, prepared, name, canaries, counts)
        learnt += learnt_rows(name, canaries, counts)
    left_out = [f"{name}: the arm has no tuned model" for name in untrained]
    subjects = []
    for one in subjects_of(prepared, list(unseen), settings):
        if one.member is None or one.member in members_with_outcome(run, one.arm):
            subjects.append(one)
        else:
            left_out.append(f"{one.name}: the member took part in no round, or its model is not here")
    groups = records_of(prepared, settings, subjects)
    budgets = privacy_table(run, prepared).budgets
    findings: list[Findings] = []
    kept = _kept(run, prepared, subjects, settings)
    work = planned_work(prepared, list(unseen), settings, run)
    log.emit(WorkPlanned(work=work))
    for phase, group in groupby(subjects, key=lambda one: one.phase):
        meter = None
        for one in group:
            if (found := kept.read(one.name)) is not None:
                findings.append(found)
                continue
            meter = meter or Meter(log.emit, phase, work[phase])
            with outcome(run, prepared.model, one.arm, one.member) as module:
                findings.append(
                    audit_model(
                        one.name,
                        module,
                        prepared.encoder,
                        canaries,
                        settings,
                        seed=recipe.seed,
                        reference=findings[0] if findings else None,
                        groups=groups[one.name],
                        unseen=unseen[one.arm],
                        delta=largest_delta(budgets.get(one.arm, ())),
                        accounted=accounted_epsilon(budgets.get(one.arm, ())),
                        member=one.member,
                        on_tokens=meter.add,
                    )
                )
            kept.write(findings[-1])
        if meter is not None:
            meter.done()
    fixed = run.facts.get("audit")
    table = findings_table(
        findings,
        canaries,
        recipe.seed,
        left_out=left_out,
        learnt=tuple(learnt),
        views=tuple(row for name in arms for row in _views(run, prepared, canaries, name)),
        design_changed=None if fixed is None else fixed != design_digest(settings, canaries),
        members=tuple(row for name in arms for row in kept_by_members(name, _of_members(findings, name))),
    )
    run.write_table("audit", table)
    write_probes(run.path / "results" / PROBES, [probe for found in findings for probe in found.probes])
    kept.clear()
    return table


def _of_members(findings: Sequence[Findings], arm: str) -> list[Findings]:
    """What was found in the own models of an arm's members."""
    return [found for found in findings if member_of(found.model)[0] == arm and member_of(found.model)[1]]


def _views(run: RunFolder, prepared: Prepared, canaries: Sequence[Canary], arm: str) -> Iterator[Any]:
    """The likelihood gap in what each party saw of an arm's rounds, where it was kept."""
    folders = sorted((run.arm(arm) / VIEWS).glob("round-*"))
    if not folders:
        return
    with trainable_of(prepared.model, prepared.recipe.arms()[arm].adapter, seed=prepared.recipe.seed) as trainable:
        trainable.model.eval()
        for folder in folders:
            round = int(folder.name.removeprefix("round-"))
            for path in sorted(folder.glob("*.safetensors")):
                tensors, _ = read_tensors(path)
                trainable.load(tensors)
                member = None if path.stem == "broadcast" else path.stem.removeprefix("update-")
                yield from view_rows(arm, round, member, trainable.model, prepared.encoder, canaries)


def write_cards(run: RunFolder, recipe: Recipe) -> None:
    """Write what was found into the README of every audited model's folder."""
    audit = run.read_table("audit", AuditTable)
    if audit is None:
        return
    privacy = run.read_table("privacy", PrivacyTable)
    source = recipe.model.source
    name = None if Path(source).is_absolute() or source.startswith(".") else source
    tuned = [*(row.model for row in audit.gaps), *(row.model for row in audit.epsilon)]
    for model in dict.fromkeys(name for name in tuned if name != BASE):
        arm, member = member_of(model)
        for folder in (place_of(run, arm, member) / kind for kind in FOLDERS.values()):
            if folder.is_dir():
                write_card(folder, memorisation_card(audit, privacy, arm=arm, member=member), base_model=name)
