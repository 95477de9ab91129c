"""Audits from end to end: of a run, of a model made elsewhere, of a member's own records, and of runs side by side."""

import contextlib
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from allmend.audit.compare import Audited, compare
from allmend.audit.likelihood import read_texts
from allmend.audit.memorisation import Findings, RecordGroup, audit_model, tokens_to_read
from allmend.audit.mine import own_records
from allmend.audit.views import view_rows
from allmend.data.canaries import Canary, canary_of, read_canaries
from allmend.data.chat import Encoded, Encoder
from allmend.data.files import load_client
from allmend.data.splits import uniform
from allmend.errors import UserError
from allmend.events import RoundDone
from allmend.federation.arm import Training, trainable_of
from allmend.federation.privacy.ledger import open_ledger
from allmend.federation.strategies import STRATEGIES
from allmend.learn.scores import read_scores
from allmend.meter import Meter
from allmend.models.adapters import applied
from allmend.models.load import LoadedModel, load_model
from allmend.models.tensors import read_tensors
from allmend.prepare import Prepared, differs, prepare, prepare_model, read_frozen, threads
from allmend.probes import read_probes, write_probes
from allmend.recipe import Audit, Recipe
from allmend.report.card import memorisation_card, write_card
from allmend.report.page import write_report
from allmend.results import (
    BASE,
    MEMBERS,
    AuditTable,
    Budget,
    Comparison,
    Learnt,
    OwnRecord,
    OwnRecords,
    OwnTable,
    PrivacyTable,
    UtilityTable,
)
from allmend.run import EventLog, RunFolder, write_atomic

VIEWS = "views"
"""Folder of what each party saw of an arm's rounds, in the arm's folder."""

PROBES = "audit.parquet"
"""The audit's rows, one a probe, in `results/`."""

_LEARNT = "learnt.json"


def design_digest(settings: Audit, canaries: Sequence[Canary]) -> str:
    """SHA-256 of all that an audit's figures depend on beside the model: measures, cells, texts and coins."""
    content = [settings.model_dump(), [asdict(canary) for canary in canaries]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def audited(recipe: Recipe) -> list[str]:
    """Arms that are audited, as far as the recipe alone tells."""
    if recipe.audit.models is not None:
        return list(recipe.audit.models)
    return [arm.name for arm in recipe.arms().values() if STRATEGIES[arm.strategy.name].shares]


def expected_tokens(prepared: Prepared) -> float:
    """What the audit of one model reads and generates, about."""
    return tokens_to_read(prepared.canaries, prepared.encoder, prepared.recipe.audit, _groups(prepared))


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
        _same_canaries(Path(canaries), run.canaries)
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
    """Audit the base model and every arm's shared outcome, as they lie on disk, and write table and probes."""
    if not run.canaries.exists():
        raise UserError(
            "the run has no canaries, so there is nothing to audit",
            where=run.path,
            hint="Add [canaries] to the recipe and start a new run.",
        )
    recipe, canaries = prepared.recipe, read_canaries(run.canaries)
    groups = _groups(prepared)
    budgets = privacy_table(run, prepared).budgets
    findings: list[Findings] = []
    learnt: list[Learnt] = []
    for name in (BASE, *audited(recipe)):
        unseen: set[str] = set()
        if name != BASE:
            counts = read_learnt(run, name)
            unseen = _unseen(name, canaries, counts, recipe)
            learnt += _learnt_rows(name, canaries, counts)
        meter = Meter(log.emit, f"audit {name}", expected_tokens(prepared))
        with _outcome(run, prepared.model, name) as module:
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
                    unseen=unseen,
                    delta=_delta(budgets.get(name, ())),
                    accounted=_accounted(budgets.get(name, ())),
                    on_tokens=meter.add,
                )
            )
        meter.done()
    fixed = run.facts.get("audit")
    table = _table(
        findings,
        canaries,
        recipe.seed,
        learnt=tuple(learnt),
        views=tuple(row for name in audited(recipe) for row in _views(run, prepared, canaries, name)),
        design_changed=None if fixed is None else fixed != design_digest(settings, canaries),
    )
    run.write_table("audit", table)
    write_probes(run.path / "results" / PROBES, [probe for found in findings for probe in found.probes])
    return table


def _table(findings: Sequence[Findings], canaries: Sequence[Canary], seed: int, **more: Any) -> AuditTable:
    rows: dict[str, Any] = {
        name: tuple(row for found in findings for row in getattr(found, name))
        for name in ("extraction", "gaps", "discoverable", "exposure", "membership", "epsilon", "refused")
    }
    return AuditTable(
        **rows,
        canaries=sum(canary.inserted for canary in canaries),
        controls=sum(not canary.inserted for canary in canaries),
        skipped_prefixes=sum(found.skipped for found in findings),
        identifiers={found.model: found.identifiers for found in findings},
        seed=seed,
        **more,
    )


