"""The audit of a run: its base model and the shared outcome of every arm."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from allmend.audit.memorisation import Findings, RecordGroup, audit_model, tokens_to_read
from allmend.audit.views import view_rows
from allmend.audit_runs.guarantees import accounted_epsilon, largest_delta, privacy_table
from allmend.audit_runs.kept import KeptFindings, stamp
from allmend.audit_runs.learnt import learnt_rows, never_learnt, read_learnt
from allmend.audit_runs.tables import PROBES, check_same_canaries, check_settings, findings_table
from allmend.check import audited
from allmend.data.canaries import Canary, read_canaries
from allmend.data.splits import uniform
from allmend.errors import UserError
from allmend.events import WorkPlanned
from allmend.federation.arm import trainable_of
from allmend.meter import Meter
from allmend.models.load import LoadedModel
from allmend.models.tensors import read_tensors
from allmend.outcomes import outcome, with_outcome
from allmend.prepare import Prepared, differs, prepare, read_frozen, threads
from allmend.probes import write_probes
from allmend.recipe import Audit, Recipe
from allmend.report.card import memorisation_card, write_card
from allmend.report.page import write_report
from allmend.results import BASE, AuditTable, Learnt, PrivacyTable
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
    """The phases of an audit still to do in a run, and what each reads and generates, about, in tokens."""
    tokens = tokens_to_read(prepared.canaries, prepared.encoder, settings, _groups(prepared, settings))
    kept = None if run is None else _kept(run, prepared, models, settings)
    return {f"audit {name}": tokens for name in models if kept is None or kept.read(name) is None}


def _kept(run: RunFolder, prepared: Prepared, models: Sequence[str], settings: Audit) -> KeptFindings:
    """What an audit that was broken off has found."""
    design = [design_digest(settings, prepared.canaries), prepared.model.digest, prepared.recipe.digest()]
    folder = run.path / "results" / UNFINISHED
    return KeptFindings(folder, {name: [*design, stamp(run.arm(name))] for name in models})


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
        settings = _changed(recipe.audit, changes or {})
        prepared = prepare(recipe, Path(str(run.facts["base"])), model=model)
        if prepared.model.digest != run.facts.get("model"):
            raise differs("the base model", run)
        with threads(recipe), run.log(listeners) as log:
            table = audit_arms(run, prepared, log, settings)
        write_cards(run, recipe)
        write_report(run.path)
    return table


def _changed(settings: Audit, changes: Mapping[str, Any]) -> Audit:
    try:
        return Audit.model_validate(settings.model_dump() | dict(changes))
    except ValidationError as error:
        raise UserError(f"not an audit that can be made: {error.errors()[0]['msg']}", where="audit") from None


def audit_arms(run: RunFolder, prepared: Prepared, log: EventLog, settings: Audit) -> AuditTable:
    """Audit the base model and every arm's shared outcome, as they lie on disk, and write table and probes.

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
    arms, untrained = with_outcome(run, audited(recipe))
    unseen: dict[str, set[str]] = {BASE: set()}
    learnt: list[Learnt] = []
    for name in arms:  # all of them before the first model is asked, which takes long
        counts = read_learnt(run, name)
        unseen[name] = never_learnt(run, prepared, name, canaries, counts)
        learnt += learnt_rows(name, canaries, counts)
    groups = _groups(prepared, settings)
    budgets = privacy_table(run, prepared).budgets
    findings: list[Findings] = []
    kept = _kept(run, prepared, list(unseen), settings)
    work = planned_work(prepared, list(unseen), settings, run)
    log.emit(WorkPlanned(work=work))
    for name in unseen:
        if (found := kept.read(name)) is not None:
            findings.append(found)
            continue
        meter = Meter(log.emit, f"audit {name}", work[f"audit {name}"])
        with outcome(run, prepared.model, name) as module:
            findings.append(
                audit_model(
                    name,
                    module,
                    prepared.encoder,
                    canaries,
                    settings,
                    seed=recipe.seed,
                    reference=findings[0] if findings else None,
                    groups=groups,
                    unseen=unseen[name],
                    delta=largest_delta(budgets.get(name, ())),
                    accounted=accounted_epsilon(budgets.get(name, ())),
                    on_tokens=meter.add,
                )
            )
        kept.write(findings[-1])
        meter.done()
    fixed = run.facts.get("audit")
    table = findings_table(
        findings,
        canaries,
        recipe.seed,
        left_out=[f"{name}: the arm has no tuned model" for name in untrained],
        learnt=tuple(learnt),
        views=tuple(row for name in arms for row in _views(run, prepared, canaries, name)),
        design_changed=None if fixed is None else fixed != design_digest(settings, canaries),
    )
    run.write_table("audit", table)
    write_probes(run.path / "results" / PROBES, [probe for found in findings for probe in found.probes])
    kept.clear()
    return table


def _groups(prepared: Prepared, settings: Audit) -> list[RecordGroup]:
    """Each client's training and held-out records that membership is inferred for: as many of both."""
    limit = settings.membership_records
    groups = []
    for client, records in prepared.train.items():
        held_out = prepared.held_out[client]
        n = min(limit, len(records), len(held_out))
        chosen = [sorted(some, key=lambda record: uniform(record.id))[:n] for some in (records, held_out)]
        if n:
            groups.append(RecordGroup(client, *chosen))
    return groups


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
    """Write what was found into the README of every audited arm's folder."""
    audit = run.read_table("audit", AuditTable)
    if audit is None:
        return
    privacy = run.read_table("privacy", PrivacyTable)
    source = recipe.model.source
    name = None if Path(source).is_absolute() or source.startswith(".") else source
    for arm in audited(recipe):
        for folder in (run.arm(arm) / "adapter", run.arm(arm) / "model"):
            if folder.is_dir():
                write_card(folder, memorisation_card(audit, privacy, arm=arm), base_model=name)
