import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from allmend import life
from allmend.audit_runs.guarantees import accounted_epsilon
from allmend.audit_runs.side_by_side import compare_runs
from allmend.data.canaries import read_canaries
from allmend.errors import UserError
from allmend.models.load import LoadedModel
from allmend.probes import read_probes
from allmend.recipe import Recipe
from allmend.results import AuditTable, PrivacyTable
from allmend.run import RunFolder

MakeRecipe = Callable[..., Recipe]


def test_runs_with_other_secrets_are_not_paired_and_keep_apart_names(
    run: RunFolder, workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path: Path
) -> None:
    """Of another seed: the same ids, other texts. Both folders are called `run`."""
    other = life.tune(make(seed=5), tmp_path / "run", base=workplace, model=model)
    ids = {canary.id for canary in read_canaries(run.canaries)}
    assert {canary.id for canary in read_canaries(other.canaries)} == ids
    found = compare_runs([f"{run.path}:fedavg", other.path])
    assert [one.label for one in found.models] == [f"{run.path}/fedavg", f"{other.path}/fedavg"]
    (pair,) = found.pairs
    assert (pair.paired, pair.gap) == (False, None)
    (unaudited := tmp_path / "unaudited").mkdir()
    shutil.copytree(run.path, unaudited / "run")
    (unaudited / "run" / "results" / "audit.json").unlink()
    with pytest.raises(UserError, match="not been audited yet"):
        compare_runs([run.path, unaudited / "run"])


def test_runs_are_compared_canary_by_canary(run: RunFolder) -> None:
    found = compare_runs([f"{run.path}:fedavg", f"{run.path}:goldfish", f"{run.path}:once"])
    assert [model.label for model in found.models] == ["fedavg", "goldfish", "once"]
    probes = {
        (probe.model, probe.canary): probe
        for probe in read_probes(run.path / "results" / "audit.parquet")
        if probe.copies == 3
    }
    for pair, arm in zip(found.pairs, ("goldfish", "once"), strict=True):
        assert pair.paired
        moved = {True: [], False: []}
        for (model, canary), probe in probes.items():
            if model == arm:
                moved[probe.inserted].append(probe.log_likelihood - probes["fedavg", canary].log_likelihood)
        expected = sum(moved[True]) / len(moved[True]) - sum(moved[False]) / len(moved[False])
        assert pair.gap is not None
        assert pair.gap.value == pytest.approx(expected)
        if "reduces" in pair.words:
            assert pair.same_utility
    with pytest.raises(UserError, match="only one audited model"):
        compare_runs([f"{run.path}:fedavg"])
    with pytest.raises(UserError, match="no audited arm 'absent'"):
        compare_runs([f"{run.path}:absent"])


def test_the_accounted_epsilon_is_the_one_that_the_audit_speaks_of(run: RunFolder, tmp_path: Path) -> None:
    """Of one record: where the members have a guarantee of their own beside the records', it implies theirs."""

    def accounted(folder: Path) -> float | None:
        return compare_runs([f"{folder}:fedavg", f"{folder}:private"]).models[1].accounted

    audit = run.read_table("audit", AuditTable)
    assert audit is not None
    assert [accounted(run.path)] == [
        bound.accounted for bound in audit.epsilon if (bound.model, bound.copies) == ("private", 1)
    ]
    shutil.copytree(run.path, tmp_path / "run")
    copy = RunFolder.open(tmp_path / "run")
    privacy = copy.read_table("privacy", PrivacyTable)
    assert privacy is not None
    records = privacy.budgets["private"]
    for factor in (0.5, 2.0):
        most = max(budget.epsilon for budget in records if budget.epsilon is not None)
        member = records[0].model_copy(update={"unit": "member", "client": None, "epsilon": factor * most})
        budgets = {"private": (*records, member)}
        copy.write_table("privacy", privacy.model_copy(update={"budgets": budgets}))
        assert accounted(copy.path) == accounted_epsilon(budgets["private"]) == pytest.approx(min(1, factor) * most)