# --- what was learnt from


def write_learnt(run: RunFolder, arm: str, canaries: Sequence[Canary], training: Training) -> None:
    """Keep how much training looked at each canary: steps that saw a copy, and its tokens under the loss."""
    counts = {canary.id: [0, 0] for canary in canaries if canary.inserted}
    for record, (steps, tokens) in training.learnt.items():
        if (canary := canary_of(record)) in counts:
            counts[canary][0] += steps
            counts[canary][1] += tokens
    content = {"canaries": counts, "layers": training.layers}
    write_atomic(run.arm(arm) / _LEARNT, json.dumps(content, indent=1).encode())


def read_learnt(run: RunFolder, arm: str) -> dict[str, tuple[int, int]]:
    """Steps and tokens by canary; empty for a run that kept no count.

    Raises:
        UserError: the file cannot be read.
    """
    return {name: (steps, tokens) for name, (steps, tokens) in _read_learnt(run, arm)["canaries"].items()}


def _read_learnt(run: RunFolder, arm: str) -> dict[str, Any]:
    path = run.arm(arm) / _LEARNT
    if not path.exists():
        return {"canaries": {}, "layers": []}
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=path, hint="Start a new run.") from error
    return found


def _unseen(arm: str, canaries: Sequence[Canary], counts: Mapping[str, tuple[int, int]], recipe: Recipe) -> set[str]:
    """Inserted canaries that Poisson sampling never drew.

    Raises:
        UserError: a canary was not learnt from for another reason: that it is not in the model would prove nothing.
    """
    if not counts:
        return set()
    unseen = {canary.id for canary in canaries if canary.inserted and not counts.get(canary.id, (0, 0))[1]}
    privacy = recipe.arms()[arm].privacy
    if not unseen or (privacy.record is not None and privacy.record.sampling == "poisson"):
        return unseen
    layers = [name for name in ("deduplicate", "goldfish") if getattr(privacy, name) is not None]
    left_out = f", or privacy.{' or privacy.'.join(layers)} left out what there was to learn" if layers else ""
    raise UserError(
        f"{len(unseen)} of the planted canaries were never learnt from in arm {arm!r} ({', '.join(sorted(unseen)[:3])}"
        f"{' …' if len(unseen) > 3 else ''}), so that the audit would call them not memorised without a reason: their "
        f"client took part in no round, training was too short to reach them{left_out}",
        where="audit",
        hint="Train for a whole pass over the records (train.local_epochs, strategy.rounds, participation), or leave "
        "the canaries' client out of canaries.clients, in a new run. The tuned models are kept.",
    )


def _learnt_rows(arm: str, canaries: Sequence[Canary], counts: Mapping[str, tuple[int, int]]) -> list[Learnt]:
    rows = []
    for copies in sorted({canary.copies for canary in canaries}):
        found = [counts[canary.id] for canary in canaries if canary.copies == copies and canary.id in counts]
        if found:
            steps, tokens = ([one[place] for one in found] for place in (0, 1))
            rows.append(
                Learnt(
                    model=arm,
                    copies=copies,
                    canaries=len(found),
                    tokens=sum(tokens) / len(found),
                    steps=sum(steps) / len(found),
                    least_tokens=min(tokens),
                )
            )
    return rows


# --- guarantees


def privacy_table(run: RunFolder, prepared: Prepared) -> PrivacyTable:
    """Every arm's layers in words, and what its guarantees have cost, from the recipe and the run's log."""
    layers, budgets = {}, {}
    history = run.history()
    for name, arm in prepared.recipe.arms().items():
        parties, whole = prepared.protected(arm)
        rounds = [event for event in history if isinstance(event, RoundDone) and event.arm == name]
        found = []
        for party, account in open_ledger(whole, parties).accounts.items():
            if account.settings.clip == math.inf:  # neither clip nor noise: training as without the layer
                continue
            by_round = tuple(event.epsilon.get(party) for event in rounds)
            took_part = sum(party == MEMBERS or party in event.clients for event in rounds)
            spent = account.epsilon(took_part)
            found.append(
                Budget(
                    unit=account.unit,
                    client=None if party == MEMBERS else party,
                    epsilon=spent if math.isfinite(spent) else None,
                    delta=account.settings.delta,
                    noise_multiplier=account.release.noise_multiplier,
                    clip=account.settings.clip,
                    sampling=account.sampling,
                    steps=account.releases(took_part),
                    by_round=by_round,
                    simulated=arm.privacy.randomness == "seeded",
                    stopped=len(rounds) if 0 < len(rounds) < arm.strategy.rounds else None,
                )
            )
        layers[name] = tuple(_read_learnt(run, name)["layers"])
        if found:
            budgets[name] = tuple(found)
    return PrivacyTable(layers=layers, budgets=budgets)


