"""Audited runs, and arms of runs, side by side."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from allmend.audit.compare import Audited, compare
from allmend.audit_runs.guarantees import accounted_epsilon
from allmend.audit_runs.tables import PROBES
from allmend.data.canaries import read_canaries
from allmend.errors import UserError
from allmend.learn.scores import read_scores
from allmend.probes import read_probes
from allmend.results import BASE, AuditTable, Comparison, PrivacyTable, UtilityTable
from allmend.run import RunFolder, run_and_arm


def compare_runs(runs: Sequence[Path | str]) -> Comparison:
    """The audited models of several runs (and arms of one run) side by side, each against the first tuned one.

    Args:
        runs: run folders, or `RUN:ARM` for one arm of it.

    Raises:
        UserError: a folder is no run, it is not audited yet, or it has no such arm; a model is named twice.
    """
    named = [(RunFolder.open(run.path), arm) for run, arm in (run_and_arm(str(name)) for name in runs)]
    counts = Counter((run.path.resolve(), arm) for run, arm in named)
    if twice := [run.path for run, arm in named if counts[run.path.resolve(), arm] > 1]:
        raise UserError("stands twice: a model would be compared with itself", where=twice[0], hint="Name it once.")
    folders = {run.path.resolve() for run, _ in named}
    names = Counter(path.name for path in folders)
    models: list[Audited] = []
    for run, arm in named:
        name = run.path.resolve().name
        label = f"{name if names[name] == 1 else run.path}/" if len(folders) > 1 else ""
        models += _audited_models(run, arm, label)
    if len(models) < 2:
        raise UserError(
            f"there is only one audited model to compare, {models[0].label}",
            where=named[0][0].path,
            hint=f"Name another beside it: `allmend audit compare {runs[0]} RUN`.",
        )
    return compare(models)


def _audited_models(run: RunFolder, arm: str, prefix: str) -> list[Audited]:
    whole = run.read_table("audit", AuditTable)
    if whole is None:
        raise UserError("has not been audited yet", where=run.path, hint=f"Run `allmend audit {run.path}`.")
    audit = whole.of(None)  # models that all share; members' own are asked for other canaries
    known = [model for model in dict.fromkeys(gap.model for gap in audit.gaps) if model != BASE]
    if (arm and arm not in known) or not known:
        what = f"has no audited arm {arm!r}" if arm else "has no audited arm"
        hint = f"It has {', '.join(known)}." if known else "An arm is compared by the model that all its clients share."
        raise UserError(what, where=run.path, hint=hint)
    privacy = run.read_table("privacy", PrivacyTable)
    utility = run.read_table("utility", UtilityTable)
    probes = read_probes(run.path / "results" / PROBES)
    texts = {canary.id: canary.text for canary in read_canaries(run.canaries)} if run.canaries.exists() else {}
    found = []
    for model in [arm] if arm else known:
        scores = read_scores(run.scores(model)) if run.scores(model).exists() else []
        found.append(
            Audited(
                label=prefix + model,
                model=model,
                audit=audit,
                utility=utility,
                probes=[probe for probe in probes if probe.model == model],
                texts=texts,
                scores=next((one for one in scores if one.member is None), None),
                accounted=accounted_epsilon(privacy.budgets.get(model, ())) if privacy else None,
            )
        )
    return found