def _delta(budgets: Sequence[Budget]) -> float:
    return max((budget.delta for budget in budgets), default=0.0)


def _accounted(budgets: Sequence[Budget]) -> float | None:
    """ε of one record: by the records' guarantee, which the members' implies too."""
    spent = (
        [budget.epsilon for budget in budgets if budget.unit == unit and budget.epsilon is not None]
        for unit in ("record", "member")
    )
    return min((max(values) for values in spent if values), default=None)


# --- models and data


@contextlib.contextmanager
def _outcome(run: RunFolder, model: LoadedModel, name: str) -> Iterator[torch.nn.Module]:
    """A model of the run as others would load it: the base, base and adapter, or the tuned model's folder."""
    folder = run.arm(name)
    if name == BASE:
        yield model.model
    elif (folder / "adapter").is_dir():
        with applied(model.model, folder / "adapter") as module:
            yield module
    elif (folder / "model").is_dir():
        yield load_model(str(folder / "model"), dtype=model.model.dtype, device=model.model.device).model
    else:
        raise UserError(
            f"arm {name!r} has no tuned model yet",
            where=folder,
            hint=f"Finish the run: `allmend tune --resume {run.path}`.",
        )


def _groups(prepared: Prepared) -> list[RecordGroup]:
    """Each client's training and held-out records that membership is inferred for: as many of both."""
    limit = prepared.recipe.audit.membership_records
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


# --- models made elsewhere


def audit_folder(
    model: str,
    canaries: Path | str,
    *,
    out: Path | str,
    adapter: Path | str | None = None,
    reference: str | None = None,
    settings: Audit | None = None,
    seed: int = 0,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> AuditTable:
    """Audit a model, or a PEFT adapter on it, that was made elsewhere, on canaries that were planted in its data.

    Args:
        model: a source as in a recipe: a folder, a Hub name, a GGUF file.
        canaries: the canaries' file, `canaries.jsonl`, with both those that were inserted and the controls.
        out: folder for `results/audit.json`, `results/audit.parquet` and `report.html`; it may be there already, but
            not as a run.
        adapter: a PEFT folder. The model itself is its reference then.
        reference: source of the model before tuning, where `model` is a tuned one; without it there are no figures
            relative to a base.
        settings: the audit's design.
        seed: of bootstraps and sampled values.
        on_tokens: told the tokens read or generated.

    Raises:
        UserError: a model, the adapter or the canaries cannot be used, or they belong to different runs.
    """
    if RunFolder(Path(out)).marker.exists():
        raise UserError(
            "a run is here, whose own audit would be lost", where=out, hint="Choose another folder for this audit."
        )
    settings = settings or Audit()
    planted = read_canaries(Path(canaries))
    _check_origin(Path(canaries), [Path(one) for one in (adapter, model) if one and Path(one).is_dir()])
    findings: list[Findings] = []
    loaded = load_model(model)
    encoder = Encoder(loaded.tokenizer, "plain", sys.maxsize)
    if adapter is not None:
        with applied(loaded.model, Path(adapter)):
            pass  # told before the base is asked, which takes long

    def probe(name: str, module: torch.nn.Module) -> None:
        base = findings[0] if findings else None
        found = audit_model(name, module, encoder, planted, settings, seed=seed, reference=base, on_tokens=on_tokens)
        findings.append(found)

    if reference is not None:
        base = load_model(reference, dtype=loaded.model.dtype, device=loaded.model.device)
        if base.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise UserError(
                f"{reference} has another tokenizer than {model}, so that likelihoods cannot be compared",
                where="reference",
                hint="Name the model that was tuned, or leave the reference out.",
            )
        probe(BASE, base.model)
    elif adapter is not None:
        probe(BASE, loaded.model)
    if adapter is not None:
        with applied(loaded.model, Path(adapter)) as module:
            probe("adapter", module)
    else:
        probe("model", loaded.model)
    table = _table(findings, planted, seed)
    folder = Path(out)
    run = RunFolder(folder)
    run.write_table("audit", table)
    write_probes(folder / "results" / PROBES, [row for found in findings for row in found.probes])
    write_report(folder)
    return table


def _check_origin(canaries: Path, models: Sequence[Path]) -> None:
    """A model that lies in a run has canaries of its own; those of another run were never in its data."""
    for folder in models:
        for parent in folder.resolve().parents:
            own = RunFolder(parent).canaries
            if RunFolder(parent).marker.exists() and own.exists():
                _same_canaries(canaries, own)
                break


def _same_canaries(given: Path, own: Path) -> None:
    if read_canaries(given) != read_canaries(own):
        raise UserError(f"these are not the canaries of the run in {own.parent}", where=given, hint=f"Use {own}.")


# --- a member's own records


def mine(
    out: Path | str,
    data: Path | str,
    *,
    controls: Path | str | None = None,
    suffix_tokens: int = 50,
    model: LoadedModel | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> OwnTable:
    """Ask a run's tuned models for a member's own records. Nothing is written, and nothing leaves this machine.

    Args:
        out: the run, or a copy of its folder.
        data: the member's records, in a form that a recipe takes.
        controls: records of the same kind that nobody trained on.
        suffix_tokens: most tokens that a model is asked for.
        model: the recipe's model, where the caller has it in memory already.
        on_tokens: told the tokens read.

    Raises:
        UserError: there is no run or tuned model, or the records cannot be read.
    """
    run = RunFolder.open(Path(out))
    recipe = read_frozen(run)
    loaded, encoder = prepare_model(recipe, Path(str(run.facts["base"])), model=model)
    if loaded.digest != run.facts.get("model"):
        raise differs("the base model", run)
    sets = {"records": data} | ({"controls": controls} if controls else {})
    encoded = {name: _own(path, recipe, encoder) for name, path in sets.items()}
    with threads(recipe):
        base = {name: read_texts(loaded.model, records, on_tokens=on_tokens) for name, records in encoded.items()}
        rows: list[OwnRecord] = []
        summaries: dict[str, list[OwnRecords]] = {"records": [], "controls": []}
        for arm in audited(recipe):
            with _outcome(run, loaded, arm) as module:
                for name, records in encoded.items():
                    readings = read_texts(module, records, on_tokens=on_tokens)
                    ids = [record.id for record in records]
                    found, summary = own_records(arm, ids, readings, base[name], suffix_tokens=suffix_tokens)
                    rows += found if name == "records" else []
                    summaries[name] += [summary] if summary else []
    return OwnTable(records=tuple(summaries["records"]), controls=tuple(summaries["controls"]), rows=tuple(rows))


def _own(path: Path | str, recipe: Recipe, encoder: Encoder) -> list[Encoded]:
    client = load_client("mine", str(path), fields=recipe.data.fields, held_out=0.0, base=Path())
    return [encoder.for_training(record) for record in (*client.train, *client.held_out)]


# --- runs side by side


def compare_runs(runs: Sequence[Path | str]) -> Comparison:
    """The audited models of several runs (and arms of one run) side by side, each against the first tuned one.

    Args:
        runs: run folders, or `FOLDER:ARM` for one arm of it.

    Raises:
        UserError: a folder is no run, it is not audited yet, or it has no such arm.
    """
    named = [_run_and_arm(str(name)) for name in runs]
    names = Counter(path.name for path in {run.path.resolve() for run, _ in named})
    models: list[Audited] = []
    for run, arm in named:
        name = run.path.resolve().name
        models += _audited_models(run, arm, name if names[name] == 1 else str(run.path))
    if len(models) < 2:
        raise UserError("there is only one audited model to compare", where="runs", hint="Name several runs or arms.")
    return compare(models)


def _run_and_arm(name: str) -> tuple[RunFolder, str]:
    """The run in `FOLDER` or `FOLDER:ARM`, and the arm, which is empty where none is named."""
    folder, _, arm = name.rpartition(":") if ":" in name and not Path(name).is_dir() else (name, "", "")
    return RunFolder.open(Path(folder)), arm


def _audited_models(run: RunFolder, arm: str, label: str) -> list[Audited]:
    audit = run.read_table("audit", AuditTable)
    if audit is None:
        raise UserError("has not been audited yet", where=run.path, hint=f"Run `allmend audit {run.path}`.")
    known = [model for model in dict.fromkeys(gap.model for gap in audit.gaps) if model != BASE]
    if arm and arm not in known:
        raise UserError(f"has no audited arm {arm!r}", where=run.path, hint=f"It has {', '.join(known)}.")
    privacy = run.read_table("privacy", PrivacyTable)
    utility = run.read_table("utility", UtilityTable)
    probes = read_probes(run.path / "results" / PROBES)
    texts = {canary.id: canary.text for canary in read_canaries(run.canaries)} if run.canaries.exists() else {}
    found = []
    for model in [arm] if arm else known:
        scores = read_scores(run.scores(model)) if run.scores(model).exists() else []
        found.append(
            Audited(
                label=f"{label}/{model}",
                model=model,
                audit=audit,
                utility=utility,
                probes=[probe for probe in probes if probe.model == model],
                texts=texts,
                scores=next((one for one in scores if one.member is None), None),
                budgets=privacy.budgets.get(model, ()) if privacy else (),
            )
        )
    return found


# --- model cards


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
